"""Options of the objective that contradict each other, or that would be without effect."""

from collections.abc import Iterator
from typing import Final

from osft_mcore.config.schema import AlgorithmConfig

_UNSET: Final = AlgorithmConfig()


def algorithm_problems(algorithm: AlgorithmConfig, *, samples: bool) -> Iterator[str]:
    """One line for each; `samples` False: the answers are given, as in `osft sft`."""
    coef, tau = algorithm.entropy_coef, algorithm.tau_train
    if algorithm.objective == "cross_entropy" and coef != _UNSET.entropy_coef:
        yield (
            f"algorithm.entropy_coef: found {coef:g}, but algorithm.objective=cross_entropy does "
            "not use it; leave it out or set algorithm.objective=entropy"
        )
    elif coef <= 0:
        yield f"algorithm.entropy_coef: found {coef:g}, expected more than 0"
    if samples and algorithm.follow_tau_sample and tau != _UNSET.tau_train:
        yield (
            f"algorithm.tau_train: found {tau:g}, but with algorithm.follow_tau_sample=true the "
            "temperature of the loss is rollout.tau_sample; leave out one of the two"
        )
    if not samples:
        yield from _without_sampling(algorithm)


def _without_sampling(algorithm: AlgorithmConfig) -> Iterator[str]:
    if algorithm.follow_tau_sample:
        yield (
            "algorithm.follow_tau_sample: osft sft does not sample, so there is no tau_sample to "
            "follow; set it to false and algorithm.tau_train to the temperature of the loss"
        )
    if algorithm.objective == "entropy":
        yield (
            "algorithm.objective: entropy does not learn the given answers, which osft sft is for; "
            "set it to cross_entropy"
        )
