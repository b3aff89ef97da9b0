"""Size and SHA-256 of every file of a checkpoint: what makes it whole."""

import datetime
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, Final

from osft_mcore.errors import WeightError
from osft_mcore.files import (
    FileRecord,
    flush,
    json_bytes,
    parse_json,
    record_of,
    replace_file,
    write_file,
)

MANIFEST: Final = "manifest.json"
DECISIVE: Final = ("index.json", "state.json")
"""They decide how the others are read: always hashed."""
SMALL: Final = 1 << 20
"""Bytes: so are files up to here."""


def write_manifest(
    folder: Path, files: Mapping[str, FileRecord], details: Mapping[str, Any]
) -> None:
    """Write `folder`/manifest.json; `files` by path within the folder."""
    write_file(folder / MANIFEST, [json_bytes(manifest_content(files, details))])
    flush(folder)


def manifest_content(files: Mapping[str, FileRecord], details: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest of `files` says."""
    return {
        **details,
        "written": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "files": {
            name: {"size": record.size, "sha256": record.sha256}
            for name, record in sorted(files.items())
        },
    }


def replace_member(folder: Path, name: str, content: bytes) -> None:
    """Give a file of a complete folder new content, and the manifest what is known of it now."""
    files = {**read_manifest(folder), name: replace_file(folder / name, content)}
    manifest = parse_json((folder / MANIFEST).read_bytes())
    replace_file(folder / MANIFEST, json_bytes({**manifest, "files": _entries(files)}))


def _entries(files: Mapping[str, FileRecord]) -> dict[str, Any]:
    return {
        name: {"size": record.size, "sha256": record.sha256}
        for name, record in sorted(files.items())
    }


def read_manifest(folder: Path) -> dict[str, FileRecord]:
    """The files that the manifest names. Raises WeightError if there is none, or it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        raise WeightError(f"{folder}: no {MANIFEST}, so this is not a complete checkpoint")
    try:
        return records_of(parse_json(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise WeightError(f"{path} is damaged: {error}") from error


def records_of(manifest: Any) -> dict[str, FileRecord]:
    """The files that the values of a manifest name. Raises ValueError if they are no manifest."""
    try:
        records = {
            str(name): FileRecord(int(entry["size"]), str(entry["sha256"]))
            for name, entry in manifest["files"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"it does not list files ({error!r})") from error
    for name in records:
        at = PurePosixPath(name)
        if at.is_absolute() or ".." in at.parts:
            raise ValueError(f"it names {name!r}, which is outside of the checkpoint")
    return records


def read_details(folder: Path) -> dict[str, Any]:
    """What the manifest says beside the files."""
    value = parse_json((folder / MANIFEST).read_bytes())
    return {key: value[key] for key in value if key not in ("written", "files")}


def problems_of(folder: Path, *, hashes: bool, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is not as the manifest says, one line a file; empty if the checkpoint is whole.

    `hashes` reads every file; without, a large file that was changed goes unnoticed. `share`
    (i, n) looks at every n-th file from the i-th on, so that n ranks look at all of them.
    """
    try:
        expected = read_manifest(folder)
    except WeightError as error:
        return [str(error)]
    mine = list(expected.items())[share[0] :: share[1]]
    found = (_problem(folder / name, record, hashes) for name, record in mine)
    return [problem for problem in found if problem]


def _problem(path: Path, expected: FileRecord, hashes: bool) -> str:
    if not path.is_file():
        return f"{path} is missing"
    size = path.stat().st_size
    if size != expected.size:
        return f"{path} has {size} bytes, the manifest says {expected.size}"
    decides = size <= SMALL or path.name in DECISIVE
    if (hashes or decides) and record_of(path).sha256 != expected.sha256:
        return f"{path} was changed or damaged: its SHA-256 is not the manifest's"
    return ""
