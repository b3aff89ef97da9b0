"""What lies in a GPU's memory at the moments of a step that need most."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from osft_mcore.config.schema import Offload
from osft_mcore.plan.actor_memory import ActorMemory
from osft_mcore.plan.assumptions import FRAGMENTATION, GIB, OVERHEAD_GIB
from osft_mcore.plan.engine_memory import EngineMemory


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One rank's memory, in bytes."""

    name: str
    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Kept for the backward pass, one layer's own, and what the optimizer's step needs beside."""
    loss: int = 0
    buckets: int = 0
    reference: int = 0
    engine_weights: int = 0
    engine_activations: int = 0
    kv_cache: int = 0
    overhead: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, part) for part in PARTS)


PARTS = tuple(name for name in Moment.__slots__ if name != "name")


def moments(
    actor: ActorMemory,
    engine: EngineMemory | None,
    *,
    offload: Offload,
    shared: int,
    buffers: int,
    reference: int,
) -> Iterator[Moment]:
    """Of one rank, in the order of a step; without an engine those of an update alone.

    `shared`: bytes of the engine's weights that are the actor's; `buffers` of a push; `reference`:
    the reference model's weights, 0 without one.
    """
    idle = Moment(
        name="idle",
        weights=actor.weights,
        gradients=0 if offload != "none" else actor.gradients,
        optimizer=0 if offload != "none" else actor.optimizer,
        overhead=int(OVERHEAD_GIB * GIB),
    )
    if engine is not None:
        idle = replace(
            idle,
            engine_weights=engine.weights,
            kv_cache=engine.kv_cache,
            overhead=idle.overhead + engine.overhead + engine.graphs,
        )
        used = engine.activations
        # Its own copy of all weights; the actor's have not left yet, whatever train.offload says.
        yield replace(idle, name="engine starts", engine_activations=used)
        idle = replace(idle, engine_weights=engine.weights - shared)
        weights = 0 if offload == "all" else actor.weights
        yield replace(idle, name="sampling", weights=weights, engine_activations=used)
    yield from _of_update(replace(idle, gradients=actor.gradients), actor, reference)
    if engine is not None:
        yield replace(idle, name="push", buckets=buffers)


def _of_update(idle: Moment, actor: ActorMemory, reference: int) -> Iterator[Moment]:
    """`idle`: with gradient buffers."""
    inside = actor.activations
    lost = idle.overhead + int(FRAGMENTATION * inside.peak)
    if reference:
        # Nothing is kept, but a layer and the loss take what they take.
        most = max(inside.loss, inside.backward)
        yield replace(idle, name="reference", reference=reference, activations=most, overhead=lost)
    if inside.loss:
        yield replace(idle, name="loss", activations=inside.kept, loss=inside.loss, overhead=lost)
    yield replace(idle, name="backward", activations=inside.kept + inside.backward, overhead=lost)
    yield replace(idle, name="optimizer's step", optimizer=actor.optimizer, activations=actor.step)
