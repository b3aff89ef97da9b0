"""Writes a checkpoint: every rank its file, rank 0 the rest once all have written theirs."""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osft_mcore.checkpoint.folder import checkpoints_in, delete, expired, publish
from osft_mcore.checkpoint.manifest import write_manifest
from osft_mcore.errors import CheckpointError
from osft_mcore.files import FileRecord, flush, json_bytes, parse_json, write_file
from osft_mcore.weights.safetensors_stream import TensorSpec, Values, write_safetensors

RECEIPTS: Final = "receipts"
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one rank writes."""

    file: str
    specs: Sequence[TensorSpec]
    tensors: Callable[[], Iterable[Values]]
    """Values in the order of `specs`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rest:
    """What rank 0 adds."""

    root: Path
    """The folder of the run's checkpoints."""
    step: int
    parts: Sequence[str]
    """Files of all ranks."""
    contents: Mapping[str, bytes]
    """Small files by path within the checkpoint."""
    details: Mapping[str, Any]
    """For the manifest."""
    keep_last: int
    keep_every: int
    protected: Path | None = None
    """Never deleted."""


def part_name(rank: int) -> str:
    """The file of one rank."""
    return f"rank_{rank:05d}.safetensors"


def write_part(building: Path, part: Part) -> None:
    """Write one rank's file, and a receipt that says so to rank 0, or that it failed.

    Raises CheckpointError if the file cannot be written; nothing of it is left.
    """
    path = building / part.file
    try:
        record = write_safetensors(path, part.specs, part.tensors())
        _write_receipt(building, part.file, {"size": record.size, "sha256": record.sha256})
    except Exception as error:
        # Away with it first: the receipt may need the room.
        with suppress(OSError):
            path.unlink()
        needed = sum(spec.num_bytes for spec in part.specs)
        reason = _reason(error, path, needed)
        with suppress(OSError):
            _write_receipt(building, part.file, {"error": reason})
        raise CheckpointError(reason) from error


def write_rest(building: Path, rest: Rest, *, deadline: float) -> Path:
    """Wait for all parts, then make the checkpoint complete; returns its final folder.

    `deadline` in seconds of time.monotonic(). Raises CheckpointError if a part failed or did not
    come in time, or nothing more can be written; the checkpoints before stay as they are.
    """
    files = _receipts(building, rest.parts, deadline)
    try:
        for name, content in rest.contents.items():
            path = building / name
            path.parent.mkdir(parents=True, exist_ok=True)
            files[name] = write_file(path, [content])
            flush(path.parent)
        shutil.rmtree(building / RECEIPTS)
        write_manifest(building, files, rest.details)
        target = publish(building, rest.root, rest.step)
    except OSError as error:
        raise CheckpointError(_reason(error, building, 0)) from error
    with suppress(OSError):
        # What cannot be deleted now is tried again after the next save.
        for old in expired(
            checkpoints_in(rest.root), keep_last=rest.keep_last, keep_every=rest.keep_every
        ):
            if old.resolve() != rest.protected:
                delete(old)
    return target


def _write_receipt(building: Path, file: str, receipt: Mapping[str, Any]) -> None:
    folder = building / RECEIPTS
    folder.mkdir(exist_ok=True)
    temporary = folder / f"{file}.tmp"
    temporary.write_bytes(json_bytes(receipt))
    # The last that this rank does here: whoever sees the receipt may remove the folder.
    os.replace(temporary, folder / f"{file}.json")


def _receipts(building: Path, parts: Sequence[str], deadline: float) -> dict[str, FileRecord]:
    waiting = list(parts)
    records: dict[str, FileRecord] = {}
    while True:
        for part in list(waiting):
            path = building / RECEIPTS / f"{part}.json"
            if path.is_file():
                records[part] = _read_receipt(path)
                waiting.remove(part)
        if not waiting:
            return records
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"{', '.join(waiting)} not written within checkpoint.timeout_minutes; is a rank "
                "stuck, the file system slow, or not the same folder on all hosts?"
            )
        time.sleep(POLL_S)


def _read_receipt(path: Path) -> FileRecord:
    """What a rank says of its file. Raises CheckpointError if it failed, or says neither."""
    try:
        receipt = parse_json(path.read_bytes())
        if "error" in receipt:
            raise CheckpointError(receipt["error"])
        return FileRecord(int(receipt["size"]), str(receipt["sha256"]))
    except OSError as error:
        raise CheckpointError(_reason(error, path, 0)) from error
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path} is damaged: {error!r}") from error


def _reason(error: Exception, path: Path, needed: int) -> str:
    """What went wrong, with the room that is left."""
    text = f"{path}: {error if isinstance(error, CheckpointError) else repr(error)}"
    if isinstance(error, OSError) and error.errno is not None:
        text = f"{path}: {os.strerror(error.errno)}"
    with suppress(OSError):
        free = shutil.disk_usage(path.parent).free
        text += f" ({readable(needed)} needed here, {readable(free)} free)" if needed else ""
    return text


def readable(num_bytes: int) -> str:
    """Bytes in the unit that people use."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20)):
        if num_bytes >= size:
            return f"{num_bytes / size:.1f} {unit}"
    return f"{num_bytes} bytes"
