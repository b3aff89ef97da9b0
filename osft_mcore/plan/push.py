"""What a push of the weights moves, and what the engine shares with the actor."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import RunConfig
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.weight_plan import both_sides
from osft_mcore.weights.bound import missing_elements
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import hf_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Push:
    """In bytes."""

    received: int
    """Over all ranks."""
    busiest: int
    """The most that one rank receives."""
    buffers: int
    """Of a rank, while it lasts."""
    shared: tuple[int, ...]
    """By pipeline stage, the least that a rank's engine shares with its actor."""


def push_of(config: RunConfig, shape: ModelShape, topology: Topology, *, itemsize: int) -> Push:
    """Of weights of `itemsize` bytes. Raises ConfigError if sync.mode cannot be had."""
    sides = both_sides(config, shape, topology)
    sources, targets = sides.sources, sides.targets
    wanted: Mapping[int, Mapping[str, Layout]] = targets
    extra = 0
    if config.sync.mode == "reload":
        whole = hf_layouts(shape)
        wanted = dict.fromkeys(targets, whole)
        extra = max(_elements(layout) for layout in whole.values())
    missing = missing_elements(sources, wanted)
    shared = dict.fromkeys(targets, 0)
    for alias in sides.aliases:
        shared[alias.rank] += _elements(targets[alias.rank][alias.dst_param])
    buffers = config.sync.bucket_bytes if any(missing.values()) else 0
    return Push(
        received=sum(missing.values()) * itemsize,
        busiest=max(missing.values()) * itemsize,
        buffers=buffers + extra * itemsize,
        shared=tuple(
            itemsize
            * min(shared[at.rank] for at in topology.all_coordinates() if at.pp_rank == pp_rank)
            for pp_rank in range(topology.pp)
        ),
    )


def _elements(layout: Layout) -> int:
    return prod(layout.shape)
