"""The folder of a run's checkpoints: step_N, complete or not there at all, and `latest`."""

import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osft_mcore.checkpoint.manifest import MANIFEST
from osft_mcore.files import flush, rename, replace_file

LATEST: Final = "latest"
"""Names the newest checkpoint, for people and scripts; resuming looks at the folders themselves."""
STATE: Final = "state.json"
"""What the tensors of a training checkpoint do not say."""
_BUILDING: Final = ".tmp"
_DELETING: Final = ".deleting"
_SET_ASIDE: Final = ".unused"


@dataclass(frozen=True, slots=True)
class Newest:
    """The newest checkpoint whose files are whole."""

    folder: Path | None
    skipped: tuple[str, ...]
    """What is wrong with newer ones."""


def step_of(folder: Path) -> int | None:
    """N of a folder named step_N."""
    match = re.fullmatch(r"step_(\d+)", folder.name)
    return int(match.group(1)) if match else None


def checkpoints_in(root: Path) -> list[Path]:
    """The folders step_N, newest first; whether their files are whole is another question."""
    if not root.is_dir():
        return []
    found = [(step_of(path), path) for path in root.iterdir() if path.is_dir()]
    numbered = [(step, path) for step, path in found if step is not None]
    return [path for _, path in sorted(numbered, reverse=True)]


def newest_whole(folders: Iterable[Path], problems_of: Callable[[Path], list[str]]) -> Newest:
    """The first of `folders` that has no problems."""
    skipped: list[str] = []
    for folder in folders:
        problems = problems_of(folder)
        if not problems:
            return Newest(folder, tuple(skipped))
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        skipped.append(f"{problems[0]}{more}")
    return Newest(None, tuple(skipped))


def prepare(root: Path, step: int) -> Path:
    """A new, empty folder in which checkpoint `step` is built."""
    building = root / f"step_{step}{_BUILDING}"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    return building


def publish(building: Path, root: Path, step: int) -> Path:
    """Give a complete checkpoint its name, then let `latest` name it."""
    target = root / f"step_{step}"
    if target.exists():
        # Only one that did not pass its manifest can be here: the run went on from an older one.
        set_aside(target)
    assert (building / MANIFEST).is_file(), f"{building} was published without a manifest"
    rename(building, target)
    replace_file(root / LATEST, f"{target.name}\n".encode())
    return target


def set_aside(folder: Path) -> Path:
    """Keep a checkpoint that the run does not go on from under another name."""
    number = 0
    while (aside := folder.with_name(f"{folder.name}{_SET_ASIDE}{number or ''}")).exists():
        number += 1
    rename(folder, aside)
    return aside


def expired(folders: Iterable[Path], *, keep_last: int, keep_every: int) -> list[Path]:
    """Which of `folders` (newest first) go: neither among the newest nor multiples to be kept."""
    old = list(folders)[keep_last:]
    return [path for path in old if not (keep_every and (step_of(path) or 0) % keep_every == 0)]


def delete(folder: Path) -> None:
    """Remove a checkpoint: first its name, so that a half-deleted one is never taken for whole."""
    doomed = folder.with_name(folder.name + _DELETING)
    rename(folder, doomed)
    shutil.rmtree(doomed)


def sweep(root: Path) -> None:
    """Remove what an interrupted save or deletion left behind; nobody may be saving."""
    if root.is_dir():
        for path in root.iterdir():
            if path.is_dir() and path.suffix in (_BUILDING, _DELETING):
                shutil.rmtree(path)
            elif path.name == f"{LATEST}{_BUILDING}":
                path.unlink()
        flush(root)
