"""Files that survive a power cut: written, flushed, renamed; and what each of them holds."""

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 22
WRITE_BYTES = 1 << 20
"""Small enough to be in the processor's cache still when it is written after it was hashed."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a complete file holds."""

    size: int
    """In bytes."""
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, flush it to the disk, and say what it holds.

    Raises OSError if the disk is full; what was written so far is left behind.
    """
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as file:
        for chunk in chunks:
            view = memoryview(chunk).cast("B")
            for start in range(0, len(view), WRITE_BYTES):
                piece = view[start : start + WRITE_BYTES]
                digest.update(piece)
                file.write(piece)
            size += len(view)
        file.flush()
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def record_of(path: Path) -> FileRecord:
    """What a file on disk holds: reads it whole."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            size += len(chunk)
    return FileRecord(size, digest.hexdigest())


def json_bytes(value: Any) -> bytes:
    """`value` as indented JSON with a newline at its end."""
    return (json.dumps(value, indent=2) + "\n").encode()


def parse_json(content: str | bytes) -> Any:
    """`content` as plain values. Raises ValueError for whatever is not JSON.

    That is more than json.loads refuses so: NaN, numbers too large for a float, and values nested
    so deep that it gives up.
    """
    try:
        return json.loads(content, parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:20]} is not a number that JSON has")
    return value


def replace_file(path: Path, content: bytes) -> FileRecord:
    """Give `path` new content in one step: a reader sees the old or the new, never half."""
    temporary = path.with_name(path.name + ".tmp")
    record = write_file(temporary, [content])
    rename(temporary, path)
    return record


def rename(old: Path, new: Path) -> None:
    """Rename a file or a folder within one folder, for good."""
    os.replace(old, new)
    flush(new.parent)


def flush(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
