"""Results of one run or several side by side, each against the first one."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from osft_mcore.evaluation.results import Evaluation
from osft_mcore.report.answers import (
    difference,
    largest_k,
    pass_at,
    read_evaluation,
    seed_of,
)
from osft_mcore.report.run import Run
from osft_mcore.report.scores import Figure, Result, usual_temperature


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """Pass@k over that of the reference, on the same problems."""

    gain: Figure
    p_value: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One result."""

    run: str
    what: str
    step: int
    temperature: float
    num_problems: int
    pass_at: dict[int, Figure]
    """By k, mean over benchmarks."""
    average: float
    """Of pass@1, 8 and 32, as far as there are samples."""
    gains: dict[int, Gain]
    """By k; empty for the reference and where `why_not` says why."""
    why_not: str


def compared(runs: Sequence[Run], results: Sequence[Sequence[Result]]) -> list[Row]:
    """The first result of the first run is the reference. Reads the answers of every row."""
    chosen = [
        (run, what, result)
        for run, found in zip(runs, results, strict=True)
        for what, result in _chosen(run, found)
    ]
    rows: list[Row] = []
    reference: Evaluation | None = None
    for run, what, result in chosen:
        evaluation = read_evaluation(run, result.step, result.temperature)
        rows.append(_row(run, what, result, evaluation, reference, first=not rows))
        if len(rows) == 1:
            reference = evaluation
    return rows


def _chosen(run: Run, results: Sequence[Result]) -> Iterator[tuple[str, Result]]:
    """What the run began with, that at its best temperature, and what it has come to."""
    tau = usual_temperature(run, results)
    usual = [result for result in results if result.temperature == tau]
    if not usual:
        return
    first, last = usual[0], usual[-1]
    begins = "the start" if first.step == 0 and len(usual) > 1 else "first scored"
    trained = run.phase != "evaluate" or len({result.step for result in results}) > 1
    yield (begins if trained else "the model"), first
    start = [result for result in results if result.step == first.step]
    best = max(start, key=lambda result: result.average)
    if best is not first:
        yield "the same, best temperature", best
    if last is not first:
        yield "the last step" if run.finished else "the last so far", last
        highest = max(usual[1:], key=lambda result: result.average)
        if highest is not last:
            yield "the best step", highest


def _row(
    run: Run,
    what: str,
    result: Result,
    evaluation: Evaluation | None,
    reference: Evaluation | None,
    *,
    first: bool,
) -> Row:
    figures = {1: result.pass_at_1}
    gains: dict[int, Gain] = {}
    why_not = ""
    if evaluation is None:
        why_not = "its answers are not here, or not whole"
    else:
        for k in _ks(evaluation):
            value, interval = pass_at(evaluation, k, seed=seed_of(run))
            figures[k] = Figure(value=value, low=interval.low, high=interval.high)
    if evaluation is not None and not first:
        gains, why_not = _gains(evaluation, reference, seed=seed_of(run))
    return Row(
        run=run.name,
        what=what,
        step=result.step,
        temperature=result.temperature,
        num_problems=sum(len(s.problems) for s in evaluation.sources) if evaluation else 0,
        pass_at=figures,
        average=result.average,
        gains=gains,
        why_not=why_not,
    )


def _gains(
    evaluation: Evaluation, reference: Evaluation | None, *, seed: int
) -> tuple[dict[int, Gain], str]:
    if reference is None:
        return {}, "the answers of the first row are not here, or not whole"
    gains = {}
    for k in sorted(set(_ks(evaluation)) & set(_ks(reference))):
        found = difference(reference, evaluation, k=k, seed=seed)
        if (of_k := found.comparison) is None:
            return {}, (
                f"other problems: {found.num_shared} of {found.num_problems} are those of the "
                "first row, so nothing is compared"
            )
        gain = Figure(value=of_k.gain, low=of_k.interval.low, high=of_k.interval.high)
        gains[k] = Gain(gain=gain, p_value=of_k.p_value)
    return gains, ""


def _ks(evaluation: Evaluation) -> list[int]:
    """1 and, as far as there are samples, 8 and 32; without these the largest."""
    largest = largest_k(evaluation)
    return sorted(
        {1, *(k for k in (8, 32) if k <= largest)} | ({largest} if largest < 8 else set())
    )
