from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import tokenpref
from tokenpref import cli
from tokenpref.errors import TokenprefError


@pytest.fixture
def smollm2(monkeypatch):
    """A stand-in for the model's module, which needs an extra; it keeps the folders that it was asked to write."""
    module = ModuleType("tokenpref.models.smollm2")
    module.written = []
    module.prepare = module.written.append
    monkeypatch.setitem(sys.modules, "tokenpref.models", ModuleType("tokenpref.models"))
    monkeypatch.setitem(sys.modules, "tokenpref.models.smollm2", module)
    return module


def test_version_comes_from_one_place(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"tokenpref {tokenpref.__version__}\n"
    assert metadata.version("tokenpref") == tokenpref.__version__


def test_prepare_writes_where_it_is_told(smollm2, capsys):
    assert cli.main(["prepare", "smollm2", "--output", "some/folder"]) == 0
    assert cli.main(["prepare", "smollm2"]) == 0
    assert smollm2.written == [Path("some/folder"), Path("models/smollm2-135m-instruct")]
    assert "is in some/folder" in capsys.readouterr().out


def test_a_mendable_error_is_one_line(smollm2, monkeypatch, capsys):
    def fail(output):
        raise TokenprefError(f"{output} exists; choose another --output")

    monkeypatch.setattr(smollm2, "prepare", fail)
    assert cli.main(["prepare", "smollm2", "--output", "x"]) == 2
    assert capsys.readouterr().err == "error: x exists; choose another --output\n"


def test_other_errors_keep_their_traceback(smollm2, monkeypatch):
    monkeypatch.setattr(smollm2, "prepare", lambda output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["prepare", "smollm2"])


@pytest.mark.parametrize("argv", [[], ["prepare"], ["prepare", "gpt9"], ["train"]])
def test_wrong_commands_show_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2
    assert "usage: tokenpref" in capsys.readouterr().err


def test_env_reports_versions(capsys, monkeypatch):
    monkeypatch.setattr(cli, "_REPORTED", ("torch", "no-such-distribution"))
    assert cli.main(["env"]) == 0
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert rows["tokenpref"].startswith(tokenpref.__version__)
    assert rows["torch"] == metadata.version("torch")
    assert rows["no-such-distribution"] == "not installed"
    assert rows["devices"]


def test_hook_state(monkeypatch):
    hook = ModuleType("_tokenpref_tune")
    hook.OFF_SWITCH = "TOKENPREF_NO_TUNE_HOOK"
    hook.__file__ = "/site/_tokenpref_tune.py"
    monkeypatch.setitem(sys.modules, "_tokenpref_tune", hook)
    monkeypatch.delenv("TOKENPREF_NO_TUNE_HOOK", raising=False)
    assert cli._hook_state() == "active (/site/_tokenpref_tune.py)"
    monkeypatch.setenv("TOKENPREF_NO_TUNE_HOOK", "1")
    assert cli._hook_state() == "switched off by TOKENPREF_NO_TUNE_HOOK"
    monkeypatch.delitem(sys.modules, "_tokenpref_tune")
    assert cli._hook_state().startswith("not installed")


def test_the_command_is_installed():
    command = Path(sys.executable).parent / "tokenpref"
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"tokenpref {tokenpref.__version__}\n"
