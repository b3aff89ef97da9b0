"""What a run writes, and what waits in the host's memory."""

from collections.abc import Iterable
from dataclasses import dataclass

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import CheckpointConfig, Offload, RunConfig
from osft_mcore.plan.actor_memory import ActorMemory, state_bytes
from osft_mcore.plan.assumptions import ID_BYTES, TEXT_BYTES
from osft_mcore.plan.speed import Lengths
from osft_mcore.plan.stages import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Disk:
    """In bytes."""

    checkpoint: int
    """All ranks' files; index and tokenizer come on top."""
    checkpoints: int
    """As many as checkpoint.keep_last, and the one that is being written."""
    export: int
    """The final model; 0 without."""


def disk(
    shape: ModelShape,
    held: Iterable[Stage],
    checkpoint: CheckpointConfig,
    *,
    tp: int,
    itemsize: int,
) -> Disk:
    """Every shard once: weights, fp32 weights of a bf16 model, Adam's moments."""
    elements = tp * sum(stage.parameters for stage in held)
    one = elements * (itemsize + state_bytes(itemsize))
    return Disk(
        checkpoint=one,
        checkpoints=one * (checkpoint.keep_last + 1),
        export=shape.num_parameters * itemsize if checkpoint.final else 0,
    )


def answer_bytes(config: RunConfig, lengths: Lengths, *, per_step: int) -> tuple[int, int]:
    """Of rollouts/ of 1000 steps, and of evaluations/ of 1000 problems; 0 without."""
    text = (lengths.prompt + lengths.response) * TEXT_BYTES
    kept = 1000 * per_step if config.logging.rollouts else 0
    scored = 1000 * config.evaluation.num_samples if config.evaluation.files else 0
    return (
        round(kept * (text + lengths.response * ID_BYTES)),
        round(scored * lengths.response * TEXT_BYTES),
    )


def host_bytes(
    actor: ActorMemory, *, offload: Offload, with_reference: bool, copies: int, sharded: bool
) -> int:
    """Of one rank: copies that train.offload keeps, the reference, and a save that is under way.

    A save reads what has left where it is, and copies the rest. Ranks that hold the same share it.
    """
    away = {"none": 0, "optimizer": actor.optimizer, "all": actor.optimizer + actor.weights}
    saved = actor.weights // copies + (actor.optimizer if sharded else actor.optimizer // copies)
    if offload == "optimizer":
        saved = actor.weights // copies
    elif offload == "all":
        saved = 0
    return away[offload] + saved + (actor.weights if with_reference else 0)
