"""What the actor takes on one rank, and when."""

import math
from dataclasses import dataclass, replace

from osft_mcore.actor.splitting import rows_of
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import ParallelConfig, RolloutConfig, TrainConfig
from osft_mcore.plan.activations import FP32, Activations, Layers, MicroBatch, activations
from osft_mcore.plan.stages import Stage

SHARD_ALIGNMENT = 128
"""Elements to which Megatron-Core pads a buffer where the optimizer's state is sharded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ActorMemory:
    """One rank's tensors, in bytes; what each is while it is on the device."""

    weights: int
    gradients: int
    optimizer: int
    """Adam's moments, and fp32 weights of a bf16 model."""
    activations: Activations
    step: int
    """Beside all of these, the optimizer's step."""


def actor_memory(
    shape: ModelShape, stage: Stage, layers: Layers, batch: MicroBatch, *, copies: int,
    num_micro_batches: int,
) -> ActorMemory:  # fmt: skip
    """Of a rank of `stage`. `copies`: ranks that share the optimizer's state; 1: nobody does.

    Gradients are fp32 whatever the model is.
    """
    held = _held(stage, copies)
    return ActorMemory(
        weights=held * layers.itemsize,
        gradients=held * FP32,
        optimizer=-(-held * state_bytes(layers.itemsize) // copies),
        activations=activations(shape, stage, layers, batch, num_micro_batches=num_micro_batches),
        # Clipping on a CPU multiplies into a new tensor.
        step=0 if layers.transformer_engine else -(-stage.largest * FP32 // copies),
    )


def state_bytes(itemsize: int) -> int:
    """Bytes of optimizer state for a parameter."""
    return 2 * FP32 if itemsize == FP32 else 3 * FP32


def _held(stage: Stage, copies: int) -> int:
    """Elements, with the padding of shards."""
    if copies == 1:
        return stage.parameters
    multiple = math.lcm(copies, SHARD_ALIGNMENT)
    return -(-stage.parameters // multiple) * multiple


def layers_of(
    parallel: ParallelConfig, train: TrainConfig, *, itemsize: int, transformer_engine: bool
) -> Layers:
    """What the options make of the layers."""
    return Layers(
        itemsize=itemsize,
        tp=parallel.tp,
        cp=parallel.cp,
        sequence_parallel=parallel.sequence_parallel,
        packed=rows_of(parallel, packed=train.max_tokens_per_micro_batch is not None).packed,
        recompute=train.recompute,
        recompute_loss=train.recompute_loss,
        transformer_engine=transformer_engine,
    )


def largest_micro_batch(
    parallel: ParallelConfig, train: TrainConfig, rollout: RolloutConfig
) -> MicroBatch:
    """The largest that the options allow: every prompt and every answer as long as can be."""
    prompt, response = rollout.max_prompt_tokens, rollout.max_response_tokens
    budget = train.max_tokens_per_micro_batch
    if budget is not None:
        # Prompts may be short: all of them answers. A sequence beyond the budget is alone.
        size = max(budget, prompt + response)
        batch = MicroBatch(rows=1, positions=size, responses=size)
    elif parallel.cp > 1:
        size = train.micro_batch_size
        batch = MicroBatch(rows=1, positions=size * (prompt + response), responses=size * response)
    else:
        rows = train.micro_batch_size
        batch = MicroBatch(rows=rows, positions=prompt + response, responses=rows * response)
    cp = parallel.cp
    cut = 2 * cp if cp > 1 else 1
    multiple = cut * parallel.tp if parallel.sequence_parallel else cut
    positions = -(-batch.positions // multiple) * multiple // cp
    # Of a rank's share all may be answers.
    return replace(
        batch, positions=positions, responses=min(batch.responses, batch.rows * positions)
    )
