"""Failures to write become one error with the cause, whoever wrote."""

import errno
import os
import resource

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from tokenpref._files import move_aside, write_fault, write_json, writing
from tokenpref.errors import TokenprefError


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device; make room on that disk"),
        (errno.EDQUOT, "quota exceeded; make room within your quota"),
        (errno.EFBIG, "File too large; raise the limit on the size of files"),
        (errno.EIO, "Input/output error; check that disk"),
        (errno.EROFS, "Read-only file system; set output_dir to a disk that can be written to"),
        (errno.EACCES, "Permission denied; set output_dir to a folder that you may write to"),
        (errno.ESTALE, "Stale file handle$"),
    ],
)
def test_the_cause_and_what_to_do(number, said):
    with pytest.raises(TokenprefError, match=f"^here/file cannot be written: .*{said}"), writing("here/file"):
        raise OSError(number, os.strerror(number))


@pytest.fixture
def small_files():
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "write",
    [
        lambda file: save_file({"a": torch.zeros(10_000)}, file),
        lambda file: torch.save({"a": torch.zeros(10_000)}, file),
        lambda file: write_json(file, {"a": "b" * 10_000}),
        lambda file: file.write_bytes(bytes(10_000)),
    ],
    ids=["safetensors", "torch.save", "write_json", "plain"],
)
def test_what_libraries_raise(small_files, tmp_path, write):
    with (
        pytest.raises(TokenprefError, match="cannot be written: .*; (raise the limit|make room)"),
        writing(tmp_path),
    ):
        write(tmp_path / "file")


def test_other_errors_pass():
    for error in (RuntimeError("a shape"), SafetensorError("a header"), ValueError("a value")):
        with pytest.raises(type(error), match=str(error)), writing("here"):
            raise error
    assert write_fault(RuntimeError("a shape")) is None


def test_a_cause_below_is_found():
    error = RuntimeError("the save failed")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert write_fault(error).startswith("No space left on device")


def test_move_aside_takes_the_first_free_name(tmp_path):
    for _ in range(2):
        (tmp_path / "a.json").write_text("1")
        (tmp_path / "step_2").mkdir()
        move_aside(tmp_path / "a.json")
        move_aside(tmp_path / "step_2")
    names = ["a.former1.json", "a.former2.json", "step_2.former1", "step_2.former2"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
