"""Sealed folders: what is recorded of their files, and every way in which a file or the record can differ later."""

import hashlib
import json

import pytest
import xxhash

from tokenpref._sealed import (
    MANIFEST,
    SHA256,
    Written,
    check_if_sealed,
    digest_of,
    fault_of,
    read_files,
    read_record,
    seal,
    write_file,
)
from tokenpref.errors import ConfigError, DataError


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    (tmp_path / "sub" / "b.bin").write_bytes(b"xyz")
    seal(tmp_path, about={"rows": 3})
    return tmp_path


def test_the_manifest_holds_sizes_and_checksums(sealed):
    digests = [xxhash.xxh3_128_hexdigest(content) for content in (b"0123456789", b"xyz")]
    assert json.loads((sealed / MANIFEST).read_text()) == {
        "files": {
            "a.bin": {"bytes": 10, "xxh3_128": digests[0]},
            "sub/b.bin": {"bytes": 3, "xxh3_128": digests[1]},
        },
        "about": {"rows": 3},
    }
    assert fault_of(sealed) is None
    assert read_files(sealed / MANIFEST)["sub/b.bin"] == Written(3, digests[1]) == Written.of(b"xyz")


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (lambda f: (f / MANIFEST).unlink(), "it was never finished"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.bin"'), "manifest.json cannot be read"),
        (lambda f: (f / MANIFEST).write_text("[]"), "cannot be read (expected a mapping, found a list)"),
        (lambda f: (f / MANIFEST).write_text('{"files": ["a.bin"]}'), "cannot be read (files is a list"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.bin": 3}}'), "3 is not a size and a checksum"),
        (lambda f: (f / MANIFEST).write_text('{"files": {"a.bin": {"bytes": 10}}}'), "not a size and a"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff"), "manifest.json cannot be read"),
        (lambda f: (f / "a.bin").unlink(), "a.bin is missing"),
        (lambda f: (f / "c.bin").touch(), "c.bin does not belong to it"),
        (lambda f: (f / "a.bin").write_bytes(b"01234"), "a.bin has 5 bytes and was written with 10"),
        (lambda f: (f / "sub/b.bin").write_bytes(b"xyy"), "sub/b.bin is not what was written"),
    ],
    ids=[
        *("unsealed", "cut manifest", "no mapping", "no names", "no sizes", "no checksum", "no text"),
        *("missing", "surplus", "cut", "flipped"),
    ],
)
def test_harm_is_found(sealed, harm, fault):
    harm(sealed)
    assert fault in fault_of(sealed)


def test_a_file_outside_the_folder_is_not_one_of_its_files(sealed):
    (sealed / "sub" / MANIFEST).write_text(
        json.dumps({"files": {"../a.bin": Written.of(b"0123456789").entry}})
    )
    assert fault_of(sealed / "sub", others=True) == "../a.bin is missing"


def test_further_files_may_be_allowed(sealed):
    (sealed / "README.md").write_text("a note that somebody added")
    assert fault_of(sealed, others=True) is None


@pytest.mark.parametrize(
    "content", [None, b'{"files": ["model.bin"]}', b'{"manifest_version": 3}', b"\xff\x00"]
)
def test_a_folder_from_elsewhere_needs_no_manifest_of_ours(sealed, content):
    (sealed / "a.bin").write_bytes(b"another model")
    with pytest.raises(
        ConfigError, match="checkpointer: .* holds damaged weights: a.bin has 13 .*remove .*manifest.json"
    ):
        check_if_sealed(sealed, "checkpointer")
    if content is None:
        (sealed / MANIFEST).unlink()
    else:
        (sealed / MANIFEST).write_bytes(content)
    check_if_sealed(sealed, "checkpointer")
    (sealed / MANIFEST).write_bytes(b"")
    with pytest.raises(ConfigError, match="manifest.json cannot be read"):
        check_if_sealed(sealed, "checkpointer")


def test_a_file_that_cannot_be_read_is_a_fault(sealed, monkeypatch):
    def broken(file, algorithm):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("tokenpref._sealed.digest_of", broken)
    assert "a.bin cannot be read ([Errno 5] Input/output error" in fault_of(sealed)


def test_checksums_that_were_taken_before_are_trusted_if_the_sizes_agree(tmp_path):
    (tmp_path / "a.bin").write_bytes(b"0123456789")
    seal(tmp_path, {"a.bin": Written(10, "0" * 32)})
    assert fault_of(tmp_path) == "a.bin is not what was written (its checksum differs)"
    with pytest.raises(OSError, match="a.bin has 10 bytes and 9 were written to it"):
        seal(tmp_path, {"a.bin": Written(9, "0" * 32)})


@pytest.mark.parametrize(
    ("algorithm", "digest"),
    [
        ("xxh3_128", xxhash.xxh3_128_hexdigest(b"xyz")),
        ("xxh3", xxhash.xxh3_128_hexdigest(b"xyz")),  # as caches of tokenised data had it before
        (SHA256, hashlib.sha256(b"xyz").hexdigest()),
    ],
)
def test_every_checksum_of_a_record_is_compared(sealed, algorithm, digest):
    file, entry = sealed / "sub" / "b.bin", {"bytes": 3, algorithm: digest}
    written = Written.read(entry)
    assert written.entry == entry and digest_of(file, algorithm) == digest
    assert written.fault_of(file) is None
    file.write_bytes(b"xyy")
    assert "checksum differs" in written.fault_of(file)
    assert written.fault_of(file, compare_bytes=False) is None


def test_a_file_gets_its_name_when_it_is_complete(tmp_path, monkeypatch):
    write_file(tmp_path / "shard.bin", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_file(tmp_path / "shard.bin", b"new")
    assert (tmp_path / "shard.bin").read_bytes() == b"old"
    write_file(tmp_path / "shard.bin", b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["shard.bin"]
    assert (tmp_path / "shard.bin").read_bytes() == b"new"


def test_a_damaged_record_is_an_error_with_its_remedy(tmp_path):
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(DataError, match="job.json cannot be read .*; start again"):
        read_record(tmp_path / "job.json", "start again")
