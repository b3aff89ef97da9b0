"""The table of what lm-evaluation-harness found, runs and steps side by side."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from osft_mcore.evaluation.harness import metric_name, row_key
from osft_mcore.report.run import Json, Run, number
from osft_mcore.report.scores import spread

MAX_COLUMNS: Final = 8
MAX_ROWS: Final = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One number."""

    value: float
    stderr: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One task and metric."""

    task: str
    metric: str
    num_fewshot: str
    better: str
    cells: list[Cell | None]
    """By column; None where it was not run, or has no number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Columns are runs and steps."""

    columns: list[str]
    lines: list[Line]
    left_out: int
    """Lines beyond MAX_ROWS."""


def harness_table(runs: Sequence[Run]) -> Table | None:
    """None if no run has such numbers. The parts of groups are left out."""
    found = [(run, step, kept) for run in runs for step, kept in run.harness.items()]
    if not found:
        return None
    shown = spread(found, MAX_COLUMNS)
    rows = [_rows(kept) for _, _, kept in shown]
    keys = list(dict.fromkeys(key for of_step in rows for key in of_step))
    lines = [_line(key, rows) for key in keys[:MAX_ROWS]]
    name_runs = len(runs) > 1
    columns = [
        f"{run.name}, step {step}" if name_runs else f"step {step}" for run, step, _ in shown
    ]
    return Table(columns=columns, lines=lines, left_out=len(keys) - len(lines))


def _rows(kept: Json) -> dict[tuple[str, str, str], Json]:
    results = kept.get("results")
    rows = [row for row in results if isinstance(row, dict)] if isinstance(results, list) else []
    return {row_key(row): row for row in rows if row.get("within") is None}


def _line(key: tuple[str, str, str], rows: Sequence[dict[tuple[str, str, str], Json]]) -> Line:
    here = [of_step.get(key) for of_step in rows]
    first = next(row for row in here if row is not None)
    shots, better = first.get("num_fewshot"), first.get("higher_is_better")
    return Line(
        task=str(first.get("task")),
        metric=metric_name(first),
        num_fewshot="" if shots is None else str(shots),
        better="higher" if better is True else "lower" if better is False else "",
        cells=[_cell(row) for row in here],
    )


def _cell(row: Json | None) -> Cell | None:
    if row is None or (value := number(row, "value")) is None:
        return None
    return Cell(value=value, stderr=number(row, "stderr"))
