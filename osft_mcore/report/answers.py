"""Graded answers read back: enough of each to compare one result with another."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from osft_mcore.evaluation.results import (
    Answer,
    Comparison,
    Evaluation,
    SourceScores,
    by_problem,
    compare,
)
from osft_mcore.evaluation.statistics import Interval, stratified_ci
from osft_mcore.records import GroundTruth, ground_truth_of
from osft_mcore.report.run import Json, Run, json_rows

SEED: Final = 1
"""Of intervals and tests where a run does not name its own."""
Key = tuple[str, str, GroundTruth]
"""Data source, problem, expected answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """One result against another."""

    comparison: Comparison | None
    """None if the two are not of the same problems."""
    num_shared: int
    num_problems: int
    """Problems of either."""


def read_evaluation(run: Run, step: int, temperature: float) -> Evaluation | None:
    """The answers of one result, without their texts; None if they are not whole."""
    file = run.answers.get((step, temperature))
    answers = [] if file is None else list(_answers(file))
    if not answers or any(answer is None for answer in answers):
        return None
    groups = by_problem(a for a in answers if a is not None)
    if len(set(map(len, groups.values()))) > 1:
        return None
    by_source: dict[str, list[tuple[Answer, ...]]] = {}
    for (source, _), group in groups.items():
        by_source.setdefault(source, []).append(group)
    asked = num_asked(run, step, temperature)
    return Evaluation(
        step=step,
        temperature=temperature,
        sources=tuple(
            SourceScores(
                data_source=source,
                problems=tuple(problems),
                num_asked=asked or max(map(len, problems)),
            )
            for source, problems in by_source.items()
        ),
    )


def num_asked(run: Run, step: int, temperature: float) -> int | None:
    """Samples a problem that a result was to have; None if nothing says so."""
    found = run.results.get((step, temperature), {}).get("num_samples")
    found = run.option("evaluation.num_samples") if found is None else found
    return found if isinstance(found, int) and found > 0 else None


def seed_of(run: Run) -> int:
    """What the run draws its own intervals with."""
    seed = run.option("seed")
    return seed if isinstance(seed, int) and not isinstance(seed, bool) else SEED


def difference(before: Evaluation, after: Evaluation, *, k: int, seed: int) -> Difference:
    """Pass@k of `after` over that of `before`, if they are of the same problems."""
    old, new = _keys(before), _keys(after)
    shared = old.keys() & new.keys()
    same = len(shared) == len(old) == len(new)
    return Difference(
        comparison=compare(before, _in_order(after, before), k=k, seed=seed) if same else None,
        num_shared=len(shared),
        num_problems=len(old.keys() | new.keys()),
    )


def pass_at(evaluation: Evaluation, k: int, *, seed: int) -> tuple[float, Interval]:
    """Mean over data sources of pass@k, with its 95% interval."""
    values = [source.pass_values(k) for source in evaluation.sources]
    means = [sum(found) / len(found) for found in values]
    return sum(means) / len(means), stratified_ci(values, seed=seed)


def largest_k(evaluation: Evaluation) -> int:
    """The largest k that there is a pass@k for in every data source."""
    return min(max(source.num_asked, source.num_samples) for source in evaluation.sources)


def _answers(file: Path) -> Iterator[Answer | None]:
    for row in json_rows(file):
        yield None if row is None else _answer(row)


def _answer(row: Json) -> Answer | None:
    """Older files do not have all that an answer has."""
    try:
        return Answer(
            data_source=str(row["data_source"]),
            prompt_id=str(row["prompt_id"]),
            sample_index=int(row["sample_index"]),
            text="",
            ground_truth=ground_truth_of(row["ground_truth"]),
            prediction=str(row.get("prediction", "")),
            num_tokens=int(row["num_tokens"]),
            truncated=bool(row["truncated"]),
            score=float(row.get("score", row["correct"])),
            correct=bool(row["correct"]),
            status=row["status"],
        )
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _keys(evaluation: Evaluation) -> Mapping[Key, Any]:
    return Counter(
        (source.data_source, answers[0].prompt_id, answers[0].ground_truth)
        for source in evaluation.sources
        for answers in source.problems
    )


def _in_order(evaluation: Evaluation, like: Evaluation) -> Evaluation:
    """The same results in the order of another's problems."""
    sources = {source.data_source: source for source in evaluation.sources}
    ordered = []
    for other in like.sources:
        source = sources[other.data_source]
        problems = {answers[0].prompt_id: answers for answers in source.problems}
        ordered.append(replace(source, problems=tuple(problems[id_] for id_ in other.prompt_ids)))
    return replace(evaluation, sources=tuple(ordered))
