"""Commands that tests fork from a server are like those that users start; see tests/support/fork_server.py."""

import json
import signal
import sys

import pytest
from support.commands import kill_all, run, start, tune

REPORT = """
import atexit, json, multiprocessing, os, signal, sys

print(json.dumps({
    "argv": sys.argv, "file": __file__, "main": sys.modules["__main__"].__dict__ is globals(), "path": sys.path,
    "executable": sys.executable, "flags": str(sys.flags), "process": multiprocessing.current_process().name,
    "folder": os.getcwd(), "input": sys.stdin.read(), "leads": os.getsid(0) == os.getpid() == os.getpgid(0),
    "files": [name for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}")],
    "handlers": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE)],
    "environment": {**os.environ, "PYTEST_CURRENT_TEST": ""}, "threads": len(os.listdir("/proc/self/task")),
}))
atexit.register(lambda: print("at the end", file=sys.stderr))
print("an error", file=sys.stderr)
"""
RANK = """
import json, os, pathlib, sys

rank = os.environ["RANK"]
started = {name: value for name, value in os.environ.items() if name in ("WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")}
found = {"argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "name": __name__, "variables": started}
pathlib.Path(f"rank_{rank}.json").write_text(json.dumps(found))
print(f"rank {rank} speaks")
sys.exit(5 if "fail" in sys.argv else 0)
"""


def executable(file, text):
    file.write_text(f"#!{sys.executable}\n{text}")
    file.chmod(0o755)
    return str(file)


@pytest.mark.parametrize(
    ("end", "code"),
    [("", 0), ("sys.exit(7)", 7), ("raise ValueError('for once')", 1), ("os.kill(os.getpid(), signal.SIGTERM)", -15)],
)  # fmt: skip
def test_a_forked_command_is_like_the_real_one(tmp_path, end, code):
    words = (executable(tmp_path / "report.py", REPORT + end), "a word")
    real, forked = (run(tmp_path, *words, fresh=fresh) for fresh in (True, False))
    assert real.returncode == forked.returncode == code
    assert json.loads(forked.stdout) == json.loads(real.stdout)
    for done in (real, forked):
        assert done.stderr.startswith("an error\n") and ("at the end\n" in done.stderr) is (code >= 0)
        assert ("ValueError: for once" in done.stderr) is (code == 1)


def by_two(folder, *words, fresh=False):
    """Run RANK on two ranks; what torchrun says, its exit code, and what each rank has found."""
    folder.mkdir()
    (folder / "speak.py").write_text(RANK)
    words = ("--nproc_per_node", "2", "speak.py", "--config", "none", *words)
    done = tune(folder, *words, ok=False, fresh=fresh)
    texts = [file.read_text().replace(str(folder), "FOLDER") for file in sorted(folder.glob("rank_*.json"))]
    assert [f"rank {rank} speaks" in done.stdout for rank in (0, 1)] == [True, True], done.stderr
    return done, [json.loads(text) for text in texts]


def test_ranks_of_a_forked_torchrun_are_like_the_real_ones(tmp_path):
    (real, expected), (forked, found) = (by_two(tmp_path / str(f), fresh=f) for f in (True, False))
    assert real.returncode == forked.returncode == 0
    assert found == expected and len(found) == 2


def test_a_forked_torchrun_reports_a_rank_that_fails(tmp_path):
    done, _ = by_two(tmp_path / "failing", "fail")
    assert done.returncode == 1 and "speak FAILED" in done.stderr and "exitcode  : 5" in done.stderr


def test_a_forked_command_can_be_stopped_and_killed(tmp_path):
    wait = "import pathlib, time\npathlib.Path('here').touch()\ntime.sleep(60)\n"
    program = executable(tmp_path / "wait.py", wait)
    for end, code in (
        (lambda p: p.send_signal(signal.SIGTERM), -15),
        (lambda p: p.kill(), -9),
        (kill_all, -9),
    ):
        with (tmp_path / "log.txt").open("w") as log:
            process = start(tmp_path, program, stdout=log)
        while not (tmp_path / "here").exists():
            assert process.poll() is None
        (tmp_path / "here").unlink()
        end(process)
        assert process.wait(10) == process.poll() == code
