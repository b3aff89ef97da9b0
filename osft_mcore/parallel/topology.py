"""Which rank holds which shard: pure arithmetic on the actor's and the rollout's layouts."""

from dataclasses import dataclass
from itertools import pairwise

from osft_mcore.config.phases import samples
from osft_mcore.config.schema import ParallelConfig, Phase, RunConfig


def layer_parts(num_layers: int, num_parts: int) -> tuple[range, ...]:
    """The layers in `num_parts` runs, as even as can be, the longer ones first.

    First, because the last part multiplies by the vocabulary as well. Needs one layer a part.
    """
    assert 1 <= num_parts <= num_layers, f"{num_parts} parts, {num_layers} layers"
    share, longer = divmod(num_layers, num_parts)
    starts = [part * share + min(part, longer) for part in range(num_parts + 1)]
    return tuple(range(start, stop) for start, stop in pairwise(starts))


def chunk_layers(num_layers: int, *, pp: int, vpp: int, pp_rank: int) -> tuple[range, ...]:
    """The layers of every model chunk of one pipeline stage.

    Chunk c of stage s is part c * pp + s of pp * vpp: an activation passes all stages before it
    comes back to the first for the next chunk (Megatron's interleaved order).
    """
    return layer_parts(num_layers, pp * vpp)[pp_rank::pp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """One rank's place in both layouts."""

    rank: int
    tp_rank: int
    cp_rank: int
    dp_rank: int
    pp_rank: int
    copy: int
    """Which of the ranks that hold the same weights this is."""
    replica: int
    """Rollout replica; its tensor-parallel group is a run of consecutive ranks."""
    rollout_tp_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Actor layout tp x cp x dp x pp (Megatron's rank order, tp fastest) and rollout layout."""

    tp: int
    pp: int
    dp: int
    cp: int = 1
    vpp: int = 1
    """Model chunks per pipeline stage; they share its ranks."""
    rollout_tp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.copies

    @property
    def copies(self) -> int:
        """Ranks that hold the same weights, and share the optimizer's state."""
        return self.cp * self.dp

    @property
    def micro_batch_group(self) -> int:
        """A rank's number of micro-batches is a multiple of this.

        Megatron-Core's interleaved schedule takes them in groups of the stages.
        """
        return self.pp if self.vpp > 1 else 1

    @property
    def num_replicas(self) -> int:
        """Number of rollout replicas."""
        return self.world_size // self.rollout_tp

    def coordinates(self, rank: int) -> Coordinates:
        """Place of global rank `rank`."""
        copy = rank // self.tp % self.copies
        return Coordinates(
            rank=rank,
            tp_rank=rank % self.tp,
            cp_rank=copy % self.cp,
            dp_rank=copy // self.cp,
            pp_rank=rank // (self.tp * self.copies),
            copy=copy,
            replica=rank // self.rollout_tp,
            rollout_tp_rank=rank % self.rollout_tp,
        )

    def actor_sizes(self) -> dict[str, int]:
        """The actor's layout by the names of the options."""
        return {axis: getattr(self, axis) for axis in ("tp", "cp", "pp", "vpp", "dp")}

    def all_coordinates(self) -> tuple[Coordinates, ...]:
        """Places of all ranks, by rank."""
        return tuple(self.coordinates(rank) for rank in range(self.world_size))


def run_topology(config: RunConfig, phase: Phase) -> Topology:
    """The topology that the options of a command ask for."""
    rollout_tp = config.rollout.tp if samples(phase) else 1
    return topology_of(config.parallel, rollout_tp=rollout_tp)


def topology_of(parallel: ParallelConfig, *, rollout_tp: int) -> Topology:
    """The topology of an actor and of its engines."""
    return Topology(
        tp=parallel.tp,
        cp=parallel.cp,
        pp=parallel.pp,
        dp=parallel.dp,
        vpp=parallel.vpp,
        rollout_tp=rollout_tp,
    )
