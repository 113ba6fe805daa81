"""A server that has imported what ``tune`` imports and forks a process for each command.

Importing torch and torchtune takes seconds of processor time, and a run by torchrun takes them again for each rank. This server
takes them once. A forked command has the arguments, working directory, environment, output files, session and exit code of
the real one. It can be stopped and killed. Under torchrun the launcher forks its ranks before it starts any thread.

Two things differ from a process of its own. All commands have the same seed of Python's hashes, so that sets have the same
order in all of them. And a library that reads an environment variable while it is imported has read the server's. Tests
therefore start some commands as users do, at least one for each recipe: ``fresh=True`` in :mod:`support.commands`.

The server is this file, run as a program whose standard input is a socket. It imports nothing else of the tests.
"""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

PRELOADED = ("torchtune._cli.tune", "torch._dynamo", "tokenpref.training")
_TORCHRUN = "torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler"
_RANKS = ("--nproc_per_node", "--nproc-per-node")
_MENDED = {"jemalloc_bg_thd"}  # threads that their library starts again after a fork
_LONGEST = 1 << 18  # bytes of a message


class ForkedProcess:
    """What tests and torchrun use of ``subprocess.Popen``."""

    pid: int
    returncode: int | None = None

    def _end(self, timeout: float | None) -> int | None:
        """The exit code once the process has ended, or None if it runs on for ``timeout`` seconds."""
        raise NotImplementedError

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._end(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            self.returncode = self._end(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"forked process {self.pid}", timeout or 0)
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Command(ForkedProcess):
    """A command. The server's child that waits for it reports its process id and then its exit code."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel = channel
        self.pid = self._number()

    def _number(self) -> int:
        message = self._channel.recv(_LONGEST)
        if not message:
            raise RuntimeError("the fork server of the tests has ended; see its error above")
        return int(message)

    def _end(self, timeout: float | None) -> int | None:
        ready, _, _ = select.select([self._channel], [], [], timeout)
        return self._number() if ready else None


class Rank(ForkedProcess):
    """A child that waits until torchrun gives it a command."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid = pid
        self.channel = channel

    def _end(self, timeout: float | None) -> int | None:
        deadline = None if timeout is None else time.monotonic() + timeout
        while not (found := os.waitpid(self.pid, os.WNOHANG))[0]:
            if deadline is not None and time.monotonic() >= deadline:
                return None
            time.sleep(0.01)
        return os.waitstatus_to_exitcode(found[1])


class ForkServer:
    """The server and its commands; it ends when the process that made it ends.

    Args:
        environment: of the server.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._control, theirs = _socket_pair()
        with theirs:
            self._server = subprocess.Popen([sys.executable, __file__], stdin=theirs, env=environment)

    def start(
        self,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        stdout: IO[Any],
        stderr: IO[Any],
    ) -> Command:
        """Start a Python program.

        Args:
            command: path of the program, a Python file, and its arguments.
            folder: working directory.
            environment: of the command.
            stdout: an open file.
            stderr: an open file.
        """
        ours, theirs = _socket_pair()
        message = {"command": list(command), "folder": str(folder), "environment": dict(environment)}
        with theirs, suppress(BrokenPipeError):  # the command says so
            files = [stdout.fileno(), stderr.fileno(), theirs.fileno()]
            socket.send_fds(self._control, [json.dumps(message).encode()], files)
        return Command(ours)


def _socket_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _serve() -> None:
    """Fork for each message. Returns in the server at the end, and in a forked command when it has run."""
    control = socket.socket(fileno=os.dup(0))
    sys.path[0] = str(Path(sys.executable).parent)  # that of the command, instead of this file's folder
    for name in PRELOADED:
        importlib.import_module(name)
    threads = {
        task.read_text().strip()
        for task in Path("/proc/self/task").glob("*/comm")
        if task.parent.name != str(os.getpid())
    }
    if not threads <= _MENDED:
        raise RuntimeError(f"imports have started threads, which a fork would lose: {threads - _MENDED}")
    gc.collect()
    gc.freeze()  # the collector of a forked process does not copy these pages
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children that wait for commands
    while True:
        message, files, _, _ = socket.recv_fds(control, _LONGEST, 3)
        if not message:
            return
        if os.fork() == 0:
            break
        for file in files:
            os.close(file)
    control.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    channel = socket.socket(fileno=files.pop())
    pid = os.fork()
    if pid:
        _report(pid, channel)
    channel.close()
    _run_command(**json.loads(message), files=files)


def _report(pid: int, channel: socket.socket) -> None:
    """Send a child's process id and its exit code, and end."""
    with suppress(BrokenPipeError):
        channel.send(b"%d" % pid)
        channel.send(b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    os._exit(0)


def _run_command(command: list[str], folder: str, environment: dict[str, str], files: list[int]) -> None:
    os.setsid()
    os.chdir(folder)
    for number, file in enumerate((os.open(os.devnull, os.O_RDONLY), *files)):
        os.dup2(file, number)
        os.close(file)
    ranks = [int(command[place + 1]) for place, word in enumerate(command) if word in _RANKS]
    if ranks:
        torchrun = importlib.import_module(_TORCHRUN)
        torchrun.Popen = functools.partial(_start_rank, _fork_ranks(ranks[0]))
    _run_program(["-", *command], environment)


def _fork_ranks(count: int) -> list[Rank]:
    """Children that wait for a command each; they end when this process has ended without giving them one."""
    ranks: list[Rank] = []
    for _ in range(count):
        ours, theirs = _socket_pair()
        pid = os.fork()
        if pid == 0:
            for channel in (ours, *(rank.channel for rank in ranks)):
                channel.close()
            os.setsid()
            message = theirs.recv(_LONGEST)
            theirs.close()
            if message:
                _run_program(**json.loads(message))
            sys.exit()
        theirs.close()
        ranks.append(Rank(pid, ours))
    return ranks


def _start_rank(
    waiting: list[Rank],
    args: Sequence[str],
    env: Mapping[str, str],
    stdout: None,
    stderr: None,
    start_new_session: bool,
) -> Rank:
    """Stands in for ``subprocess.Popen`` in torchrun."""
    assert args[0] == sys.executable and stdout is None and stderr is None and start_new_session, args
    rank = waiting.pop(0)
    rank.channel.send(json.dumps({"command": list(args), "environment": dict(env)}).encode())
    rank.channel.close()
    return rank


def _run_program(command: list[str], environment: dict[str, str]) -> None:
    """Run ``python [-u] FILE ...`` or ``python [-u] -m MODULE ...`` in this process."""
    import numpy

    numpy.random.seed()  # Python seeds its own generator after a fork
    os.environ.clear()
    os.environ.update(environment)
    words = command[1:]
    if words[0] == "-u":
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
        del words[0]
    if words[0] == "-m":
        sys.path[0], sys.argv = os.getcwd(), words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.path[0], sys.argv = str(Path(words[0]).parent), words
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    _serve()
