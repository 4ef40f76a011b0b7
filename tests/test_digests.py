"""Files are read again when they may have changed, and only then."""

import hashlib
import os
import time
from pathlib import Path

import pytest

from mt import digests as module
from mt.digests import digests


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"one")
    return path


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if every file had been written long ago."""
    monkeypatch.setattr(module, "TICK", -(1 << 60))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def no_reading(*_: object) -> None:
    raise AssertionError("the file was read again")


@pytest.mark.usefixtures("settled")
def test_what_looks_untouched_is_not_read_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    first = digests([file], memory=memory)
    assert first == {file: sha256(file)}
    monkeypatch.setattr(module.hashlib, "file_digest", no_reading)
    assert digests([file], memory=memory) == first
    (tmp_path / "elsewhere").mkdir()
    for path in (file, memory):
        path.rename(tmp_path / "elsewhere" / path.name)
    moved = tmp_path / "elsewhere" / file.name
    # A renamed file has a new time of change on some systems, where it may be read again.
    monkeypatch.undo()
    assert digests([moved], memory=tmp_path / "elsewhere" / "memory") == {moved: first[file]}


@pytest.mark.usefixtures("settled")
def test_a_change_that_hides_its_date_is_seen(file: Path, tmp_path: Path) -> None:
    digests([file], memory=tmp_path / "memory")
    facts = file.stat()
    time.sleep(0.05)
    file.write_bytes(b"two")
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert digests([file], memory=tmp_path / "memory") == {file: sha256(file)}


def test_what_was_just_written_may_change_unseen_and_is_not_remembered(
    file: Path, tmp_path: Path
) -> None:
    for content in (b"one", b"two", b"six"):
        file.write_bytes(content)
        assert digests([file], memory=tmp_path / "memory") == {file: sha256(file)}
    assert not (tmp_path / "memory").exists()


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("content", [b"", b"no JSON", b"\xff\xfe"])
def test_a_damaged_memory_is_no_memory(file: Path, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "memory").write_bytes(content)
    assert digests([file], memory=tmp_path / "memory") == {file: sha256(file)}


@pytest.mark.usefixtures("settled")
def test_where_nothing_can_be_kept_everything_is_read(file: Path, tmp_path: Path) -> None:
    assert digests([file], memory=tmp_path / "nowhere" / "memory") == {file: sha256(file)}


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        digests([tmp_path / "missing"], memory=tmp_path / "memory")
