"""How a config's weights will reach the engine, known before anything is built."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass
from itertools import product
from typing import Final

from osft_mcore.actor.megatron_layout import actor_layouts
from osft_mcore.config.divide import tensor_parallel_problems
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import RolloutConfig, RunConfig, SyncConfig, TrainConfig
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.parallel.topology import Topology
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.weights.alias import (
    Alias,
    choose_aliases,
    deliveries,
    delivery_lines,
)
from osft_mcore.weights.bound import PlanBytes, missing_elements, plan_bytes
from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.sides import check_sides

MIB = 2**20
ACTOR_TP: Final = (1, 2, 3, 4, 6, 8)
ACTOR_PP: Final = (1, 2, 3, 4)
ACTOR_VPP: Final = (1, 2)
ROLLOUT_TP: Final = (1, 2, 4, 8)


def alias_forbidden(sync: SyncConfig, rollout: RolloutConfig, train: TrainConfig) -> str:
    """Why the engine may read no memory of the actor's; empty if it may."""
    if sync.mode in ("copy", "reload"):
        return f"sync.mode={sync.mode}"
    if train.offload == "all":
        return "train.offload=all puts the actor's weights away while the engine samples"
    return "" if rollout.enforce_eager else "rollout.enforce_eager=false fixes where weights lie"


@dataclass(frozen=True, slots=True, kw_only=True)
class BothSides:
    """How actor and engine hold the weights, rank by rank, and what they share."""

    sources: Layouts
    targets: Layouts
    aliases: tuple[Alias, ...]
    forbidden: str
    """Why they may share nothing; empty if they may."""


def both_sides(config: RunConfig, shape: ModelShape, topology: Topology) -> BothSides:
    """Of a run with these options. Raises ConfigError if sync.mode cannot be had with them."""
    sources = actor_layouts(
        shape, topology, vocab_multiple=config.model.vocab_multiple, transformer_engine=False
    )
    targets = engine_layouts(shape, topology)
    forbidden = alias_forbidden(config.sync, config.rollout, config.train)
    try:
        aliases = choose_aliases(config.sync.mode, sources, targets, forbidden=forbidden)
    except WeightError as error:
        raise ConfigError(str(error).splitlines()) from error
    return BothSides(sources=sources, targets=targets, aliases=aliases, forbidden=forbidden)


def weight_lines(config: RunConfig, shape: ModelShape, topology: Topology) -> list[str]:
    """What a push will share, copy and receive, for people.

    Raises ConfigError if sync.mode cannot be had with these layouts.
    """
    sides = both_sides(config, shape, topology)
    sources, targets = sides.sources, sides.targets
    found = deliveries(sources, targets, sides.aliases, forbidden=sides.forbidden)
    lines = delivery_lines(found)
    least = missing_elements(sources, targets)
    if config.sync.mode == "reload":
        whole = hf_layouts(shape)
        streamed = missing_elements(sources, dict.fromkeys(targets, whole))
        lines += [_received("every rank gets every tensor: a push", config, streamed)]
        return [*lines, _received("without reload it would", config, least)]
    return [*lines, _received("a push", config, least)]


def _received(subject: str, config: RunConfig, elements: Mapping[int, int]) -> str:
    itemsize = 2 if config.model.dtype == "bf16" else 4
    total, largest = (n * itemsize / MIB for n in (sum(elements.values()), max(elements.values())))
    verb = "receive" if subject.endswith("would") else "receives"
    return f"{subject} {verb} {total:.1f} MiB over all ranks, {largest:.1f} MiB on the busiest"


def push_bytes(
    shape: ModelShape, topology: Topology, *, vocab_multiple: int, itemsize: int
) -> PlanBytes:
    """What one push moves, rank by rank, against the lower bound; nothing shared.

    Raises ConfigError if the sizes make no world, WeightError if the model cannot be cut so.
    """
    if min(*astuple(topology), vocab_multiple) < 1 or topology.world_size % topology.rollout_tp:
        raise ConfigError(
            f"rollout tp {topology.rollout_tp} must divide the world of tp * cp * pp * dp = "
            f"{topology.world_size} ranks, and every size must be at least 1"
        )
    sources = actor_layouts(
        shape, topology, vocab_multiple=vocab_multiple, transformer_engine=False
    )
    targets = engine_layouts(shape, topology)
    check_sides(sources, targets)
    return plan_bytes(make_plan(sources, targets), sources, targets, itemsize=itemsize)


def layout_pairs(shape: ModelShape) -> Iterator[Topology]:
    """Every pair of usual layouts that the model can have, on as few ranks as hold both."""
    for tp, pp, vpp, rollout_tp in product(ACTOR_TP, ACTOR_PP, ACTOR_VPP, ROLLOUT_TP):
        sizes = ("parallel.tp", tp), ("rollout.tp", rollout_tp)
        fits = not any(problem for at in sizes for problem in tensor_parallel_problems(*at, shape))
        if fits and pp * vpp <= shape.num_layers and (vpp == 1 or pp > 1):
            dp = rollout_tp // math.gcd(rollout_tp, tp * pp)
            yield Topology(tp=tp, pp=pp, vpp=vpp, dp=dp, rollout_tp=rollout_tp)
