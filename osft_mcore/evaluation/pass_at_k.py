"""Unbiased pass@k."""

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
