"""What tools/prepare_data.py does: everything is checked first, then converted, then written."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_preparation.catalog import DATA_SETS, DataSet
from data_preparation.convert import Options, convert, outputs_of, split_report
from data_preparation.hub import MISSING_PACKAGE, Fetch, hub_sources
from data_preparation.rows import Columns, Problem, find_columns
from data_preparation.sources import Source, local_sources
from data_preparation.write import output_report, problem_table, write_parquet, write_report
from osft_mcore.errors import ConfigError, DataError
from osft_mcore.log.console import Console


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What was asked for on the command line."""

    names: tuple[str, ...]
    local: Path | None
    revision: str | None
    out: Path
    force: bool
    options: Options


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """One data set, ready to be written."""

    data_set: DataSet
    splits: dict[str, Any]
    """Reports."""
    outputs: dict[str, tuple[str, list[Problem]]]
    """From the name of a file to its split and its problems."""


def prepare(request: Request, console: Console, fetch: Fetch | None) -> None:
    """Prepare all data sets, or write nothing and raise with all that is wrong.

    `fetch` reads from the hub; None: the package for that is missing.
    """
    data_sets = _check(request, fetch)
    sources, problems = {}, []
    for data_set in data_sets:
        if request.local is None:
            assert fetch is not None, "_check has refused that"
            console.say(f"{data_set.name}: loading {data_set.hub} from the hub")
            found = hub_sources(data_set, request.revision, fetch)
        else:
            found = local_sources(data_set, request.local, alone=len(data_sets) == 1)
        if isinstance(found, dict):
            sources[data_set.name] = found
        else:
            place = "--from: " if request.local is not None else ""
            problems += [f"{place}{data_set.name}: {problem}" for problem in found]
    columns, misfits = _columns(data_sets, sources)
    if problems or misfits:
        raise ConfigError([*problems, *misfits])
    prepared, empty = [], []
    for data_set in data_sets:
        done = _convert(data_set, sources[data_set.name], columns[data_set.name], request.options)
        if isinstance(done, Prepared):
            prepared.append(done)
        else:
            empty += done
    if empty:
        raise DataError("\n".join(empty))
    for one in prepared:
        _write(one, request, console)


def _check(request: Request, fetch: Fetch | None) -> list[DataSet]:
    """The data sets that are asked for. Raises ConfigError with all that is wrong."""
    data_sets = [DATA_SETS[name] for name in dict.fromkeys(request.names) if name in DATA_SETS]
    problems = [_unknown(name) for name in request.names if name not in DATA_SETS]
    if request.options.validation_rows < 0:
        problems.append(
            f"--validation-rows: found {request.options.validation_rows}, expected at least 0"
        )
    if request.local is None and fetch is None:
        problems.append(MISSING_PACKAGE)
    problems += _source_problems(request, len(data_sets))
    if request.out.exists() and not request.out.is_dir():
        problems.append(f"--out: {request.out} is a file, expected a folder")
    elif not request.force:
        problems += [
            f"--out: {path} exists; name another folder, or replace it with --force"
            for data_set in data_sets
            for path in _paths(data_set, request)
            if path.exists()
        ]
    if problems:
        raise ConfigError(problems)
    return data_sets


def _unknown(name: str) -> str:
    close = difflib.get_close_matches(name, DATA_SETS, n=1)
    hint = f"did you mean {close[0]}?" if close else f"known: {', '.join(DATA_SETS)}"
    return f"unknown data set {name!r}; {hint}"


def _source_problems(request: Request, num_data_sets: int) -> list[str]:
    if request.local is None:
        several = request.revision is not None and num_data_sets > 1
        return ["--revision: is of one data set; name one at a time"] if several else []
    problems = []
    if request.revision is not None:
        problems.append("--revision: is of the hub; a local copy (--from) has none")
    if not request.local.exists():
        problems.append(f"--from: no such file or folder: {request.local}")
    elif request.local.is_file() and num_data_sets > 1:
        problems.append(f"--from: {request.local} is one file, for {num_data_sets} data sets")
    return problems


def _paths(data_set: DataSet, request: Request) -> list[Path]:
    """All that is written for a data set."""
    names = [*data_set.splits.values()]
    if data_set.validation_name is not None and request.options.validation_rows:
        names.append(data_set.validation_name)
    files = [request.out / f"{name}.parquet" for name in names]
    return [*files, request.out / f"{data_set.name}.json"]


def _columns(
    data_sets: Sequence[DataSet], sources: dict[str, dict[str, Source]]
) -> tuple[dict[str, dict[str, Columns]], list[str]]:
    """The columns to use, by data set and split; and what is missing."""
    columns: dict[str, dict[str, Columns]] = {}
    problems = []
    for data_set in data_sets:
        for split, source in sources.get(data_set.name, {}).items():
            found = find_columns(data_set, source.columns)
            if isinstance(found, Columns):
                columns.setdefault(data_set.name, {})[split] = found
            else:
                problems.append(f"{data_set.name}: split {split}: {found}")
    return columns, problems


def _convert(
    data_set: DataSet, sources: dict[str, Source], columns: dict[str, Columns], options: Options
) -> Prepared | list[str]:
    splits, outputs, problems = {}, {}, []
    for split, source in sources.items():
        converted = convert(data_set, source, columns[split], options)
        splits[split] = split_report(source, columns[split], converted)
        files = outputs_of(data_set, split, converted, options)
        if isinstance(files, str):
            problems.append(f"{data_set.name}: {files}")
        else:
            outputs |= {name: (split, problems_) for name, problems_ in files.items()}
    return problems or Prepared(data_set=data_set, splits=splits, outputs=outputs)


def _write(prepared: Prepared, request: Request, console: Console) -> None:
    data_set, written = prepared.data_set, {}
    for name, (split, problems) in prepared.outputs.items():
        table = problem_table(data_set, split, problems)
        record = write_parquet(request.out / f"{name}.parquet", table)
        written[f"{name}.parquet"] = output_report(table, record)
    report = request.out / f"{data_set.name}.json"
    write_report(
        report,
        {
            "name": data_set.name,
            "options": asdict(request.options),
            "splits": prepared.splits,
            "outputs": written,
        },
    )
    _say(prepared, written, console)
    console.say(f"written: {', '.join(str(request.out / name) for name in written)}, {report}")


def _say(prepared: Prepared, written: dict[str, dict[str, Any]], console: Console) -> None:
    rows = []
    for split, report in prepared.splits.items():
        rows.append([f"{split}: rows read", str(report["rows_read"])])
        rows += [[f"  dropped: {why}", str(count)] for why, count in report["dropped"].items()]
        if report["duplicates_with_another_answer"]:
            other = str(report["duplicates_with_another_answer"])
            rows.append(["  again, with another answer", other])
    rows += [[f"in {name}", str(report["rows"])] for name, report in written.items()]
    console.table(prepared.data_set.name, ["rows", "count"], rows)
    for split, report in prepared.splits.items():
        published = prepared.data_set.published_rows.get(split)
        if published not in (None, report["rows_read"]):
            console.say(f"{split}: {report['rows_read']} rows; as published it has {published}")
        if report["columns_left_out"]:
            console.say(f"{split}: columns left out: {', '.join(report['columns_left_out'])}")
        if files := report["source"].get("files"):
            console.say(f"{split}: read from {', '.join(file['name'] for file in files)}")
        if left_out := report["source"].get("files_left_out"):
            console.say(f"{split}: files left out: {', '.join(left_out)}")
