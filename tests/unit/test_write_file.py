"""What is written is what was given, and what is said of it is true."""

import array
import errno
import fcntl
import hashlib
import os
from pathlib import Path

import pytest

from osft_mcore.files import WRITE_BYTES, FileRecord, write_file


@pytest.mark.parametrize("size", [0, 1, WRITE_BYTES - 1, WRITE_BYTES, 2 * WRITE_BYTES + 7])
def test_chunks_of_any_size_and_kind(tmp_path: Path, size: int) -> None:
    content = (bytes(range(251)) * (size // 251 + 1))[:size]
    doubles = array.array("d", [1.5, -2.5])
    record = write_file(tmp_path / "file", [b"", content, memoryview(doubles), memoryview(content)])
    expected = content + doubles.tobytes() + content
    assert (tmp_path / "file").read_bytes() == expected
    assert record == FileRecord(len(expected), hashlib.sha256(expected).hexdigest())


@pytest.mark.parametrize("most", [4096, 3 * 4096, 12345])
def test_writes_that_the_system_cuts_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    real = os.write
    first = iter([True])

    def write(descriptor: int, data: memoryview) -> int:
        # The first goes past the cache in whole blocks; what follows it may be cut anywhere.
        return real(descriptor, data[: 8192 if next(first, False) else most])

    monkeypatch.setattr(os, "write", write)
    content = os.urandom(2 * WRITE_BYTES + 7)
    record = write_file(tmp_path / "file", [content])
    assert (tmp_path / "file").read_bytes() == content
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_first_refuses_when_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real, refused = os.write, []

    def write(descriptor: int, data: memoryview) -> int:
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            refused.append(len(data))
            raise OSError(code, os.strerror(code))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    content = os.urandom(2 * WRITE_BYTES + 7)
    record = write_file(tmp_path / "file", [content])
    assert refused == [WRITE_BYTES]
    assert (tmp_path / "file").read_bytes() == content
    assert record == FileRecord(len(content), hashlib.sha256(content).hexdigest())


def test_refused_with_the_cache_as_well_it_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(descriptor: int, data: memoryview) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="Invalid argument"):
        write_file(tmp_path / "file", [bytes(WRITE_BYTES)])


def test_a_system_that_writes_nothing_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "write", lambda descriptor, data: 0)
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "file", [b"content"])


@pytest.mark.parametrize("tail", [0, 1000, WRITE_BYTES - 1])
def test_a_full_disk_is_an_error(small_disk: Path, tail: int) -> None:
    with pytest.raises(OSError, match="No space left"):
        write_file(small_disk / "file", [bytes(WRITE_BYTES)] * 4)
    assert write_file(small_disk / "other", [b""]).size == 0
    (small_disk / "file").unlink()
    room = os.statvfs(small_disk)
    write_file(small_disk / "ballast", [bytes(room.f_bavail * room.f_frsize - WRITE_BYTES // 2)])
    if tail > WRITE_BYTES // 2:
        with pytest.raises(OSError, match="No space left"):
            write_file(small_disk / "file", [bytes(tail)])
    else:
        assert write_file(small_disk / "file", [bytes(tail)]).size == tail
