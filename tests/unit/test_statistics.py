"""Bootstrap intervals against closed forms and exact enumeration."""

from collections.abc import Sequence
from itertools import product
from math import sqrt

import numpy as np
import pytest

from osft_mcore.evaluation.statistics import (
    bootstrap_ci,
    paired_gain_ci,
    paired_p_value,
    stratified_ci,
)


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


def test_the_p_value_approaches_counting_every_choice_of_signs() -> None:
    differences = [[0.5, -0.25, 0.75, 0.5, 0.0], [0.1, 0.3, -0.2]]
    zeros = [[0.0] * len(group) for group in differences]

    def mean(groups: Sequence[Sequence[float]]) -> float:
        return float(np.mean([np.mean(group) for group in groups]))

    flipped = [
        abs(mean([[s * d for s, d in zip(first, differences[0], strict=True)],
                  [s * d for s, d in zip(second, differences[1], strict=True)]]))
        for first in product([1, -1], repeat=5) for second in product([1, -1], repeat=3)
    ]  # fmt: skip
    exact = np.mean([value >= abs(mean(differences)) - 1e-12 for value in flipped])
    found = paired_p_value(zeros, differences, seed=1, num_permutations=100_000)
    assert 0.05 < exact < 0.5
    assert found == pytest.approx(exact, abs=0.005)
    assert paired_p_value(differences, zeros, seed=1, num_permutations=100_000) == pytest.approx(
        exact, abs=0.005
    )


def test_no_difference_is_no_evidence_and_a_clear_one_is() -> None:
    same = [[0.5, 0.25, 1.0]]
    assert paired_p_value(same, same, seed=1) == 1.0
    before, after = [[0.0] * 60], [[0.5] * 60]
    # No random choice of signs reaches it: the least that 999 draws can tell.
    assert paired_p_value(before, after, seed=1, num_permutations=999) == 1 / 1000


def test_a_test_needs_pairs() -> None:
    with pytest.raises(ValueError, match="same problems twice"):
        paired_p_value([[0.0, 1.0]], [[0.0]], seed=1)
    with pytest.raises(ValueError, match="at least one group"):
        paired_p_value([], [], seed=1)
