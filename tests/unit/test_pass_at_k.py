"""Unbiased pass@k against counting every subset."""

from itertools import combinations

import pytest

from osft_mcore.evaluation.pass_at_k import ks_for, pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_equals_the_share_of_subsets_with_a_correct_sample(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        samples = [index < num_correct for index in range(num_samples)]
        for k in range(1, num_samples + 1):
            subsets = [any(subset) for subset in combinations(samples, k)]
            expected = sum(subsets) / len(subsets)
            assert pass_at_k(num_samples, num_correct, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("num_correct", "expected"), [(4, 0.7045050056), (16, 0.9987764182)])
def test_known_values_for_32_samples(num_correct: int, expected: float) -> None:
    assert pass_at_k(32, num_correct, 8) == pytest.approx(expected, abs=5e-11)


@pytest.mark.parametrize("bad", [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5), (0, 0, 1)])
def test_impossible_counts_are_refused(bad: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="num_samples"):
        pass_at_k(*bad)


@pytest.mark.parametrize(
    ("num_samples", "ks"),
    [(1, (1,)), (2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8)), (33, (1, 2, 4, 8, 16, 32, 33))],
)
def test_reported_ks(num_samples: int, ks: tuple[int, ...]) -> None:
    assert ks_for(num_samples) == ks
