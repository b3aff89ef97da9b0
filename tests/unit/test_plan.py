"""Properties of plans and schedules that hold for any two layouts."""

import dataclasses
from collections import Counter, defaultdict
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import model

from osft_mcore.actor.megatron_layout import actor_layouts
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import Topology
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.train.weight_plan import layout_pairs
from osft_mcore.weights import schedule as schedules
from osft_mcore.weights.bound import missing_elements, plan_bytes
from osft_mcore.weights.layout import Interval, Layout, Layouts
from osft_mcore.weights.params import hf_layouts, megatron_layouts, vllm_layouts
from osft_mcore.weights.plan import ReshardPlan, make_plan
from osft_mcore.weights.schedule import NUM_BUFFERS, Message, RankSchedule, make_schedule
from osft_mcore.weights.sides import check_sides

ITEM = torch.float32.itemsize
settings.register_profile(
    "plans", max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("plans")


def layout_of(intervals: list[Interval], dim: int, across: int) -> Layout:
    length = sum(interval.length for interval in intervals)
    shape = (length, across) if dim == 0 else (across, length)
    return Layout(shape=shape, dim=dim, intervals=tuple(intervals))


@st.composite
def sides(draw: st.DrawFn, *, replicas: bool = True) -> tuple[Layouts, Layouts]:
    """Two arbitrary layouts of the same tensors: cut anywhere, fused anyhow, padded, replicated."""
    sizes = draw(st.lists(st.integers(1, 30), min_size=1, max_size=4))
    dim, across = draw(st.sampled_from([0, 1])), draw(st.integers(1, 3))
    both = []
    for _ in range(2):
        num_ranks = draw(st.integers(1, 4))
        params: dict[int, dict[str, list[Interval]]] = {rank: {} for rank in range(num_ranks)}
        pieces = []
        for number, size in enumerate(sizes):
            edges = draw(st.sets(st.integers(1, size), max_size=4)) | {0, size}
            bounds = sorted(edges)
            for low, high in pairwise(bounds):
                pieces.append(Interval(f"t{number}", low, high))
        pieces = draw(st.permutations(pieces))
        for piece in pieces:
            count = draw(st.integers(1, 2)) if replicas else 1
            ranks = draw(st.permutations(range(num_ranks)))[:count]
            name = draw(st.sampled_from(["a", "b"]))
            for rank in ranks:
                params[rank].setdefault(name, []).append(piece)
                if draw(st.booleans()):
                    params[rank][name].append(Interval(None, 0, draw(st.integers(1, 3))))
        both.append(
            {
                rank: {name: layout_of(rows, dim, across) for name, rows in of_rank.items()}
                for rank, of_rank in params.items()
            }
        )
    return both[0], both[1]


def labels(layout: Layout) -> list[tuple[str, int] | None]:
    """The Hugging Face (tensor, row) in each row of a parameter; None is padding."""
    return [
        None if interval.tensor is None else (interval.tensor, row)
        for interval in layout.intervals
        for row in range(interval.start, interval.stop)
    ]


Rows = dict[int, dict[str, list[tuple[str, int] | None]]]


def contents(side: Layouts) -> Rows:
    return {
        rank: {name: labels(layout) for name, layout in layouts.items()}
        for rank, layouts in side.items()
    }


def carry_out(plan: ReshardPlan, source: Rows, targets: Layouts) -> Rows:
    """Apply a plan to labelled rows; fails if a row is written twice or not at all."""
    blank = "not written"
    out = {
        rank: {name: [blank] * at.shape[at.dim] for name, at in layouts.items()}
        for rank, layouts in targets.items()
    }
    for copy in plan.copies:
        target = out[copy.dst_rank][copy.dst_param]
        rows = slice(copy.dst_start, copy.dst_start + copy.length)
        assert target[rows] == [blank] * copy.length
        values = source[copy.src_rank][copy.src_param]
        target[rows] = values[copy.src_start : copy.src_start + copy.length]
    for padding in plan.paddings:
        target = out[padding.rank][padding.param]
        rows = slice(padding.start, padding.start + padding.length)
        assert target[rows] == [blank] * padding.length
        target[rows] = [None] * padding.length
    return out


@given(sides())
def test_every_row_is_written_once_and_with_the_right_rows(both: tuple[Layouts, Layouts]) -> None:
    sources, targets = both
    plan = make_plan(sources, targets)
    assert carry_out(plan, contents(sources), targets) == contents(targets)


@given(sides())
def test_nothing_is_received_that_the_rank_holds(both: tuple[Layouts, Layouts]) -> None:
    sources, targets = both
    held, wanted = contents(sources), contents(targets)
    for rank, least in missing_elements(sources, targets).items():
        mine = {row for rows in held.get(rank, {}).values() for row in rows}
        lacking = {
            (row, layout.row_elements)
            for name, layout in targets[rank].items()
            for row in wanted[rank][name]
            if row is not None and row not in mine
        }
        assert least == sum(row_elements for _, row_elements in lacking)


@given(sides())
def test_there_and_back_is_the_identity(both: tuple[Layouts, Layouts]) -> None:
    a, b = both
    there = carry_out(make_plan(a, b), contents(a), b)
    assert carry_out(make_plan(b, a), there, a) == contents(a)


@given(sides())
def test_nothing_moves_that_its_rank_already_holds(both: tuple[Layouts, Layouts]) -> None:
    sources, targets = both
    traffic = make_plan(sources, targets).traffic()
    held = {
        rank: {row for p in params.values() for row in p}
        for rank, params in contents(sources).items()
    }
    for rank, params in contents(targets).items():
        rows = [row for p in params.values() for row in p if row is not None]
        across = next((at.row_elements for at in targets[rank].values()), 0)
        missing = sum(row not in held.get(rank, set()) for row in rows)
        assert traffic[rank].received == missing * across
        assert traffic[rank].local == (len(rows) - missing) * across
    assert sum(t.sent for t in traffic.values()) == sum(t.received for t in traffic.values())


@given(sides(), st.integers(3, 40), st.sampled_from([0, 4 * ITEM, schedules.SOLO_BYTES]))
def test_schedules_move_the_plan_within_the_cap_and_never_wait_for_each_other(
    both: tuple[Layouts, Layouts], cap: int, solo_bytes: int
) -> None:
    sources, targets = both
    plan = make_plan(sources, targets)
    ranks = plan.traffic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedules, "SOLO_BYTES", solo_bytes)
        by_rank = {
            rank: make_schedule(
                plan, rank, dtype=torch.float32, bucket_bytes=NUM_BUFFERS * cap * ITEM
            )
            for rank in ranks
        }
    for rank, schedule in by_rank.items():
        assert schedule.buffer_elements <= cap
        messages = [turn.sends for turn in schedule.rounds]
        assert all(
            len(message.pieces) == 1 or piece.num_elements * ITEM < solo_bytes
            for sends in messages
            for message in sends
            for piece in message.pieces
        )
        sent = sum(message.num_elements for sends in messages for message in sends)
        assert sent == ranks[rank].sent
        assert sum(copy.num_elements for copy in schedule.local) == ranks[rank].local
    remote = {
        (c.src_rank, c.src_param, c.src_start + i, c.dst_rank, c.dst_param, c.dst_start + i)
        for c in plan.copies
        if c.src_rank != c.dst_rank
        for i in range(c.length)
    }
    pairs = matched(by_rank)
    arrived = Counter(
        (src, one.param, one.start + i, dst, other.param, other.start + i)
        for (src, dst), matches in pairs.items()
        for _, _, sent, received in matches
        for one, other in zip(sent.pieces, received.pieces, strict=True)
        for i in range(one.length)
    )
    assert arrived == Counter(remote)
    play(by_rank, pairs)


Matches = dict[tuple[int, int], list[tuple[int, int, Message, Message]]]


def matched(schedules: dict[int, RankSchedule]) -> Matches:
    """Per (src, dst), the k-th message sent and the k-th received, and in which turns they are."""
    sends, receives = defaultdict(list), defaultdict(list)
    for rank, schedule in schedules.items():
        for at, turn in enumerate(schedule.rounds):
            for message in turn.sends:
                sends[rank, message.peer].append((at, message))
            for message in turn.receives:
                receives[message.peer, rank].append((at, message))
    pairs: Matches = defaultdict(list)
    for pair in {*sends, *receives}:
        for (at, sent), (other_at, received) in zip(sends[pair], receives[pair], strict=True):
            assert sent.num_elements == received.num_elements
            assert [(p.offset, p.length) for p in sent.pieces] == [
                (p.offset, p.length) for p in received.pieces
            ]
            pairs[pair].append((at, other_at, sent, received))
    return pairs


def play(schedules: dict[int, RankSchedule], pairs: Matches) -> None:
    """Run all ranks with unbuffered messages, a turn ending when all its messages have met."""
    waits = defaultdict(list)
    for (src, dst), matches in pairs.items():
        for at, other_at, _, _ in matches:
            waits[src, at].append((dst, other_at))
            waits[dst, other_at].append((src, at))
    at = dict.fromkeys(schedules, 0)
    running = {rank for rank, schedule in schedules.items() if schedule.rounds}
    while running:
        done = {r for r in running if all(at[peer] >= turn for peer, turn in waits[r, at[r]])}
        assert done, f"deadlock in turns {at}"
        for rank in done:
            at[rank] += 1
        running = {rank for rank in running if at[rank] < len(schedules[rank].rounds)}


def rows(tensor: str, start: int, stop: int, *, across: int = 2, dim: int = 0) -> Layout:
    return layout_of([Interval(tensor, start, stop)], dim, across)


def test_rows_that_nobody_holds_are_all_named() -> None:
    sources = {0: {"p": rows("t", 0, 4)}, 1: {"p": rows("t", 6, 8)}}
    targets = {0: {"q": rows("t", 0, 10)}, 1: {"r": rows("u", 0, 3)}}
    with pytest.raises(WeightError) as caught:
        make_plan(sources, targets)
    assert str(caught.value).splitlines() == [
        "rank 0: 'q' needs rows 4:6 of 't', which no source holds",
        "rank 0: 'q' needs rows 8:10 of 't', which no source holds",
        "rank 1: 'r' needs rows 0:3 of 'u', which no source holds",
    ]


@pytest.mark.parametrize("other", [{"dim": 1}, {"across": 3}])
def test_sides_that_cut_a_tensor_differently_are_refused(other: dict[str, int]) -> None:
    sources = {0: {"p": rows("t", 0, 2)}}
    with pytest.raises(WeightError, match=r"'t' is cut along dim 0 .* but 'q' has it"):
        make_plan(sources, {0: {"q": rows("t", 0, 2, **other)}})
    with pytest.raises(WeightError, match=r"'t' is cut along dim 0 .* but 'q' has it"):
        make_plan({**sources, 1: {"q": rows("t", 0, 2, **other)}}, {})


def test_what_one_side_lacks_or_holds_unevenly_is_named() -> None:
    sources = {0: {"p": rows("t", 0, 10)}, 1: {"p": rows("u", 0, 2)}}
    with pytest.raises(WeightError) as caught:
        check_sides(sources, {0: {"q": rows("t", 0, 7)}, 2: {"q": rows("t", 5, 9)}})
    assert str(caught.value).splitlines() == [
        "the engine's ranks hold 't' unevenly (rows 0:5 1 times, rows 5:7 2 times, rows 7:9 1 "
        "times): its layout is wrong",
        "'u' reaches no parameter of the engine",
        "'t' has 10 rows in the actor, 9 in the engine",
    ]


def test_a_layout_must_fill_its_shape() -> None:
    with pytest.raises(WeightError, match=r"shape \(3, 2\) cannot hold 4 rows along dim 0"):
        Layout(shape=(3, 2), dim=0, intervals=(Interval("t", 0, 4),))


def test_replicas_share_the_sending() -> None:
    sources = {rank: {f"p{i}": rows(f"t{i}", 0, 5) for i in range(12)} for rank in range(4)}
    targets = {rank: {f"p{i}": rows(f"t{i}", 0, 5) for i in range(12)} for rank in range(4, 10)}
    traffic = make_plan(sources, targets).traffic()
    assert {traffic[rank].sent for rank in range(4)} == {6 * 12 * 5 * 2 // 4}


def test_adjacent_rows_become_one_copy() -> None:
    gate_up = [Interval("gate", 4, 8), Interval("up", 4, 8)]
    side = {1: {"fc1": layout_of(gate_up, 0, 2)}}
    (copy,) = make_plan(side, {0: {"gate_up": layout_of(gate_up, 0, 2)}}).copies
    assert (copy.src_start, copy.dst_start, copy.length) == (0, 0, 8)


def test_the_digest_tells_plans_apart() -> None:
    def digest(stop: int, name: str = "q") -> str:
        return make_plan({0: {"p": rows("t", 0, 9)}}, {1: {name: rows("t", 0, stop)}}).digest

    assert digest(5) == digest(5)
    assert len({digest(5), digest(6), digest(5, "r")}) == 3


def test_a_row_larger_than_the_bucket_is_refused() -> None:
    plan = make_plan({0: {"p": rows("t", 0, 2, across=5)}}, {1: {"p": rows("t", 0, 2, across=5)}})
    with pytest.raises(WeightError, match=r"one row of 'p' has 5 elements.*sync\.bucket_mib"):
        make_schedule(plan, 0, dtype=torch.float32, bucket_bytes=4 * ITEM)


def big(num_heads: int, num_kv_heads: int, ffn: int, hidden: int, vocab: int) -> ModelShape:
    shape = dataclasses.replace(model("llama"), num_layers=9, head_dim=128, ffn=ffn, hidden=hidden)
    return dataclasses.replace(shape, num_heads=num_heads, num_kv_heads=num_kv_heads, vocab=vocab)


QWEN25_7B = big(28, 4, 18944, 3584, 152064)
QWEN3_8B = big(32, 8, 12288, 4096, 151936)
LLAMA3_70B = big(64, 8, 28672, 8192, 128256)


# 24 heads are shared among 3 and 6 as well, 28 not among 8.
WHOLE_SHAPES = {
    "Qwen2.5-7B": (QWEN25_7B, {1, 2, 4}),
    "Qwen3-8B": (QWEN3_8B, {1, 2, 4, 8}),
    "Llama-3-70B": (LLAMA3_70B, {1, 2, 4, 8}),
    "24 heads": (big(24, 24, 1536, 768, 50257), {1, 2, 3, 4, 6, 8}),
}


@pytest.mark.parametrize("name", WHOLE_SHAPES)
def test_the_least_bytes_move_between_all_layouts(name: str) -> None:
    shape, actor_sizes = WHOLE_SHAPES[name]
    # Uneven on 2, 3 and 4 stages and on 4 chunks, as more would be.
    shape = dataclasses.replace(shape, num_layers=5)
    pairs = list(layout_pairs(shape))
    assert {at.tp for at in pairs} == actor_sizes
    assert {at.rollout_tp for at in pairs} == actor_sizes & {1, 2, 4, 8}
    assert {at.pp for at in pairs} == {1, 2, 3, 4}
    assert {at.vpp for at in pairs} == {1, 2}
    for topology in pairs:
        sources = actor_layouts(shape, topology, vocab_multiple=128, transformer_engine=True)
        targets = engine_layouts(shape, topology)
        check_sides(sources, targets)
        moved = plan_bytes(make_plan(sources, targets), sources, targets, itemsize=2)
        assert moved.ratio == 1.0, topology
        assert all(at.received == at.least for at in moved.ranks), topology


@pytest.mark.parametrize(
    ("shape", "tp", "pp", "rollout_tp"),
    [(QWEN25_7B, 4, 2, 2), (QWEN3_8B, 2, 4, 8), (LLAMA3_70B, 8, 2, 4), (LLAMA3_70B, 4, 4, 8)],
)
def test_rounds_are_within_the_bucket_and_well_filled(
    shape: ModelShape, tp: int, pp: int, rollout_tp: int
) -> None:
    topology = Topology(tp=tp, pp=pp, dp=1, rollout_tp=rollout_tp)
    sources = actor_layouts(shape, topology, vocab_multiple=128, transformer_engine=True)
    plan = make_plan(sources, engine_layouts(shape, topology))
    bucket = 64 * 2**20
    schedule = make_schedule(plan, 1, dtype=torch.bfloat16, bucket_bytes=bucket)
    assert schedule.buffer_bytes <= bucket
    # No more rounds than twice what the busiest rank needs at the cap.
    busiest = max(t.sent + t.received for t in plan.traffic().values()) * 2
    assert len(schedule.rounds) <= 2 * NUM_BUFFERS * -(-busiest // bucket) + 1


def test_export_fills_every_tensor_from_two_stages() -> None:
    shape = model("qwen3", tied=True)
    where = [{"tp": 2, "tp_rank": t, "pp": 2, "pp_rank": p} for p in range(2) for t in range(2)]
    sources = {
        rank: megatron_layouts(shape, **at, vocab_padded=256, transformer_engine=True)
        for rank, at in enumerate(where)
    }
    targets = {0: hf_layouts(shape)}
    plan = make_plan(sources, targets)
    check_sides(sources, targets)
    assert carry_out(plan, contents(sources), targets) == contents(targets)


@given(
    pp=st.integers(1, 3),
    vpp=st.integers(1, 3),
    more=st.integers(0, 2),
    tp=st.sampled_from([1, 2]),
    rollout_tp=st.sampled_from([1, 2]),
    tied=st.booleans(),
)
@settings(max_examples=30)
def test_stages_of_chunks_reach_the_engine_and_the_file(
    pp: int, vpp: int, more: int, tp: int, rollout_tp: int, tied: bool
) -> None:
    """Layers that do not divide evenly among the chunks too, and back again."""
    shape = model("qwen3", tied=tied, num_layers=pp * vpp + more)
    where = [
        {"tp": tp, "tp_rank": t, "pp": pp, "pp_rank": p, "vpp": vpp}
        for p in range(pp)
        for t in range(tp)
    ]
    actor = {
        rank: megatron_layouts(shape, **at, vocab_padded=256, transformer_engine=False)
        for rank, at in enumerate(where)
    }
    engine = {
        rank: vllm_layouts(shape, tp=rollout_tp, tp_rank=rank, vocab_padded=128)
        for rank in range(rollout_tp)
    }
    for sources, targets in ((actor, engine), (actor, {0: hf_layouts(shape)}), (engine, actor)):
        plan = make_plan(sources, targets)
        check_sides(sources, targets)
        assert carry_out(plan, contents(sources), targets) == contents(targets)
