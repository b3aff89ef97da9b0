"""What an evaluation found: answers, scores by data source, and how sure they are; pure."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

import numpy as np

from osft_mcore.evaluation.aggregate import Headline, headline
from osft_mcore.evaluation.measures import (
    best_at_k,
    ks_for,
    majority_score,
    pass_at_k,
    worst_at_k,
)
from osft_mcore.evaluation.outcomes import Kind, Rate, outcome_of, rates
from osft_mcore.evaluation.scorers import Grade, GradeStatus
from osft_mcore.evaluation.statistics import Interval, paired_p_value, ratio_ci, stratified_ci
from osft_mcore.records import GroundTruth

METRICS: Final = "metrics"
"""In a report: what the evaluation adds to the run's metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One graded response, as kept in the run folder."""

    data_source: str
    prompt_id: str
    sample_index: int
    text: str
    ground_truth: GroundTruth
    prediction: str
    """The final answer that the scorer saw, spelled plainly; "" if there is none."""
    num_tokens: int
    truncated: bool
    score: float
    correct: bool
    """The score is above 0."""
    status: GradeStatus
    reason: str = ""
    """Why there is no grade."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScores:
    """The answers to one data source, by problem and in the order of the samples."""

    data_source: str
    problems: tuple[tuple[Answer, ...], ...]
    num_asked: int
    """Samples a problem that were asked for. Greedy decoding draws one: the others would be it."""
    tells_format: bool = True
    """The scorer says so where it finds no final answer. One from a file gives a number only."""

    @property
    def prompt_ids(self) -> tuple[str, ...]:
        """Of the problems."""
        return tuple(answers[0].prompt_id for answers in self.problems)

    @property
    def num_samples(self) -> int:
        """Drawn a problem."""
        return len(self.problems[0])

    @property
    def answers(self) -> list[Answer]:
        """Of all problems."""
        return [answer for answers in self.problems for answer in answers]

    def pass_values(self, k: int) -> list[float]:
        """Unbiased pass@k of every problem; k <= num_asked."""
        greedy = self.num_samples < self.num_asked
        drawn = 1 if greedy else k
        return [
            pass_at_k(len(answers), sum(answer.correct for answer in answers), drawn)
            for answers in self.problems
        ]

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, mean over problems."""
        return _mean(self.pass_values(k))

    def majority_values(self) -> list[float]:
        """Of every problem: whether the answer that most samples give is correct."""
        return [
            majority_score([a.prediction for a in answers], [float(a.correct) for a in answers])
            for answers in self.problems
        ]

    def rates(self) -> dict[str, Rate]:
        """What became of the answers; evaluation/outcomes.py says what each name means."""
        kinds = [
            [Kind(outcome_of(Grade(a.score, a.status)), a.truncated) for a in answers]
            for answers in self.problems
        ]
        return rates(kinds, tells_format=self.tells_format)

    def scores(self) -> list[list[float]]:
        """By problem and sample."""
        return [[answer.score for answer in answers] for answers in self.problems]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over all held-out problems."""

    step: int
    temperature: float
    sources: tuple[SourceScores, ...]

    @property
    def answers(self) -> list[Answer]:
        """Of all sources."""
        return [answer for source in self.sources for answer in source.answers]

    @property
    def pass_at_1(self) -> float:
        """Mean over data sources of the mean over their problems; sources weigh the same."""
        return _mean([source.pass_at(1) for source in self.sources])

    @property
    def headline(self) -> Headline:
        """Pass@1, 8 and 32 over the sources, as far as there are samples for them."""
        return headline(
            {
                source.data_source: {k: source.pass_at(k) for k in ks_for(source.num_asked)}
                for source in self.sources
            }
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Pass@k of one result against another on the same problems, averaged over data sources."""

    k: int
    gain: float
    interval: Interval
    """95%, paired bootstrap over problems within each source."""
    p_value: float
    """Paired permutation test, two-sided."""


def by_problem(answers: Iterable[Answer]) -> dict[tuple[str, str], tuple[Answer, ...]]:
    """(data source, problem) -> its answers, in the order of the samples."""
    found: dict[tuple[str, str], list[Answer]] = {}
    for answer in answers:
        found.setdefault((answer.data_source, answer.prompt_id), []).append(answer)
    return {
        key: tuple(sorted(group, key=lambda answer: answer.sample_index))
        for key, group in found.items()
    }


def compare(before: Evaluation, after: Evaluation, *, k: int, seed: int) -> Comparison:
    """Raises ValueError if the two are not of the same problems, in the same order."""
    if [s.prompt_ids for s in before.sources] != [s.prompt_ids for s in after.sources]:
        raise ValueError("a gain needs two evaluations of the same problems in the same order")
    olds = [source.pass_values(k) for source in before.sources]
    news = [source.pass_values(k) for source in after.sources]
    gains = [
        [b - a for a, b in zip(old, new, strict=True)] for old, new in zip(olds, news, strict=True)
    ]
    return Comparison(
        k=k,
        gain=_mean([_mean(gain) for gain in gains]),
        interval=stratified_ci(gains, seed=seed),
        p_value=paired_p_value(olds, news, seed=seed),
    )


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """What one evaluation adds to the run's metrics."""
    values = {
        "eval/pass_at_1": evaluation.pass_at_1,
        "eval/temperature": evaluation.temperature,
    }
    for source in evaluation.sources:
        prefix, answers = f"eval/{source.data_source}", source.answers
        statuses = Counter(answer.status for answer in answers)
        lengths = [answer.num_tokens for answer in answers]
        values |= {f"{prefix}/pass@{k}": source.pass_at(k) for k in ks_for(source.num_asked)}
        values |= {
            f"{prefix}/maj@{source.num_asked}": _mean(source.majority_values()),
            f"{prefix}/response_length_mean": _mean(lengths),
            f"{prefix}/response_length_min": min(lengths),
            f"{prefix}/response_length_max": max(lengths),
            f"{prefix}/cut_off_ratio": _mean([answer.truncated for answer in answers]),
            f"{prefix}/score_mean": _mean([answer.score for answer in answers]),
            f"{prefix}/no_answer": statuses["no_answer"],
            f"{prefix}/too_large": statuses["too_large"],
            f"{prefix}/timeouts": statuses["timeout"],
            f"{prefix}/errors": statuses["error"],
        }
        # Those with a value: of no parsed answer none is correct, or wrong.
        values |= {
            f"{prefix}/{name}": rate.value
            for name, rate in source.rates().items()
            # This is pass@1.
            if name != "correct" and rate.value is not None
        }
    return values


def report(
    evaluation: Evaluation,
    *,
    dropped: Mapping[str, int],
    seed: int,
    shots: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """All figures with their intervals, JSON-able. `dropped`: over-long prompts by data source.

    `shots`: the worked examples that stood before every problem; None if there were none.
    """
    found = evaluation.headline
    return {
        "step": evaluation.step,
        "temperature": evaluation.temperature,
        "num_samples": evaluation.sources[0].num_asked,
        "shots": shots,
        "pass_at_1": _figure([source.pass_values(1) for source in evaluation.sources], seed),
        "pass@k": {
            str(k): _figure([source.pass_values(k) for source in evaluation.sources], seed)
            for k in ks_for(evaluation.sources[0].num_asked)
        },
        "headline": {f"pass@{k}": value for k, value in found.pass_at.items()}
        | {"average": found.average},
        "benchmarks": {
            source.data_source: _source_report(source, dropped.get(source.data_source, 0), seed)
            for source in evaluation.sources
        },
        # As evaluations.jsonl has them: whoever writes that may be another process.
        METRICS: metrics(evaluation),
    }


def pass_at_1_bounds(evaluation: Evaluation, seed: int) -> list[float]:
    """95% interval of `pass_at_1`, bootstrap over problems within each source."""
    return _bounds([source.pass_values(1) for source in evaluation.sources], seed)


def _source_report(source: SourceScores, num_dropped: int, seed: int) -> dict[str, Any]:
    answers, n, scores = source.answers, source.num_asked, source.scores()
    statuses = Counter(answer.status for answer in answers)
    lengths = [answer.num_tokens for answer in answers]
    drawn = ks_for(source.num_samples)

    def figure(values: Sequence[float]) -> dict[str, Any]:
        return _figure([values], seed)

    return {
        "num_problems": len(source.problems),
        "num_dropped_overlong": num_dropped,
        "num_answers": len(answers),
        "pass@k": {str(k): figure(source.pass_values(k)) for k in ks_for(n)},
        f"avg@{n}": figure([_mean(row) for row in scores]),
        f"maj@{n}": figure(source.majority_values()),
        "best@k": {str(k): _mean([best_at_k(row, k) for row in scores]) for k in drawn},
        "worst@k": {str(k): _mean([worst_at_k(row, k) for row in scores]) for k in drawn},
        "response_length": {
            "mean": _mean(lengths),
            "median": median(lengths),
            "p95": float(np.percentile(lengths, 95)),
            "min": min(lengths),
            "max": max(lengths),
        },
        "cut_off_ratio": _mean([answer.truncated for answer in answers]),
        "cut_off_ratio_ci95": _bounds(
            [[_mean([answer.truncated for answer in group]) for group in source.problems]], seed
        ),
        "outcomes": {name: _rate(rate, seed) for name, rate in source.rates().items()},
        "no_answer": statuses["no_answer"],
        "too_large": statuses["too_large"],
        "timeouts": statuses["timeout"],
        "errors": statuses["error"],
    }


def _rate(rate: Rate, seed: int) -> dict[str, Any]:
    """Both None where nothing could count."""
    ci = ratio_ci(rate.counts, rate.of, seed=seed)
    return {"value": rate.value, "ci95": None if ci is None else [ci.low, ci.high]}


def _figure(groups: Sequence[Sequence[float]], seed: int) -> dict[str, Any]:
    """The unweighted mean over groups of each group's mean."""
    return {"value": _mean([_mean(group) for group in groups]), "ci95": _bounds(groups, seed)}


def _bounds(groups: Sequence[Sequence[float]], seed: int) -> list[float]:
    interval = stratified_ci(groups, seed=seed)
    return [interval.low, interval.high]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
