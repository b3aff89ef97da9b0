"""What is written is what was given, and what is said of it is true."""

import array
import hashlib
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
