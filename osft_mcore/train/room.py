"""Whether the disk has room for another checkpoint, and what could make room."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from osft_mcore.checkpoint.save import readable
from osft_mcore.files import nearest_existing

# What `checkpoint.folder.set_aside` and `RunFolder.put_aside` make.
_UNUSED: Final = re.compile(r"step_\d+\.unused\d*")
_UNFINISHED: Final = re.compile(r"unfinished_\d+")
NUM_SHOWN: Final = 4


def lacking_room(root: Path, needed: int, *, protected: Path | None = None) -> str:
    """Why `needed` bytes more cannot go to `root`; empty if they can.

    `root` is the folder of a run's checkpoints. Names what the run keeps and does not use, largest
    first, but not `protected`. Raises nothing: a disk that is gone is an answer, too.
    """
    try:
        free = shutil.disk_usage(nearest_existing(root)).free
    except OSError as error:
        return f"{root}: {error.strerror}; is the disk of output_dir still there?"
    if free >= needed:
        return ""
    return (
        f"{root}: a checkpoint takes {readable(needed)}, but {readable(free)} are free; make room, "
        f"lower checkpoint.keep_last, or choose another output_dir{_spare(root, protected)}"
    )


def _spare(root: Path, protected: Path | None) -> str:
    """What no run goes on from by itself, with sizes; for the user to delete, or to keep."""
    sizes = {
        path: _size(path)
        for path in _set_aside(root)
        if protected is None or not protected.is_relative_to(path.resolve())
    }
    if not sizes:
        return ""
    largest = sorted(sizes, key=lambda path: (-sizes[path], path))
    shown = ", ".join(f"{path} ({readable(sizes[path])})" for path in largest[:NUM_SHOWN])
    more = len(largest) - NUM_SHOWN
    return f"; the run does not need {shown}" + (f" and {more} more such folders" * (more > 0))


def _set_aside(root: Path) -> Iterator[Path]:
    for folder, pattern in ((root, _UNUSED), (root.parent, _UNFINISHED)):
        with suppress(OSError):
            for path in folder.iterdir():
                if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
                    yield path


def _size(folder: Path) -> int:
    """Bytes of all files; those that cannot be looked at count nothing."""
    total = 0
    for at, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += (Path(at) / name).lstat().st_size
    return total
