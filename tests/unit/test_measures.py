"""What samples are worth together, against counting every subset."""

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osft_mcore.evaluation.measures import best_at_k, ks_for, majority_score, pass_at_k, worst_at_k


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


SCORES = st.lists(st.sampled_from([-1.0, 0.0, 0.5, 1.0]), min_size=1, max_size=7)


@given(SCORES)
def test_best_and_worst_equal_the_mean_over_all_subsets(scores: list[float]) -> None:
    for k in range(1, len(scores) + 1):
        subsets = list(combinations(scores, k))
        best = sum(map(max, subsets)) / len(subsets)
        worst = sum(map(min, subsets)) / len(subsets)
        assert best_at_k(scores, k) == pytest.approx(best, abs=1e-12)
        assert worst_at_k(scores, k) == pytest.approx(worst, abs=1e-12)


@given(st.lists(st.booleans(), min_size=1, max_size=9))
def test_the_best_of_right_and_wrong_is_pass_at_k(correct: list[bool]) -> None:
    for k in range(1, len(correct) + 1):
        expected = pass_at_k(len(correct), sum(correct), k)
        assert best_at_k([float(right) for right in correct], k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 3])
def test_a_subset_of_more_than_there_is_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match="1 <= k"):
        best_at_k([0.0, 1.0], k)


@pytest.mark.parametrize(
    ("answers", "scores", "expected"),
    [
        (["4", "5", "5"], [1, 0, 0], 0),
        (["4", "5", "4", "5"], [1, 0, 1, 0], 1),
        (["5", "4", "4", "5"], [0, 1, 1, 0], 0),
        (["", "", "7"], [0, 0, 1], 1),
        (["", ""], [0, 0], 0),
        # Written alike, graded apart (a timeout, say): the first one counts.
        (["9", "9", "8"], [0, 1, 0], 0),
    ],
)
def test_the_majority_by_hand(answers: list[str], scores: list[float], expected: float) -> None:
    assert majority_score(answers, scores) == expected
