"""Parquet files and the reports beside them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_preparation.catalog import DataSet
from data_preparation.rows import Problem
from osft_mcore import __version__
from osft_mcore.files import FileRecord, flush, json_bytes, record_of, rename, replace_file
from osft_mcore.records import listed

_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_PROBLEM = {
    "prompt": _MESSAGES,
    "data_source": pa.string(),
    "ability": pa.string(),
    "reward_model": pa.struct({"ground_truth": pa.string(), "style": pa.string()}),
    "id": pa.string(),
    "extra_info": pa.struct({"split": pa.string(), "index": pa.int64()}),
}
_TRACE = {"prompt": pa.string(), "response": pa.string(), "id": pa.string()}
ID_CHARS = 16
"""Of an id that is made of the question's digest."""


def problem_table(data_set: DataSet, split: str, problems: Sequence[Problem]) -> pa.Table:
    """The problems of one file. Ids that are not all there and distinct are made of questions."""
    given = {problem.given_id for problem in problems}
    use_given = None not in given and len(given) == len(problems)
    schema = dict(_PROBLEM)
    several = any(not isinstance(problem.ground_truth, str) for problem in problems)
    if several:
        schema["reward_model"] = pa.struct(
            {"ground_truth": pa.list_(pa.string()), "style": pa.string()}
        )
    if any(problem.response is not None for problem in problems):
        schema["response"] = pa.string()
    rows = [
        {
            "prompt": [{"role": m.role, "content": m.content} for m in problem.messages],
            "data_source": data_set.data_source,
            "ability": data_set.ability,
            "reward_model": {
                "ground_truth": listed(problem.ground_truth) if several else problem.ground_truth,
                "style": data_set.style,
            },
            "id": problem.given_id if use_given else problem.key[:ID_CHARS],
            "extra_info": {"split": split, "index": problem.index},
            "response": problem.response,
        }
        for problem in problems
    ]
    return pa.Table.from_pylist(rows, schema=pa.schema(schema))


def trace_table(rows: Sequence[Mapping[str, str | None]]) -> pa.Table:
    """Pairs of prompt and response."""
    return pa.Table.from_pylist(list(rows), schema=pa.schema(_TRACE))


def write_parquet(path: Path, table: pa.Table) -> FileRecord:
    """In one step: what has the name is complete. Equal tables make equal bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    pq.write_table(table, temporary, compression="zstd")
    flush(temporary)
    rename(temporary, path)
    return record_of(path)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """The report, as JSON; it begins as sources.REPORT_START says."""
    replace_file(path, json_bytes({"written_by": f"osft-mcore {__version__}", **report}))


def output_report(table: pa.Table, record: FileRecord) -> dict[str, Any]:
    """What a file that was written holds."""
    return {"rows": table.num_rows, "size": record.size, "sha256": record.sha256}
