"""Which rank holds which shard: pure arithmetic on the actor's and the rollout's layouts."""

from dataclasses import dataclass


def stage_layers(num_layers: int, pp: int, pp_rank: int) -> range:
    """The layers of one pipeline stage: shares as even as can be, the longer ones first.

    First, because the last stage multiplies by the vocabulary as well. Needs pp <= num_layers.
    """
    assert 0 <= pp_rank < pp <= num_layers, f"stage {pp_rank} of {pp}, {num_layers} layers"
    share, longer = divmod(num_layers, pp)
    start = pp_rank * share + min(pp_rank, longer)
    return range(start, start + share + (pp_rank < longer))


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinates:
    """One rank's place in both layouts."""

    rank: int
    tp_rank: int
    dp_rank: int
    pp_rank: int
    replica: int
    """Rollout replica; its tensor-parallel group is a run of consecutive ranks."""
    rollout_tp_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Topology:
    """Actor layout tp x dp x pp (Megatron's rank order, tp fastest) and rollout layout."""

    tp: int
    pp: int
    dp: int
    rollout_tp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp

    @property
    def num_replicas(self) -> int:
        """Number of rollout replicas."""
        return self.world_size // self.rollout_tp

    def coordinates(self, rank: int) -> Coordinates:
        """Place of global rank `rank`."""
        return Coordinates(
            rank=rank,
            tp_rank=rank % self.tp,
            dp_rank=rank // self.tp % self.dp,
            pp_rank=rank // (self.tp * self.dp),
            replica=rank // self.rollout_tp,
            rollout_tp_rank=rank % self.rollout_tp,
        )

    def all_coordinates(self) -> tuple[Coordinates, ...]:
        """Places of all ranks, by rank."""
        return tuple(self.coordinates(rank) for rank in range(self.world_size))
