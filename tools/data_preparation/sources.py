"""Rows of a local copy: parquet, jsonl, json and csv, one file or a folder of them."""

import csv
import itertools
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.catalog import DataSet
from osft_mcore.errors import DataError
from osft_mcore.files import parse_json, record_of

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
NUM_ROWS_TRIED = 100
"""Of a jsonl or json file, to know its columns."""
ROWS_AT_ONCE = 1000
REPORT_START = b'{\n  "written_by":'

ReadRow = dict[str, Any] | str
"""A row, or why it cannot be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where the rows of one split come from."""

    split: str
    columns: tuple[str, ...]
    rows: Callable[[Sequence[str]], Iterator[ReadRow]]
    """Of the columns that are named, from the start."""
    origin: dict[str, Any]
    """For the report: what identifies these bytes."""


def local_sources(data_set: DataSet, path: Path, *, alone: bool) -> dict[str, Source] | list[str]:
    """A source for every split of the data set, or what is wrong with `path`.

    `alone`: all files of the folder may be its; else only those that carry its name.
    """
    files = _files_of(data_set.name, path, alone=alone)
    if isinstance(files, str):
        return [files]
    root = path if path.is_dir() else path.parent
    by_split = _by_split(data_set, files, root)
    if isinstance(by_split, str):
        return [by_split]
    left_out = sorted(
        file.relative_to(root).as_posix()
        for file in files
        if all(file not in chosen for chosen in by_split.values())
    )
    problems: list[str] = []
    sources = {}
    for split, chosen in by_split.items():
        try:
            sources[split] = _local(split, chosen, root, left_out)
        except DataError as error:
            problems.append(str(error))
    return problems or sources


def _files_of(name: str, path: Path, *, alone: bool) -> list[Path] | str:
    """The files of one data set, in order."""
    if path.is_file():
        known = path.suffix in SUFFIXES
        return [path] if known else f"{path}: expected a file {', '.join(SUFFIXES)} or a folder"
    if not path.is_dir():
        return f"no such file or folder: {path}"
    single = [path / f"{name}{suffix}" for suffix in SUFFIXES]
    named = [file for file in single if file.is_file() and not _is_report(file)]
    if len(named) > 1:
        return f"{path} has {' and '.join(file.name for file in named)}; name one of them"
    if named:
        return named
    inside = path / name
    if not inside.is_dir() and not alone:
        return f"{path} has neither a folder {name} nor a file {name}.*"
    folder = inside if inside.is_dir() else path
    files = sorted(
        file for file in folder.rglob("*") if file.suffix in SUFFIXES and not _is_report(file)
    )
    return files or f"{folder} has no file {', '.join(SUFFIXES)}"


def _is_report(file: Path) -> bool:
    """True for what these tools leave beside their output."""
    if file.suffix != ".json":
        return False
    with file.open("rb") as stream:
        return stream.read(len(REPORT_START)) == REPORT_START


_SPLIT_WORDS = {"train": "train", "test": "test", "validation": "validation", "valid": "validation",
                "val": "validation", "dev": "validation"}  # fmt: skip


def _split_in_name(file: Path, root: Path) -> str | None:
    """The split that a file's name, or else a folder's, begins or ends with."""
    parts = [file.stem, *(part.name for part in file.relative_to(root).parents)]
    for part in parts:
        words = part.lower().replace("-", "_").replace(".", "_").split("_")
        found = [_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS]
        if found:
            return found[0]
    return None


def _by_split(data_set: DataSet, files: Sequence[Path], root: Path) -> dict[str, list[Path]] | str:
    named = {file: _split_in_name(file, root) for file in files}
    if len(data_set.splits) == 1:
        [split] = data_set.splits
        if len(files) == 1 or not any(named.values()):
            return {split: list(files)}
    chosen = {split: [file for file in files if named[file] == split] for split in data_set.splits}
    if missing := [split for split, found in chosen.items() if not found]:
        names = ", ".join(file.relative_to(root).as_posix() for file in files[:5])
        return (
            f"no file for split {' and '.join(missing)}; found {names}; expected "
            f"{' and '.join(data_set.splits)} in the names of the files"
        )
    return chosen


def _local(split: str, files: Sequence[Path], root: Path, left_out: Sequence[str]) -> Source:
    columns = dict.fromkeys(name for file in files for name in _columns(file))
    if not columns:
        raise DataError(_no_rows(files))
    records = {file.relative_to(root).as_posix(): record_of(file) for file in files}
    return Source(
        split=split,
        columns=tuple(columns),
        rows=lambda wanted: itertools.chain.from_iterable(
            read_rows(file, wanted) for file in files
        ),
        origin={
            "files": [
                {"name": name, "size": record.size, "sha256": record.sha256}
                for name, record in records.items()
            ],
            "files_left_out": list(left_out),
        },
    )


def _no_rows(files: Sequence[Path]) -> str:
    """Why files have no columns."""
    rows = [row for file in files for row in itertools.islice(read_rows(file, ()), NUM_ROWS_TRIED)]
    named = ", ".join(map(str, files[:5])) + (f" and {len(files) - 5} more" if files[5:] else "")
    if not rows:
        return f"no rows in {named}"
    found = Counter(row if isinstance(row, str) else "without columns" for row in rows)
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.items())
    return f"no row can be read in {named}; of the first: {reasons}"


def _columns(file: Path) -> list[str]:
    """Names of a file's columns. Raises DataError if it cannot be read."""
    try:
        if file.suffix == ".parquet":
            names: list[str] = pq.read_schema(file).names
            return names
        if file.suffix == ".csv":
            with file.open(encoding="utf-8", newline="") as stream:
                return list(next(_csv_reader(stream), []))
        rows = itertools.islice(read_rows(file, ()), NUM_ROWS_TRIED)
        return list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def read_rows(file: Path, wanted: Sequence[str]) -> Iterator[ReadRow]:
    """The rows of a file; of parquet only the columns `wanted` are read."""
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file, wanted)
        elif file.suffix == ".jsonl":
            with file.open("rb") as lines:
                yield from (_object(line) for line in lines if line.strip())
        elif file.suffix == ".json":
            yield from _json_rows(file)
        else:
            with file.open(encoding="utf-8", newline="") as stream:
                yield from _csv_rows(stream)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _parquet_rows(file: Path, wanted: Sequence[str]) -> Iterator[ReadRow]:
    with pq.ParquetFile(file) as parquet:
        names = [name for name in wanted if name in parquet.schema_arrow.names]
        for batch in parquet.iter_batches(batch_size=ROWS_AT_ONCE, columns=names):
            yield from batch.to_pylist()


def _object(line: bytes) -> ReadRow:
    try:
        row = parse_json(line)
    except ValueError:
        return "not JSON"
    return _whole(row)


def _json_rows(file: Path) -> Iterator[ReadRow]:
    rows = parse_json(file.read_bytes())
    if not isinstance(rows, list):
        raise ValueError(f"it holds a {type(rows).__name__}, expected a list of rows")
    yield from map(_whole, rows)


def _whole(row: object) -> ReadRow:
    if not isinstance(row, dict):
        return "not a JSON object"
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        # JSON may escape half of a pair, which is no character: no parquet file can hold it.
        return "not Unicode"
    return row


def _csv_reader(stream: Iterable[str]) -> Iterator[list[str]]:
    # Solutions are longer than the 128 KiB that a cell may have at first.
    csv.field_size_limit(sys.maxsize)
    return csv.reader(stream, strict=True)


def _csv_rows(stream: Iterable[str]) -> Iterator[ReadRow]:
    reader = _csv_reader(stream)
    header = next(reader, [])
    for cells in reader:
        if len(cells) == len(header):
            yield dict(zip(header, cells, strict=True))
        elif cells:
            yield "not as many cells as the header"
