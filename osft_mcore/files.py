"""Files that survive a power cut: written, flushed, renamed; and what each of them holds."""

import errno
import fcntl
import hashlib
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

READ_BYTES = 1 << 22
WRITE_BYTES = 1 << 20
"""At once: whole blocks of a disk, and still in the processor's cache after they were hashed."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a complete file holds."""

    size: int
    """In bytes."""
    sha256: str


def write_file(path: Path, chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write a new file, flush it to the disk, and say what it holds.

    A large one goes past the system's cache where the file system can do that: filling the cache
    costs whoever computes meanwhile. Raises OSError if the disk is full; what was written so far
    is left behind.
    """
    digest, size, filled = hashlib.sha256(), 0, 0
    with (
        path.open("wb", buffering=0) as file,
        mmap.mmap(-1, WRITE_BYTES) as pages,
        memoryview(pages) as buffer,
    ):
        for part in _fitting(chunks, WRITE_BYTES):
            buffer[filled : filled + len(part)] = part
            filled += len(part)
            size += len(part)
            if filled == WRITE_BYTES:
                if size == filled:
                    _bypass_cache(file.fileno(), True)
                digest.update(buffer)
                _write_all(file.fileno(), buffer)
                filled = 0
        # Only whole blocks can pass by the cache.
        _bypass_cache(file.fileno(), False)
        with buffer[:filled] as rest:
            digest.update(rest)
            _write_all(file.fileno(), rest)
        os.fsync(file.fileno())
    return FileRecord(size, digest.hexdigest())


def _fitting(chunks: Iterable[bytes | memoryview], size: int) -> Iterator[memoryview]:
    """The same bytes, cut wherever a buffer of `size` is full."""
    room = size
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while view:
            part, view = view[:room], view[room:]
            room = room - len(part) or size
            yield part


def _write_all(descriptor: int, buffer: memoryview) -> None:
    written = 0
    while written < len(buffer):
        # Released at once: an error's traceback would keep the memory below from being closed.
        with buffer[written:] as rest:
            try:
                count = os.write(descriptor, rest)
            except OSError as error:
                refused = error.errno in (errno.EINVAL, errno.EOPNOTSUPP)
                if not (refused and _bypass_cache(descriptor, False)):
                    raise
                continue
        if count == 0:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        written += count
        if written < len(buffer):
            # Cut short, perhaps in the middle of a block.
            _bypass_cache(descriptor, False)


def _bypass_cache(descriptor: int, bypass: bool) -> bool:
    """Whether writing leaves the system's cache alone; returns True if that was a change.

    A file system that cannot do it says so here, or when it is first written to.
    """
    direct = getattr(os, "O_DIRECT", 0)
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    wanted = flags | direct if bypass else flags & ~direct
    if wanted == flags:
        return False
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, wanted)
    except OSError:
        return False
    return True


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


def nearest_existing(path: Path) -> Path:
    """Itself, or the nearest folder above that is there. Raises OSError where none can be seen."""
    return next(at for at in (path, *path.absolute().parents) if at.exists())


def flush(path: Path) -> None:
    """Make a file's contents, or a folder's names, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
