"""Options of the objective that contradict each other, or that would be without effect."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Final

from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.errors import ConfigError

_UNSET: Final = AlgorithmConfig()
_MAY_DIFFER: Final = ("max_position", "init_std")
"""Between model and reference: the one is looked at by itself, the other is of random weights."""


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
    yield from _kl_problems(algorithm)
    if not samples:
        yield from _without_sampling(algorithm)


def absent_reference(algorithm: AlgorithmConfig) -> Iterator[str]:
    """One line if the reference model's folder is not on this machine."""
    folder = algorithm.reference
    if algorithm.kl_coef > 0 and folder and not (Path(folder) / "config.json").is_file():
        yield (
            f"algorithm.reference: no config.json in {folder!r}; expected a Hugging Face model "
            "folder, or leave it out: the starting model is the reference then"
        )


def reference_problems(
    algorithm: AlgorithmConfig, shape: ModelShape, *, num_tokens: int
) -> Iterator[str]:
    """Why the reference model cannot stand beside one of `shape`; reads its config.json.

    `num_tokens`: of the longest sequence. A folder that is absent is `absent_reference`'s.
    """
    if not (algorithm.kl_coef > 0 and algorithm.reference) or any(absent_reference(algorithm)):
        return
    try:
        reference = read_model_shape(algorithm.reference)
    except ConfigError as error:
        yield from (
            f"algorithm.reference{problem.removeprefix('model.path')}" for problem in error.problems
        )
        return
    ours, theirs = asdict(shape), asdict(reference)
    for name in ours:
        if name not in _MAY_DIFFER and ours[name] != theirs[name]:
            yield (
                f"algorithm.reference: {name} is {theirs[name]}, expected {ours[name]} as in "
                "model.path; name a model of the same architecture and vocabulary"
            )
    if reference.max_position < num_tokens:
        yield (
            f"algorithm.reference: the model has {reference.max_position} positions, but rollout."
            f"max_prompt_tokens + max_response_tokens = {num_tokens}; lower one of them"
        )


def _kl_problems(algorithm: AlgorithmConfig) -> Iterator[str]:
    coef = algorithm.kl_coef
    if coef < 0:
        yield (
            f"algorithm.kl_coef: found {coef:g}, expected more than 0, or 0 for no reference model"
        )
    if coef != 0:
        return
    for name, value, unset in (
        ("kl_kind", algorithm.kl_kind, _UNSET.kl_kind),
        ("reference", algorithm.reference, _UNSET.reference),
    ):
        if value != unset:
            yield (
                f"algorithm.{name}: found {value!r}, but with algorithm.kl_coef=0 there is no "
                "reference model; leave it out or set algorithm.kl_coef"
            )


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
    if algorithm.kl_coef > 0:
        yield (
            f"algorithm.kl_coef: found {algorithm.kl_coef:g}, but osft sft does not sample, and "
            "from given answers a KL divergence cannot be estimated; set it to 0"
        )
