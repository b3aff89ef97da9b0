"""Bootstrap intervals against closed forms and exact enumeration."""

from itertools import product
from math import sqrt

import numpy as np
import pytest

from osft_mcore.evaluation.statistics import bootstrap_ci, paired_gain_ci, stratified_ci


def test_equals_the_exact_bootstrap_distribution_of_five_values() -> None:
    values = [0.0, 0.1, 0.35, 0.8, 1.0]
    means = [sum(draw) / 5 for draw in product(values, repeat=5)]
    interval = bootstrap_ci(values, seed=1, num_resamples=200_000, level=0.9)
    # The distribution is discrete: the bound is the atom at which the exact tail passes 5 %.
    for bound, tail in ((interval.low, 0.05), (interval.high, 0.95)):
        below = np.mean([mean < bound - 1e-9 for mean in means])
        up_to = np.mean([mean < bound + 1e-9 for mean in means])
        assert below - 0.003 <= tail <= up_to + 0.003


def test_width_approaches_the_normal_interval() -> None:
    values = np.random.default_rng(0).random(1000).tolist()
    half_width = 1.96 * float(np.std(values)) / sqrt(len(values))
    interval = bootstrap_ci(values, seed=3)
    assert interval.low == pytest.approx(np.mean(values) - half_width, abs=0.05 * half_width)
    assert interval.high == pytest.approx(np.mean(values) + half_width, abs=0.05 * half_width)


def test_same_seed_same_interval_other_seed_other_interval() -> None:
    values = np.random.default_rng(0).random(50).tolist()
    assert bootstrap_ci(values, seed=1) == bootstrap_ci(values, seed=1)
    assert bootstrap_ci(values, seed=1) != bootstrap_ci(values, seed=2)


def test_chunks_leave_the_number_of_resamples_alone() -> None:
    # 30,000 values need many chunks of rows; the interval must still cover the mean tightly.
    values = np.random.default_rng(0).random(30_000).tolist()
    interval = bootstrap_ci(values, seed=1, num_resamples=203)
    assert interval.low < np.mean(values) < interval.high
    assert interval.high - interval.low < 0.01


def test_pairing_cancels_how_hard_the_problems_are() -> None:
    before = np.random.default_rng(0).random(200).tolist()
    after = [value + 0.25 for value in before]
    interval = paired_gain_ci(before, after, seed=1)
    assert interval.low == pytest.approx(0.25, abs=1e-12)
    assert interval.high == pytest.approx(0.25, abs=1e-12)


def test_groups_weigh_the_same_whatever_their_size() -> None:
    interval = stratified_ci([[1.0] * 90, [0.0] * 10], seed=1)
    assert interval.low == interval.high == 0.5


@pytest.mark.parametrize("groups", [[], [[]], [[1.0], []]])
def test_nothing_to_resample_is_refused(groups: list[list[float]]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        stratified_ci(groups, seed=1)


def test_unpaired_results_are_refused() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_gain_ci([0.0, 1.0], [1.0], seed=1)
