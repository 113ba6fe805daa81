from __future__ import annotations

import io
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import tokenpref
from tokenpref import cli
from tokenpref.data import StoredRow, StoreWriter
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


@pytest.fixture
def store(tmp_path):
    """A weight store with the rows 3 and 5."""
    writer = StoreWriter(
        tmp_path / "weights", kind="log_ratio", job={"estimator": {"name": "contrastive"}}, shards=1
    )
    writer.write(
        0,
        [
            StoredRow(
                row=number,
                key=f"{number}" * 64,
                prompt="It was",
                chosen_text=" góod",
                rejected_text=" bad",
                chosen=np.asarray([number, -0.5], dtype=np.float32),
                rejected=np.asarray([-2.0], dtype=np.float32),
                chosen_spans=[(0, 5), (5, 5)],
                rejected_spans=[(0, 4)],
            )
            for number in (3, 5)
        ],
    )
    return writer.finish().path


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


def test_show_weights_prints_numbers_into_a_log(store, capsys):
    assert cli.main(["show-weights", str(store)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"row 3, key {'3' * 12}, log_ratio (log pi+ - log pi-)\nestimator contrastive\n")
    assert " góod(+3.00)<eos>(-0.50)\n" in shown and " bad(-2.00)\n" in shown
    assert "row 5" not in shown and "\x1b" not in shown


def test_show_weights_takes_rows_in_the_order_given(store, capsys):
    assert cli.main(["show-weights", str(store), "--row", "5", "--row", "3", "--row", "5", "--top", "1"]) == 0
    shown = capsys.readouterr().out
    assert [line[:5] for line in shown.splitlines() if line.startswith("row ")] == ["row 5", "row 3"]
    assert '  +5.00 " góod", chosen token 1\n' in shown


@pytest.mark.parametrize(
    ("choice", "terminal", "variables", "colored"),
    [
        ("auto", True, {}, True),
        ("auto", False, {}, False),
        ("auto", True, {"NO_COLOR": "1"}, False),
        ("auto", True, {"NO_COLOR": ""}, True),
        ("auto", True, {"TERM": "dumb"}, False),
        ("always", False, {"NO_COLOR": "1"}, True),
        ("never", True, {}, False),
    ],
)
def test_show_weights_colours_a_terminal(store, monkeypatch, choice, terminal, variables, colored):
    for name, value in ({"TERM": "xterm", "NO_COLOR": ""} | variables).items():
        monkeypatch.setenv(name, value)
    out = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    assert cli.main(["show-weights", str(store), "--color", choice]) == 0
    assert ("\x1b[97;48;2;" in out.getvalue()) is colored
    assert ("(+3.00)" in out.getvalue()) is not colored


@pytest.mark.parametrize(
    ("choice", "variable", "light"),
    [
        ("auto", "0;15", True),
        ("auto", "15;0", False),
        ("auto", "", False),
        ("light", "15;0", True),
        ("dark", "0;15", False),
    ],
)
def test_show_weights_asks_for_the_background(store, monkeypatch, capsys, choice, variable, light):
    monkeypatch.setenv("COLORFGBG", variable)
    assert cli.main(["show-weights", str(store), "--color", "always", "--background", choice]) == 0
    assert ("\x1b[30;48;2;" in capsys.readouterr().out) is light


def test_show_weights_saturates_where_it_is_told(store, capsys):
    assert cli.main(["show-weights", str(store), "--color", "always", "--limit", "8"]) == 0
    assert " -8 " in capsys.readouterr().out


def test_show_weights_prints_where_the_encoding_lacks_a_character(store, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert cli.main(["show-weights", str(store)]) == 0
    sys.stdout.flush()
    assert b" g\\xf3od(+3.00)" in raw.getvalue()


def test_show_weights_writes_a_page(store, tmp_path, capsys):
    page = tmp_path / "rows.html"
    page.write_text("an older page")
    assert cli.main(["show-weights", str(store), "--row", "3", "--row", "5", "-o", str(page)]) == 0
    written = page.read_text(encoding="utf-8")
    assert written.startswith("<!DOCTYPE html>") and "older" not in written
    assert 'title="+3.00, token 1"' in written and 'title="+5.00, token 1"' in written
    assert capsys.readouterr().out == f"2 rows of {store} in {page}\n"


def test_show_weights_reports_what_it_cannot_do(store, tmp_path, capsys):
    faults = {
        "no weight store there": [str(tmp_path / "nothing")],
        "no row 4": [str(store), "--row", "4"],
        f"the folder {tmp_path / 'no'} does not exist": [
            str(store),
            "-o",
            str(tmp_path / "no" / "rows.html"),
        ],
        "cannot be written": [str(store), "-o", str(tmp_path)],
    }
    for message, arguments in faults.items():
        assert cli.main(["show-weights", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    empty = StoreWriter(tmp_path / "empty", kind="log_ratio", job={}, shards=1)
    empty.write(0, [])
    empty.finish()
    assert cli.main(["show-weights", str(tmp_path / "empty")]) == 2
    assert "has no rows" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option", ["--limit=0", "--limit=nan", "--limit=x", "--top=-1", "--row=x", "--color=blue"]
)
def test_show_weights_refuses_wrong_options(option, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["show-weights", "store", option])
    assert stop.value.code == 2
    assert option.split("=")[0] in capsys.readouterr().err
