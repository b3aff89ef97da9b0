"""Seconds to grade the same answers: by the grader's workers, and by math-verify in-line."""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from math_verify import parse, verify

from grading_benchmark.answers import Pair, ordinary_pairs
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.scorers import Question, Sample, ScorerOptions, boxed_math


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the table shows."""

    num_answers: int
    num_workers: int
    rounds: int
    grader_s: float
    inline_s: float
    speedup: float
    """Median of the rounds' ratios."""
    share_by_spelling: float
    """Answers that no worker was asked about."""
    num_right: int
    num_right_inline: int
    num_ungraded: int


def measure(*, num_answers: int, num_workers: int, rounds: int, seed: int) -> Result:
    """Alternates the two; caches are empty and workers are running at the start of each round."""
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    pairs = ordinary_pairs(num_answers, seed)
    samples = [Sample(rf"So the answer is $\boxed{{{answer}}}$.", gold) for answer, gold in pairs]
    ours, theirs = [], []
    for _ in range(rounds):
        seconds, scores, num_ungraded = _by_grader(samples, num_workers)
        ours.append(seconds)
        seconds, verdicts = _inline(pairs)
        theirs.append(seconds)
    options = ScorerOptions(max_tokens=1, overlong_buffer_tokens=0)
    asked = sum(isinstance(boxed_math(sample, options), Question) for sample in samples)
    return Result(
        num_answers=num_answers,
        num_workers=num_workers,
        rounds=rounds,
        grader_s=median(ours),
        inline_s=median(theirs),
        speedup=median(b / a for a, b in zip(ours, theirs, strict=True)),
        share_by_spelling=1 - asked / num_answers,
        num_right=sum(scores),
        num_right_inline=sum(verdicts),
        num_ungraded=num_ungraded,
    )


def _by_grader(samples: Sequence[Sample], num_workers: int) -> tuple[float, list[bool], int]:
    with Grader(EvaluationConfig(grader_workers=num_workers), max_response_tokens=1) as grader:
        # Questions for all workers, so that they have started.
        grader.grade([Sample(rf"\boxed{{y+{n}}}", f"{n}z+y") for n in range(1, 4 * num_workers)])
        begin = time.perf_counter()
        grades = grader.grade(samples)
        seconds = time.perf_counter() - begin
    ungraded = sum(grade.status in ("timeout", "error") for grade in grades)
    return seconds, [grade.correct for grade in grades], ungraded


def _inline(pairs: Sequence[Pair]) -> tuple[float, list[bool]]:
    begin = time.perf_counter()
    verdicts = [
        bool(verify(parse(f"${gold}$"), parse(rf"So the answer is $\boxed{{{answer}}}$.")))
        for answer, gold in pairs
    ]
    return time.perf_counter() - begin, verdicts
