"""From the rows of a data set to the problems that are kept, and what became of the others."""

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from data_preparation.catalog import DataSet
from data_preparation.rows import Columns, Problem, Unusable, to_problem
from data_preparation.sources import Source


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What changes the output."""

    system: str
    suffix: str
    validation_rows: int
    seed: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Converted:
    """One split."""

    problems: tuple[Problem, ...]
    num_read: int
    dropped: Counter[str]
    """Rows by reason."""
    num_other_answer: int
    """Of the dropped duplicates, those with another answer than the one that is kept."""
    rows_sha256: str
    """Of what was read, in the columns that are used."""


DUPLICATE = "the prompt again"


def convert(data_set: DataSet, source: Source, columns: Columns, options: Options) -> Converted:
    """All problems of a split, in its order; of equal questions the first.

    Raises DataError if the source breaks off.
    """
    problems: list[Problem] = []
    # What 1.8 million rows were is remembered by digest, not by text.
    seen: dict[str, str] = {}
    dropped: Counter[str] = Counter()
    digest = hashlib.sha256()
    num_read = num_other_answer = 0
    for index, row in enumerate(source.rows(columns.used)):
        num_read += 1
        used = {name: row.get(name) for name in columns.used} if isinstance(row, dict) else row
        digest.update(json.dumps(used, default=str).encode() + b"\n")
        try:
            if isinstance(row, str):
                raise Unusable(row)
            problem = to_problem(
                data_set, columns, row, index, system=options.system, suffix=options.suffix
            )
            if problem.key in seen:
                num_other_answer += seen[problem.key] != problem.ground_truth
                raise Unusable(DUPLICATE)
        except Unusable as reason:
            dropped[str(reason)] += 1
            continue
        seen[problem.key] = problem.ground_truth
        problems.append(problem)
    return Converted(
        problems=tuple(problems),
        num_read=num_read,
        dropped=dropped,
        num_other_answer=num_other_answer,
        rows_sha256=digest.hexdigest(),
    )


def draw(problems: Sequence[Problem], count: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The problems that are left, and the `count` drawn ones, both in their order.

    Drawn are those whose digest with the seed is least: no library's generator decides, and a row
    more or less changes the draw by at most one problem.
    """

    def ticket(problem: Problem) -> str:
        return hashlib.sha256(f"{seed}:{problem.key}".encode()).hexdigest()

    drawn = {problem.key for problem in sorted(problems, key=ticket)[:count]}
    return (
        [problem for problem in problems if problem.key not in drawn],
        [problem for problem in problems if problem.key in drawn],
    )


def outputs_of(
    data_set: DataSet, split: str, converted: Converted, options: Options
) -> dict[str, list[Problem]] | str:
    """The problems of every file made of a split, or why there would be an empty one."""
    file = data_set.splits[split]
    problems = list(converted.problems)
    if not problems:
        reasons = ", ".join(f"{count} {reason}" for reason, count in converted.dropped.items())
        return f"split {split}: none of {converted.num_read} rows is left ({reasons or 'no rows'})"
    if split != "train" or data_set.validation_name is None or not options.validation_rows:
        return {file: problems}
    if options.validation_rows >= len(problems):
        return (
            f"--validation-rows: {options.validation_rows} of {len(problems)} rows would leave "
            f"nothing to train on; expected less"
        )
    train, validation = draw(problems, options.validation_rows, options.seed)
    return {file: train, data_set.validation_name: validation}


def split_report(source: Source, columns: Columns, converted: Converted) -> dict[str, Any]:
    """What became of a split, for the report."""
    return {
        "source": source.origin,
        "columns_used": [name for name in columns.used if name in source.columns],
        "columns_left_out": list(columns.others),
        "rows_sha256": converted.rows_sha256,
        "rows_read": converted.num_read,
        "kept": len(converted.problems),
        "dropped": dict(sorted(converted.dropped.items())),
        "duplicates": converted.dropped[DUPLICATE],
        "duplicates_with_another_answer": converted.num_other_answer,
    }
