"""A folder that is written under another name until it is complete, and can be gone on with."""

import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

from osft_mcore.checkpoint.manifest import MANIFEST, manifest_content, records_of
from osft_mcore.errors import CheckpointError, ConfigError
from osft_mcore.files import (
    FileRecord,
    flush,
    json_bytes,
    parse_json,
    record_of,
    rename,
    replace_file,
)

RECEIPTS: Final = "manifest.partial.json"
"""What the manifest will say, so far: every file that is complete."""
JOB: Final = "job"


@dataclass(frozen=True, slots=True, kw_only=True)
class Staging:
    """A folder under construction; only one process has it open."""

    target: Path
    folder: Path
    """Where the files are until all are there."""
    job: Mapping[str, Any]
    done: dict[str, FileRecord]
    """Files that are complete, by path within the folder."""
    found: tuple[str, ...]
    """Those that an earlier attempt had completed."""

    def write(
        self, name: str, write: Callable[[Path], FileRecord], *, receipt: bool = True
    ) -> None:
        """Let `write` make the file; nothing if it is complete already.

        Without a `receipt` a later attempt makes the file again: for small ones.
        """
        if name in self.done:
            return
        path = self.folder / name
        try:
            path.parent.mkdir(exist_ok=True)
            record = write(path)
            flush(path.parent)
            self.done[name] = record
            if receipt:
                self.note()
        except OSError as error:
            raise CheckpointError(
                f"{path}: {error.strerror}; complete files stay in {self.folder}: repeat the "
                "command to go on"
            ) from error

    def publish(self, details: Mapping[str, Any]) -> None:
        """Everything is there: the manifest, then the name."""
        self.note(details)
        rename(self.folder / RECEIPTS, self.folder / MANIFEST)
        if self.target.exists():
            # Empty: it was looked at when the work began, and rmdir looks again.
            self.target.rmdir()
        rename(self.folder, self.target)

    def note(self, details: Mapping[str, Any] = MappingProxyType({})) -> None:
        """Write the receipts."""
        content = manifest_content(self.done, {**details, JOB: dict(self.job)})
        replace_file(self.folder / RECEIPTS, json_bytes(content))


@contextmanager
def staging(target: Path, job: Mapping[str, Any]) -> Iterator[Staging]:
    """Open TARGET.tmp: new, or as an interrupted attempt at the same `job` left it.

    Complete files are looked through again, others are removed. The folder stays if the body
    fails. Raises ConfigError as `target_problems` does, and if TARGET.tmp is another job's;
    CheckpointError if it cannot be written or another process has it open.
    """
    if problems := target_problems(target):
        raise ConfigError(problems)
    folder = building(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error.strerror}") from error
    try:
        _lock(descriptor, folder)
        done = _completed(folder, job)
        opened = Staging(target=target, folder=folder, job=job, done=done, found=tuple(done))
        opened.note()
        yield opened
    finally:
        os.close(descriptor)


def building(target: Path) -> Path:
    """Where `target` is built."""
    return target.with_name(target.name + ".tmp")


def target_problems(target: Path) -> list[str]:
    """Why `target` cannot be written, in words; empty if it can."""
    if target.name in ("", ".."):
        return [f"--out: {str(target)!r} has no name of its own; name a new folder"]
    folder = building(target)
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        return [f"--out: {str(folder)!r}, where it is built, is not a folder; remove it"]
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        return [f"--out: {str(target)!r} is there and is not a folder; choose another"]
    if target.is_dir() and any(target.iterdir()):
        return [f"--out: {str(target)!r} is not empty; choose another folder or remove it"]
    return []


def fingerprint(files: Iterable[Path]) -> str:
    """Changes when a file is replaced: of names, sizes and times of change."""
    digest = hashlib.sha256()
    for path in sorted(files):
        status = path.stat()
        digest.update(f"{path.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def _lock(descriptor: int, folder: Path) -> None:
    """Let go by the kernel when the process ends, however it ends."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise CheckpointError(f"{folder}: another process is writing there") from error


def _completed(folder: Path, job: Mapping[str, Any]) -> dict[str, FileRecord]:
    """The files that are as their receipts say; all others are gone."""
    receipts = folder / RECEIPTS
    if (folder / MANIFEST).is_file():
        # It ended between its last two steps.
        rename(folder / MANIFEST, receipts)
    earlier = _read(receipts)
    if not earlier and any(path.name != f"{RECEIPTS}.tmp" for path in folder.iterdir()):
        raise ConfigError(f"--out: {folder} is there and was not begun by this program; remove it")
    if earlier and earlier[JOB] != dict(job):
        changed = sorted(
            key for key in {*earlier[JOB], *job} if earlier[JOB].get(key) != job.get(key)
        )
        raise ConfigError(
            f"--out: {folder} holds an unfinished conversion of another kind (differs in "
            f"{', '.join(changed)}); remove it to start anew, or repeat the command that began it"
        )
    records = records_of(earlier) if earlier else {}
    done = {
        name: record
        for name, record in records.items()
        if not (folder / name).is_symlink()
        and (folder / name).is_file()
        and record_of(folder / name) == record
    }
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path != receipts and str(path.relative_to(folder)) not in done:
            path.unlink()
    return done


def _read(receipts: Path) -> dict[str, Any]:
    try:
        value = parse_json(receipts.read_bytes())
        records_of(value)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value.get(JOB), dict) else {}
