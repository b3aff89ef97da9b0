"""How an optimizer batch is cut into ranks and micro-batches, and what cannot be cut."""

import math
from collections.abc import Iterator

from osft_mcore.config.divide import divides, divisors, listed, nearest
from osft_mcore.config.schema import Phase, RunConfig


def sequences_per_update(config: RunConfig, phase: Phase) -> int:
    """Sequences of one optimizer update, over all ranks."""
    answers = config.rollout.num_samples if phase == "train" else 1
    return config.train.prompts_per_update * answers


def batch_problems(config: RunConfig, phase: Phase) -> Iterator[str]:
    """One line for each; sizes below 1 are told elsewhere."""
    train = config.train
    if not divides(train.prompts_per_update, train.prompts_per_step):
        near = nearest(train.prompts_per_update, divisors(train.prompts_per_step))
        yield (
            f"train.prompts_per_update: {train.prompts_per_update} does not divide "
            f"train.prompts_per_step = {train.prompts_per_step}; nearest that do: {listed(near)}"
        )
    yield from _unequal_ranks(config, phase)
    if train.max_tokens_per_micro_batch is not None:
        yield from _budget(config, train.max_tokens_per_micro_batch)


def packs_fp32(config: RunConfig) -> str:
    """The option that packs sequences in fp32, which Transformer Engine's attention cannot do.

    Empty if none does.
    """
    if config.model.dtype != "fp32":
        return ""
    if config.parallel.cp > 1:
        return "parallel.cp"
    budget = config.train.max_tokens_per_micro_batch
    return "" if budget is None else "train.max_tokens_per_micro_batch"


def _unequal_ranks(config: RunConfig, phase: Phase) -> Iterator[str]:
    factors = _factors(config)
    answers = config.rollout.num_samples if phase == "train" else 1
    sequences, unit = sequences_per_update(config, phase), math.prod(factors.values())
    if min(sequences, answers, *factors.values()) < 1 or sequences % unit == 0:
        return
    formula = f"prompts_per_update = {sequences}"
    if phase == "train":
        formula = (
            "prompts_per_update * rollout.num_samples = "
            f"{config.train.prompts_per_update} * {answers} = {sequences}"
        )
    numbers = " * ".join(str(factor) for factor in factors.values())
    multiple = f"{' * '.join(factors)} = {numbers}" + (f" = {unit}" if len(factors) > 1 else "")
    yield (
        f"train.prompts_per_update: an update has {formula} sequences, not a multiple of "
        f"{multiple}; {_batch_advice(config, sequences, answers, unit)}"
    )


def _factors(config: RunConfig) -> dict[str, int]:
    """What the number of sequences of an update is a multiple of."""
    train, parallel = config.train, config.parallel
    factors = {"parallel.dp": parallel.dp}
    if train.max_tokens_per_micro_batch is None:
        factors["train.micro_batch_size"] = train.micro_batch_size
    if parallel.vpp > 1:
        # Megatron-Core's interleaved schedule takes micro-batches in groups of the stages.
        factors["parallel.pp (as parallel.vpp > 1)"] = parallel.pp
    return factors


def _batch_advice(config: RunConfig, sequences: int, answers: int, unit: int) -> str:
    """The nearest values of single options that make the whole batch arithmetic come out."""
    train = config.train
    step = unit // math.gcd(unit, answers)
    prompts = [n for n in divisors(train.prompts_per_step) if n % step == 0]
    if prompts:
        near = listed(nearest(train.prompts_per_update, prompts))
        advice = f"nearest train.prompts_per_update that works: {near}"
    else:
        advice = f"make train.prompts_per_step and prompts_per_update multiples of {step}"
    if train.max_tokens_per_micro_batch is not None:
        return advice
    per_sequence = unit // train.micro_batch_size
    if sequences % per_sequence == 0:
        micro = listed(nearest(train.micro_batch_size, divisors(sequences // per_sequence)))
        advice += f"; nearest train.micro_batch_size that works: {micro}"
    return advice


def _budget(config: RunConfig, budget: int) -> Iterator[str]:
    rollout, parallel = config.rollout, config.parallel
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    formula = (
        "rollout.max_prompt_tokens + max_response_tokens = "
        f"{rollout.max_prompt_tokens} + {rollout.max_response_tokens} = {longest}"
    )
    multiples = {}
    if parallel.cp > 1:
        multiples["2 * parallel.cp"] = 2 * parallel.cp
    if parallel.sequence_parallel:
        multiples["parallel.tp"] = max(parallel.tp, 1)
    multiple = math.prod(multiples.values())
    if longest % multiple:
        longest = -(-longest // multiple) * multiple
        formula += f", padded to {longest} (a multiple of {' * '.join(multiples)} = {multiple})"
    if 1 <= budget < longest:
        yield (
            f"train.max_tokens_per_micro_batch: found {budget}, but a sequence may have {formula} "
            f"tokens; set it to {longest} or more, or lower one of these"
        )
    if config.algorithm.normalization == "per_microbatch":
        yield (
            "algorithm.normalization: per_microbatch depends on which sequences share a "
            "micro-batch, which train.max_tokens_per_micro_batch decides by length; set "
            "normalization to global, or use train.micro_batch_size"
        )
