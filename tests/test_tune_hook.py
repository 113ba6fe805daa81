"""The start-up hook in environments of its own, and the real ``tune`` command on top of it.

A wheel is built from the sdist of a copy of this project that has one small recipe and config. It is installed into
a fresh environment that sees the libraries of the current one, but not the tokenpref that is installed there.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUNE = "import sys\nfrom torchtune._cli.tune import main\nsys.exit(main())\n"
SEVERAL_COMMANDS = """
import json, sys
from torchtune._cli.tune import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["tune", *command]
    main()
"""
# Each process writes a file, because two of them would mix their lines on one stdout.
RECIPE = '''
"""Writes down who runs what."""
import json, os, pathlib, sys
from tokenpref._registry import find_config

if __name__ == "__main__":
    config = find_config(sys.argv[sys.argv.index("--config") + 1])
    rank = os.environ.get("RANK", "none")
    found = {"file": __file__, "config": str(config), "text": config.read_text(), "world": os.environ.get("WORLD_SIZE")}
    pathlib.Path(f"rank_{rank}.json").write_text(json.dumps({**found, "rest": sys.argv[3:]}))
'''
TORCHTUNE_REGISTRY = """
from types import SimpleNamespace as Recipe
Config = Recipe
_ALL_RECIPES = [Recipe(name="theirs")]
def get_all_recipes():
    return _ALL_RECIPES
"""
LIST_NAMES = "import torchtune._recipe_registry as r; print(*[x.name for x in r.get_all_recipes()])"


@dataclass
class Environment:
    """A Python environment with the wheel in it."""

    folder: Path

    @property
    def site(self) -> Path:
        return Path(sysconfig.get_path("purelib", vars={"base": str(self.folder)}))

    def call(self, *command, cwd, **variables):
        """Run a program of the environment; returns the finished process with its text."""
        own = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TOKENPREF_", "COV_"))}
        own.update(OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1", **variables)
        program = self.folder / "bin" / command[0]
        return subprocess.run(
            [program, *command[1:]], cwd=cwd, env=own, capture_output=True, text=True, timeout=240
        )

    def tune(self, *arguments, cwd, **variables):
        """Run ``tune``; it must succeed."""
        done = self.call("tune", *arguments, cwd=cwd, **variables)
        assert done.returncode == 0, done.stderr
        return done


def make_environment(folder: Path, *, libraries: bool) -> Environment:
    venv.create(folder, with_pip=False, symlinks=True)
    environment = Environment(folder)
    if libraries:
        # As plain paths, which do not run the .pth files there: another tokenpref stays out of sight.
        paths = dict.fromkeys(sysconfig.get_path(kind) for kind in ("purelib", "platlib"))
        (environment.site / "libraries.pth").write_text("\n".join(paths) + "\n")
        script = folder / "bin" / "tune"
        script.write_text(f"#!{folder / 'bin' / 'python'}\n{TUNE}")
        script.chmod(0o755)
    return environment


def run_here(*command: str | Path, cwd: Path) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the project's wheel, made from its sdist, and the recipe above as its only recipe."""
    base = tmp_path_factory.mktemp("hook")
    tree = base / "tree"
    shutil.copytree(ROOT / "tokenpref", tree / "tokenpref", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE", "_tokenpref_tune.py", "tokenpref_tune.pth"):
        shutil.copy(ROOT / name, tree)
    for name, text in (
        ("recipes/tdpo_distributed.py", RECIPE),
        ("configs/tiny/tdpo.yaml", "beta: 0.1\n"),
        ("data/tiny/train.jsonl", "{}\n"),
    ):
        (tree / name).parent.mkdir(parents=True)
        (tree / name).write_text(text)
    run_here("hatchling", "build", "--target", "sdist", "--directory", base, cwd=tree)
    (sdist,) = base.glob("tokenpref-*.tar.gz")
    offline = ("--no-deps", "--no-index", "--disable-pip-version-check")
    run_here("pip", "wheel", sdist, *offline, "--no-build-isolation", "--wheel-dir", base, cwd=base)
    (wheel,) = base.glob("tokenpref-*.whl")
    environment = make_environment(base / "environment", libraries=True)
    python = environment.folder / "bin" / "python"
    run_here("pip", "--python", python, "install", wheel, *offline, cwd=base)
    shutil.rmtree(tree)
    return environment


@pytest.fixture
def fake_torchtune(tmp_path):
    """A folder with a package of torchtune's name and registry, for tests that need neither torch nor seconds."""
    package = tmp_path / "fake" / "torchtune"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "_recipe_registry.py").write_text(TORCHTUNE_REGISTRY)
    return package.parent


def ranks(folder: Path) -> dict[str, dict]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("rank_*.json"))}


def test_the_wheel_carries_recipes_configs_and_data(installed):
    data = installed.site / "tokenpref_data"
    assert (data / "recipes/tdpo_distributed.py").is_file()
    assert (data / "configs/tiny/tdpo.yaml").is_file()
    assert (data / "data/tiny/train.jsonl").is_file()
    assert (installed.site / "tokenpref/py.typed").is_file()
    assert not (installed.site / "recipes").exists(), "this name belongs to torchtune's wheel"


def test_run_by_name_from_another_directory(installed, tmp_path):
    installed.tune("run", "recipes/tdpo_distributed", "--config", "tiny/tdpo", "loss.beta=0.2", cwd=tmp_path)
    data = installed.site / "tokenpref_data"
    assert ranks(tmp_path) == {
        "rank_none": {
            "file": str(data / "recipes/tdpo_distributed.py"),
            "config": str(data / "configs/tiny/tdpo.yaml"),
            "text": "beta: 0.1\n",
            "world": None,
            "rest": ["loss.beta=0.2"],
        }
    }


def test_run_by_name_with_two_processes_and_a_config_path_of_the_package(installed, tmp_path):
    installed.tune(
        *("run", "--nproc_per_node", "2", "recipes/tdpo_distributed"),
        *("--config", "configs/tiny/tdpo.yaml", "loss.beta=0.2"),
        cwd=tmp_path,
    )
    found = ranks(tmp_path)
    assert sorted(found) == ["rank_0", "rank_1"]
    for rank in found.values():
        assert rank["world"] == "2"
        assert rank["config"] == str(installed.site / "tokenpref_data/configs/tiny/tdpo.yaml")
        assert rank["rest"] == ["loss.beta=0.2"]


def test_ls_cat_cp_and_run_of_the_copy(installed, tmp_path):
    commands = [
        ["ls"],
        ["cat", "tiny/tdpo"],
        ["cp", "recipes/tdpo_distributed", "my_tdpo.py"],
        ["cp", "tiny/tdpo", "my.yaml"],
    ]
    done = installed.call("python", "-c", SEVERAL_COMMANDS, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["recipes/tdpo_distributed", "tiny/tdpo"] in rows
    assert "beta: 0.1" in done.stdout
    assert (tmp_path / "my_tdpo.py").read_text() == RECIPE

    (tmp_path / "my.yaml").write_text("beta: 0.3\n")
    copy = ("my_tdpo.py", "--config", "my.yaml")
    installed.tune("run", *copy, cwd=tmp_path)
    installed.tune("run", "--nproc_per_node", "2", *copy, cwd=tmp_path)
    found = ranks(tmp_path)
    assert sorted(found) == ["rank_0", "rank_1", "rank_none"]
    for rank in found.values():
        assert rank["file"] == str(tmp_path / "my_tdpo.py")
        assert rank["text"] == "beta: 0.3\n"


def test_a_failing_registration_is_reported_and_tune_still_works(installed, tmp_path):
    broken = tmp_path / "broken" / "tokenpref"
    broken.mkdir(parents=True)
    (broken / "__init__.py").touch()
    (broken / "_registry.py").write_text("def register(module):\n    raise OSError('disk on fire')\n")
    done = installed.tune("ls", cwd=tmp_path, PYTHONPATH=str(broken.parent))
    assert "full_finetune_distributed" in done.stdout
    assert "recipes/" not in done.stdout
    assert "tokenpref: recipes or configs are missing from `tune` (OSError: disk on fire)" in done.stderr


def test_tune_of_this_environment_lists_what_this_project_has(tmp_path):
    from tokenpref._registry import config_files, recipe_files

    tune = Path(sys.executable).parent / "tune"
    done = subprocess.run([tune, "ls"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "tokenpref" not in done.stderr
    words = done.stdout.split()
    assert {f"recipes/{stem}" for stem in recipe_files()} <= set(words)
    assert set(config_files()) <= set(words)


# --- without torch ---------------------------------------------------------------------------------------------------


def test_hook_registers_on_first_import(installed, fake_torchtune, tmp_path):
    done = installed.call("python", "-c", LIST_NAMES, cwd=tmp_path, PYTHONPATH=str(fake_torchtune))
    assert (done.stdout, done.stderr) == ("theirs recipes/tdpo_distributed\n", "")


def test_switch_turns_the_hook_off(installed, fake_torchtune, tmp_path):
    done = installed.call(
        *("python", "-c", LIST_NAMES),
        cwd=tmp_path,
        PYTHONPATH=str(fake_torchtune),
        TOKENPREF_NO_TUNE_HOOK="1",
    )
    assert (done.stdout, done.stderr) == ("theirs\n", "")


def test_a_config_of_unknown_method_is_reported_and_the_rest_works(installed, fake_torchtune, tmp_path):
    odd = installed.site / "tokenpref_data/configs/tiny/guess.yaml"
    odd.touch()
    try:
        done = installed.call("python", "-c", LIST_NAMES, cwd=tmp_path, PYTHONPATH=str(fake_torchtune))
    finally:
        odd.unlink()
    assert done.stdout == "theirs recipes/tdpo_distributed\n"
    assert "'guess' names no known method" in done.stderr


def test_a_torchtune_without_registry_fails_as_it_would_without_us(installed, fake_torchtune, tmp_path):
    (fake_torchtune / "torchtune/_recipe_registry.py").unlink()
    done = installed.call("python", "-c", LIST_NAMES, cwd=tmp_path, PYTHONPATH=str(fake_torchtune))
    assert done.returncode == 1
    assert "No module named 'torchtune._recipe_registry'" in done.stderr
    assert "tokenpref" not in done.stderr


@pytest.mark.parametrize(
    ("left", "reported"),
    [
        (["tokenpref_tune.pth"], "tokenpref: no recipes in tune: No module named '_tokenpref_tune'"),
        (["tokenpref_tune.pth", "_tokenpref_tune.py"], "(ModuleNotFoundError: No module named 'tokenpref')"),
    ],
)
def test_half_an_installation_keeps_python_and_the_registry_working(left, reported, fake_torchtune, tmp_path):
    environment = make_environment(tmp_path / "environment", libraries=False)
    for name in left:
        shutil.copy(ROOT / name, environment.site)
    done = environment.call("python", "-c", LIST_NAMES, cwd=tmp_path, PYTHONPATH=str(fake_torchtune))
    assert done.returncode == 0
    assert done.stdout == "theirs\n"
    assert reported in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_stderr_breaks_nothing(fake_torchtune, tmp_path):
    environment = make_environment(tmp_path / "environment", libraries=False)
    shutil.copy(ROOT / "_tokenpref_tune.py", environment.site)
    code = f"import sys; sys.stderr.close(); import _tokenpref_tune; {LIST_NAMES}"
    done = environment.call("python", "-c", code, cwd=tmp_path, PYTHONPATH=str(fake_torchtune))
    assert done.stdout == "theirs\n"


def test_start_of_python_costs_next_to_nothing(installed, tmp_path):
    code = textwrap.dedent("""
        import sys
        print([m for m in ("torch", "torchtune", "tokenpref", "typing", "__future__") if m in sys.modules])
    """)
    costs = []
    for _ in range(7):
        done = installed.call("python", "-X", "importtime", "-c", code, cwd=tmp_path)
        assert done.stdout == "[]\n"
        (row,) = (line for line in done.stderr.splitlines() if line.endswith(" _tokenpref_tune"))
        costs.append(int(row.split("|")[1]))
    assert min(costs) < 1000, f"microseconds: {costs}"
