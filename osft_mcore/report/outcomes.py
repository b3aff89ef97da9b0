"""The table of what became of answers: right, without a final answer, wrong, ungraded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from osft_mcore.report.run import Json, Run, number
from osft_mcore.report.scores import Figure, Result, usual_temperature

COLUMNS: Final = {
    "correct": "correct",
    "format_error": "format error",
    "logic_error": "logic error",
    "ungraded": "ungraded",
    "cut_off_ratio": "cut off",
    "format_error_given_not_truncated": "format error of those not cut off",
    "correct_given_parsed": "correct of those parsed",
    "logic_error_given_parsed": "logic error of those parsed",
}
"""By the name of the figure in a result."""
MAX_ROWS: Final = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One benchmark in one result."""

    benchmark: str
    step: int
    shots: int
    """Worked examples before every problem."""
    figures: list[Figure | None]
    """In the order of COLUMNS; None where nothing could count, or nobody knows."""


def outcome_rows(run: Run, results: Sequence[Result]) -> list[Row]:
    """Of the first and the last step at the usual temperature; none of runs that kept no rates."""
    tau = usual_temperature(run, results)
    steps = sorted(result.step for result in results if result.temperature == tau)
    if tau is None:
        return []
    rows = []
    for step in dict.fromkeys((steps[0], steps[-1])):
        kept = run.results.get((step, tau), {})
        benchmarks, shots = kept.get("benchmarks"), kept.get("shots")
        count = shots.get("count") if isinstance(shots, dict) else 0
        for name, found in benchmarks.items() if isinstance(benchmarks, dict) else ():
            if isinstance(found, dict) and isinstance(outcomes := found.get("outcomes"), dict):
                cut = {"value": found.get("cut_off_ratio"), "ci95": found.get("cut_off_ratio_ci95")}
                rates = {**outcomes, "cut_off_ratio": cut}
                figures = [_figure(rates.get(column)) for column in COLUMNS]
                rows.append(
                    Row(
                        benchmark=str(name),
                        step=step,
                        shots=count if isinstance(count, int) else 0,
                        figures=figures,
                    )
                )
    return rows[:MAX_ROWS]


def _figure(kept: Json | None) -> Figure | None:
    if not isinstance(kept, dict) or (value := number(kept, "value")) is None:
        return None
    bounds = kept.get("ci95")
    if not isinstance(bounds, list) or len(bounds) != 2:
        return Figure(value=value)
    low, high = (number({"at": bound}, "at") for bound in bounds)
    if low is None or high is None:
        return Figure(value=value)
    return Figure(value=value, low=low, high=high)
