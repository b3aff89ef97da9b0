"""What the samples of one problem are worth together; pure."""

from collections import Counter
from collections.abc import Sequence
from math import comb


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that at least one of k samples, drawn without replacement, is correct.

    1 - C(n - c, k) / C(n, k), unbiased from n samples (Chen et al. 2021, arXiv:2107.03374).
    """
    if not 0 <= num_correct <= num_samples or not 1 <= k <= num_samples:
        raise ValueError(
            f"pass@k needs 0 <= num_correct <= num_samples and 1 <= k <= num_samples, "
            f"got {num_samples=}, {num_correct=}, {k=}"
        )
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def ks_for(num_samples: int) -> tuple[int, ...]:
    """The k to report for n samples: 1, 2, 4, ... up to n, and n itself."""
    powers = {1 << exponent for exponent in range(num_samples.bit_length())}
    return tuple(sorted(powers | {num_samples}))


def best_at_k(scores: Sequence[float], k: int) -> float:
    """Mean, over all subsets of k samples, of the highest score in it.

    sum_i s_(i) C(i - 1, k - 1) / C(n, k) over the scores in ascending order, i from 1: the i-th is
    the highest of so many subsets. Of scores 0 and 1 this is pass@k.
    """
    if not 1 <= k <= len(scores):
        raise ValueError(f"needs 1 <= k <= number of scores, got {k=} of {len(scores)}")
    total = sum(score * comb(i, k - 1) for i, score in enumerate(sorted(scores)))
    return total / comb(len(scores), k)


def worst_at_k(scores: Sequence[float], k: int) -> float:
    """Mean, over all subsets of k samples, of the lowest score in it."""
    return -best_at_k([-score for score in scores], k)


def majority_score(answers: Sequence[str], scores: Sequence[float]) -> float:
    """Score of the answer that most samples give; of several, of the one that came first.

    `answers`: final answers, in the order of `scores`; "" for a sample without one, which has no
    vote. Of samples that agree, the first one's score. 0 if no sample has an answer.
    """
    votes = Counter(answer for answer in answers if answer)
    if not votes:
        return 0.0
    # Counter keeps the order of first appearance, and so does most_common among equals.
    return scores[list(answers).index(votes.most_common(1)[0][0])]
