"""Rank arithmetic against Megatron-Core's own generator."""

from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from osft_mcore.parallel.topology import Topology, stage_layers

SIZES = st.integers(1, 6)


def topologies() -> st.SearchStrategy[Topology]:
    def with_rollout(sizes: tuple[int, int, int]) -> st.SearchStrategy[Topology]:
        tp, pp, dp = sizes
        world = tp * pp * dp
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        return st.sampled_from(divisors).map(
            lambda rollout_tp: Topology(tp=tp, pp=pp, dp=dp, rollout_tp=rollout_tp)
        )

    return st.tuples(SIZES, SIZES, SIZES).flatmap(with_rollout)


@given(topologies())
def test_groups_are_megatrons(topology: Topology) -> None:
    """Same groups in the same order, hence the same rank inside each group."""
    generator = RankGenerator(
        tp=topology.tp, ep=1, dp=topology.dp, pp=topology.pp, cp=1, order="tp-cp-ep-dp-pp"
    )
    places = topology.all_coordinates()
    groups: dict[str, dict[tuple[int, int], dict[int, int]]] = {"tp": {}, "dp": {}, "pp": {}}
    for p in places:
        groups["tp"].setdefault((p.pp_rank, p.dp_rank), {})[p.tp_rank] = p.rank
        groups["dp"].setdefault((p.pp_rank, p.tp_rank), {})[p.dp_rank] = p.rank
        groups["pp"].setdefault((p.dp_rank, p.tp_rank), {})[p.pp_rank] = p.rank
    for axis, by_group in groups.items():
        own = [[rank for _, rank in sorted(by_group[group].items())] for group in sorted(by_group)]
        assert own == generator.get_ranks(axis)


@given(topologies())
def test_every_place_is_taken_once_in_both_layouts(topology: Topology) -> None:
    places = topology.all_coordinates()
    assert [p.rank for p in places] == list(range(topology.world_size))
    actor = {(p.tp_rank, p.dp_rank, p.pp_rank) for p in places}
    rollout = {(p.replica, p.rollout_tp_rank) for p in places}
    assert len(actor) == len(rollout) == topology.world_size
    sizes = (topology.tp, topology.dp, topology.pp)
    assert all(0 <= at < size for place in actor for at, size in zip(place, sizes, strict=True))
    assert {replica for replica, _ in rollout} == set(range(topology.num_replicas))
    assert {tp_rank for _, tp_rank in rollout} == set(range(topology.rollout_tp))


@given(topologies())
def test_a_rollout_group_is_a_run_of_ranks(topology: Topology) -> None:
    """vLLM's external launcher puts its tensor-parallel ranks side by side."""
    for place in topology.all_coordinates():
        assert place.rank == place.replica * topology.rollout_tp + place.rollout_tp_rank


def test_an_example_to_check_by_eye() -> None:
    """8 ranks as tp 2, dp 2, pp 2: rank 5 is the second tensor shard of the second stage."""
    place = Topology(tp=2, pp=2, dp=2, rollout_tp=4).coordinates(5)
    assert (place.tp_rank, place.dp_rank, place.pp_rank) == (1, 0, 1)
    assert (place.replica, place.rollout_tp_rank) == (1, 1)


@given(st.integers(1, 9), st.integers(0, 40))
def test_stages_share_the_layers_in_order_and_as_evenly_as_can_be(pp: int, more: int) -> None:
    num_layers = pp + more
    stages = [stage_layers(num_layers, pp, pp_rank) for pp_rank in range(pp)]
    assert [layer for stage in stages for layer in stage] == list(range(num_layers))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1
