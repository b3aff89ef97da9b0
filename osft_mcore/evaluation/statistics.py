"""How sure a mean over problems is: bootstrap intervals and a paired permutation test; pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_CHUNK_DRAWS = 2_000_000
"""Random problem indices held at once; bounds memory at 16 MB whatever the problem count."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A two-sided confidence interval."""

    low: float
    high: float


def bootstrap_ci(
    values: Sequence[float], *, seed: int, num_resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Interval of the mean of `values`, one value per problem."""
    return stratified_ci((values,), seed=seed, num_resamples=num_resamples, level=level)


def paired_gain_ci(
    before: Sequence[float],
    after: Sequence[float],
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Interval of mean(after) - mean(before), the same problems in the same order.

    Pairing resamples the per-problem differences, so that how hard a problem is cancels out.
    """
    return bootstrap_ci(
        _differences(before, after), seed=seed, num_resamples=num_resamples, level=level
    )


def stratified_ci(
    groups: Sequence[Sequence[float]],
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """Interval of the unweighted mean over groups of each group's mean.

    Problems are redrawn inside their own group: which benchmarks are averaged is no accident.
    """
    if not groups or any(len(group) == 0 for group in groups):
        raise ValueError("a bootstrap needs at least one group and one value in every group")
    if num_resamples < 1 or not 0.0 < level < 1.0:
        raise ValueError(
            f"need num_resamples >= 1 and 0 < level < 1, got {num_resamples=}, {level=}"
        )
    rng = np.random.default_rng(seed)
    means = np.mean([_resampled_means(group, rng, num_resamples) for group in groups], axis=0)
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(means, (tail, 1.0 - tail))
    return Interval(low=float(low), high=float(high))


def ratio_ci(
    numerators: Sequence[float],
    denominators: Sequence[float],
    *,
    seed: int,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval | None:
    """Interval of sum(numerators) / sum(denominators), one pair per problem.

    Problems are redrawn, each with both of its numbers. A draw whose denominators are all 0 has no
    ratio and is left out; None if no draw has one.
    """
    pairs = np.asarray([numerators, denominators], dtype=np.float64)
    rng = np.random.default_rng(seed)
    over, under = (
        np.concatenate(sums)
        for sums in zip(*_resampled_sums(pairs, rng, num_resamples), strict=True)
    )
    has_ratio = under > 0
    if not has_ratio.any():
        return None
    tail = (1.0 - level) / 2.0
    low, high = np.quantile(over[has_ratio] / under[has_ratio], (tail, 1.0 - tail))
    return Interval(low=float(low), high=float(high))


def paired_p_value(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    seed: int,
    num_permutations: int = 10_000,
) -> float:
    """Chance of a difference at least this large, either way, if before and after were alike.

    Of the mean over groups of each group's mean, problems paired. Then each problem's difference
    might as well have the other sign: (1 + permutations that reach it) / (1 + num_permutations),
    all being drawn at random (Phipson and Smyth 2010, doi:10.2202/1544-6115.1585).
    """
    rng = np.random.default_rng(seed)
    groups = [
        np.asarray(_differences(olds, news)) for olds, news in zip(before, after, strict=True)
    ]
    if not groups or any(group.size == 0 for group in groups):
        raise ValueError("a test needs at least one group and one problem in every group")
    observed = abs(np.mean([group.mean() for group in groups]))
    found = np.mean([_random_signs(group, rng, num_permutations) for group in groups], axis=0)
    # What differs by rounding alone is a tie.
    reached = np.abs(found) >= observed - 1e-12
    return float(1 + reached.sum()) / (1 + num_permutations)


def _resampled_sums(
    pairs: NDArray[np.float64], rng: np.random.Generator, num_resamples: int
) -> Iterator[NDArray[np.float64]]:
    """Sums of both rows over problems that are redrawn, in chunks [2, draws]."""
    num = pairs.shape[1]
    rows = max(1, MAX_CHUNK_DRAWS // num)
    for start in range(0, num_resamples, rows):
        drawn = rng.integers(num, size=(min(rows, num_resamples - start), num))
        yield np.stack([row[drawn].sum(1) for row in pairs])


def _random_signs(
    differences: NDArray[np.float64], rng: np.random.Generator, num: int
) -> NDArray[np.float64]:
    """Means of the differences under `num` draws of signs."""
    rows = max(1, MAX_CHUNK_DRAWS // differences.size)
    chunks = []
    for start in range(0, num, rows):
        size = (min(rows, num - start), differences.size)
        signs = 2 * rng.integers(2, size=size, dtype=np.int8) - 1
        chunks.append(signs @ differences / differences.size)
    return np.concatenate(chunks)


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    if len(before) != len(after):
        raise ValueError(
            f"a paired bootstrap needs the same problems twice, got {len(before)} and {len(after)}"
        )
    return [new - old for old, new in zip(before, after, strict=True)]


def _resampled_means(
    values: Sequence[float], rng: np.random.Generator, num_resamples: int
) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    rows = max(1, MAX_CHUNK_DRAWS // array.size)
    chunks = [
        array[rng.integers(array.size, size=(min(rows, num_resamples - start), array.size))].mean(1)
        for start in range(0, num_resamples, rows)
    ]
    return np.concatenate(chunks)
