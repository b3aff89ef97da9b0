"""Rank arithmetic against Megatron-Core's own generator."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st
from megatron.core.parallel_state import RankGenerator

from osft_mcore.parallel.topology import Topology, chunk_layers, layer_parts

SIZES = st.integers(1, 6)


def topologies() -> st.SearchStrategy[Topology]:
    def with_rollout(sizes: tuple[int, int, int, int]) -> st.SearchStrategy[Topology]:
        tp, cp, pp, dp = sizes
        world = tp * cp * pp * dp
        divisors = [n for n in range(1, world + 1) if world % n == 0]
        return st.sampled_from(divisors).map(
            lambda rollout_tp: Topology(tp=tp, cp=cp, pp=pp, dp=dp, rollout_tp=rollout_tp)
        )

    return st.tuples(SIZES, st.integers(1, 3), SIZES, SIZES).flatmap(with_rollout)


@given(topologies())
def test_groups_are_megatrons(topology: Topology) -> None:
    """Same groups in the same order, hence the same rank inside each group."""
    generator = RankGenerator(
        tp=topology.tp,
        cp=topology.cp,
        ep=1,
        dp=topology.dp,
        pp=topology.pp,
        order="tp-cp-ep-dp-pp",
    )
    places = topology.all_coordinates()
    groups: dict[str, dict[tuple[int, ...], dict[int, int]]] = {
        "tp": {}, "cp": {}, "dp": {}, "cp-dp": {}, "pp": {},
    }  # fmt: skip
    for p in places:
        groups["tp"].setdefault((p.pp_rank, p.dp_rank, p.cp_rank), {})[p.tp_rank] = p.rank
        groups["cp"].setdefault((p.pp_rank, p.dp_rank, p.tp_rank), {})[p.cp_rank] = p.rank
        groups["dp"].setdefault((p.pp_rank, p.cp_rank, p.tp_rank), {})[p.dp_rank] = p.rank
        groups["cp-dp"].setdefault((p.pp_rank, p.tp_rank), {})[p.copy] = p.rank
        groups["pp"].setdefault((p.dp_rank, p.cp_rank, p.tp_rank), {})[p.pp_rank] = p.rank
    for axis, by_group in groups.items():
        own = [[rank for _, rank in sorted(by_group[group].items())] for group in sorted(by_group)]
        assert own == generator.get_ranks(axis)


@given(topologies())
def test_every_place_is_taken_once_in_both_layouts(topology: Topology) -> None:
    places = topology.all_coordinates()
    assert [p.rank for p in places] == list(range(topology.world_size))
    actor = {(p.tp_rank, p.cp_rank, p.dp_rank, p.pp_rank) for p in places}
    rollout = {(p.replica, p.rollout_tp_rank) for p in places}
    assert len(actor) == len(rollout) == topology.world_size
    sizes = (topology.tp, topology.cp, topology.dp, topology.pp)
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


def test_an_example_of_cut_sequences_to_check_by_eye() -> None:
    """8 ranks as tp 2, cp 2, dp 2: rank 5 begins the second batch share's first sequence half."""
    topology = Topology(tp=2, cp=2, pp=1, dp=2)
    place = topology.coordinates(5)
    assert (place.tp_rank, place.cp_rank, place.dp_rank, place.copy) == (1, 0, 1, 2)
    assert (topology.world_size, topology.copies) == (8, 4)


def test_chunks_leave_every_rank_in_its_place() -> None:
    topology = Topology(tp=2, pp=3, dp=2, rollout_tp=4)
    chunked = dataclasses.replace(topology, vpp=5)
    assert chunked.all_coordinates() == topology.all_coordinates()
    assert chunked.world_size == topology.world_size


@given(st.integers(1, 9), st.integers(0, 40))
def test_parts_share_the_layers_in_order_and_as_evenly_as_can_be(num: int, more: int) -> None:
    parts = layer_parts(num + more, num)
    assert [layer for part in parts for layer in part] == list(range(num + more))
    sizes = [len(part) for part in parts]
    assert sizes == sorted(sizes, reverse=True)
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 9))
def test_an_activation_meets_the_layers_in_order(pp: int, vpp: int, more: int) -> None:
    """It passes all stages for the first chunk, then all of them again for the next."""
    num_layers = pp * vpp + more
    held = [chunk_layers(num_layers, pp=pp, vpp=vpp, pp_rank=stage) for stage in range(pp)]
    assert [len(chunks) for chunks in held] == [vpp] * pp
    met = [layer for chunk in range(vpp) for stage in range(pp) for layer in held[stage][chunk]]
    assert met == list(range(num_layers))


def test_an_example_of_chunks_to_check_by_eye() -> None:
    """Nine layers on two stages of two chunks: parts 0 1 2, 3 4, 5 6, 7 8."""
    assert chunk_layers(9, pp=2, vpp=2, pp_rank=0) == (range(0, 3), range(5, 7))
    assert chunk_layers(9, pp=2, vpp=2, pp_rank=1) == (range(3, 5), range(7, 9))
