"""Transfers between real gloo processes: Megatron layouts to vLLM layouts."""

import torch
import torch.distributed as dist
from layouts import assert_equal, materialise, model, random_checkpoint
from ranks import run_ranks

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.weights import schedule as schedules
from osft_mcore.weights.execute import TransferReport, execute
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.params import hf_layouts, megatron_layouts, vllm_layouts
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.schedule import make_schedule
from osft_mcore.weights.transport import check_same

CPU = torch.device("cpu")
ITEM = torch.float32.itemsize


def actor_side(
    shape: ModelShape, tp: int, pp: int, ranks: list[int]
) -> dict[int, dict[str, Layout]]:
    """tp fastest, then pp; further ranks are data-parallel replicas."""
    return {
        rank: megatron_layouts(
            shape,
            tp=tp,
            tp_rank=at % tp,
            pp=pp,
            pp_rank=at // tp % pp,
            vocab_padded=128 * tp,
            transformer_engine=False,
        )
        for at, rank in enumerate(ranks)
    }


def rollout_side(shape: ModelShape, tp: int, ranks: list[int]) -> dict[int, dict[str, Layout]]:
    return {
        rank: vllm_layouts(shape, tp=tp, tp_rank=at % tp, vocab_padded=128)
        for at, rank in enumerate(ranks)
    }


def transfer(
    rank: int,
    *,
    shape: ModelShape,
    sources: Layouts,
    targets: Layouts,
    bucket_bytes: int,
    members: list[int] | None = None,
    target_dtype: torch.dtype = torch.float32,
    solo_bytes: int = schedules.SOLO_BYTES,
) -> TransferReport | None:
    """Run one transfer and hold every target against the checkpoint it should now contain."""
    schedules.SOLO_BYTES = solo_bytes
    group = dist.new_group(members) if members else dist.group.WORLD
    if members and rank not in members:
        dist.barrier()  # rank 0 keeps the rendezvous store, so it leaves last
        return None
    checkpoint = random_checkpoint(shape)
    plan = make_plan(sources, targets)
    check_same(plan.digest, group, CPU)
    schedule = make_schedule(plan, rank, dtype=torch.float32, bucket_bytes=bucket_bytes)
    source = {
        name: torch.nn.Parameter(materialise(layout, checkpoint))
        for name, layout in sources.get(rank, {}).items()
    }
    target = {
        name: torch.nn.Parameter(torch.full(layout.shape, torch.nan, dtype=target_dtype))
        for name, layout in targets.get(rank, {}).items()
    }
    report = execute(schedule, source, target, group=group)
    expected = {
        name: materialise(layout, checkpoint).to(target_dtype)
        for name, layout in targets.get(rank, {}).items()
    }
    assert_equal(target, expected)
    traffic = plan.traffic()[rank]
    assert report.bytes_sent == traffic.sent * ITEM
    assert report.bytes_received == traffic.received * ITEM
    assert report.bytes_local == traffic.local * ITEM
    assert report.peak_extra_bytes <= bucket_bytes
    dist.barrier()
    return report


def test_four_ranks_with_tensors_larger_than_the_bucket() -> None:
    shape = model("qwen2", kv_heads=2, tied=True)
    world = [0, 1, 2, 3]
    bucket = 4096
    assert shape.ffn * shape.hidden * ITEM > bucket
    spared = 0
    for tp, pp, rollout_tp in ((2, 2, 2), (2, 2, 4), (4, 1, 2), (1, 2, 4), (4, 1, 1)):
        staged, in_place = (
            run_ranks(
                transfer,
                4,
                shape=shape,
                sources=actor_side(shape, tp, pp, world),
                targets=rollout_side(shape, rollout_tp, world),
                bucket_bytes=bucket,
                solo_bytes=solo_bytes,
            )
            for solo_bytes in (bucket, 256)
        )
        for some, none in zip(staged, in_place, strict=True):
            assert (some.bytes_sent, some.bytes_received) == (none.bytes_sent, none.bytes_received)
            assert none.num_messages > some.num_messages
            assert none.peak_extra_bytes <= some.peak_extra_bytes
            spared += some.peak_extra_bytes - none.peak_extra_bytes
        reports = staged
        moved = sum(report.bytes_sent for report in reports)
        assert moved == sum(report.bytes_received for report in reports)
        # The layouts differ, so the network was used, and in more than one bucket.
        assert moved > bucket
        assert max(report.num_rounds for report in reports) > 1
    assert spared > 0


def test_two_ranks_of_every_family_there_and_back() -> None:
    for model_type in ("qwen2", "qwen3", "llama"):
        shape = model(model_type, kv_heads=1)
        actor, rollout = actor_side(shape, 2, 1, [0, 1]), rollout_side(shape, 1, [0, 1])
        for sources, targets in ((actor, rollout), (rollout, actor)):
            run_ranks(
                transfer, 2, shape=shape, sources=sources, targets=targets, bucket_bytes=20_000
            )


def test_export_to_one_rank_and_cast_on_arrival() -> None:
    shape = model("qwen3", tied=True)
    run_ranks(
        transfer,
        4,
        shape=shape,
        sources=actor_side(shape, 2, 2, [0, 1, 2, 3]),
        targets={0: hf_layouts(shape)},
        bucket_bytes=10_000,
        target_dtype=torch.bfloat16,
        solo_bytes=256,
    )


def test_a_group_of_some_ranks_and_disjoint_sides() -> None:
    """Actor on ranks 1 and 3, rollout on rank 2: plans speak of global ranks."""
    shape = model("llama")
    reports = run_ranks(
        transfer,
        4,
        shape=shape,
        sources=actor_side(shape, 2, 1, [3, 1]),
        targets=rollout_side(shape, 1, [2]),
        bucket_bytes=10_000,
        members=[1, 2, 3],
    )
    assert reports[0] is None
    assert [report.bytes_local for report in reports[1:]] == [0, 0, 0]


def refused(rank: int, *, shape: ModelShape, spoil: str) -> tuple[str, bool]:
    """One rank has a wrong parameter; what each rank reports, and if its target is untouched."""
    sources, targets = actor_side(shape, 2, 1, [0, 1]), rollout_side(shape, 1, [0, 1])
    schedule = make_schedule(
        make_plan(sources, targets), rank, dtype=torch.float32, bucket_bytes=10_000
    )
    source = {name: torch.ones(at.shape) for name, at in sources[rank].items()}
    target = {name: torch.zeros(at.shape) for name, at in targets[rank].items()}
    if rank == 1:
        match spoil:
            case "missing":
                del target["model.norm.weight"]
            case "shape":
                target["model.norm.weight"] = torch.zeros(5)
            case "unknown":
                target["model.extra.weight"] = torch.zeros(5)
            case "dtype":
                name = "decoder.final_layernorm.weight"
                source[name] = source[name].to(torch.bfloat16)
    try:
        execute(schedule, source, target, group=dist.group.WORLD)
    except WeightError as error:
        return str(error), not any(tensor.any() for tensor in target.values())
    return "no error", False


def test_a_wrong_parameter_on_one_rank_stops_all_before_anything_is_written() -> None:
    expected = {
        "missing": "rank 1: target parameter 'model.norm.weight' is missing",
        "shape": "rank 1: target parameter 'model.norm.weight' has shape (5,), its layout says "
        "(24,)",
        "unknown": "rank 1: target parameter 'model.extra.weight' has no layout: it would be left "
        "as it is",
        "dtype": "rank 1: source parameter 'decoder.final_layernorm.weight' is torch.bfloat16, "
        "planned as torch.float32",
    }
    for spoil, message in expected.items():
        found = run_ranks(refused, 2, shape=model("llama"), spoil=spoil)
        assert found == [(message, True), (message, True)]


def other_plan(rank: int, *, shape: ModelShape) -> str:
    sources = actor_side(shape, 2, 1, [0, 1])
    plan = make_plan(sources, rollout_side(shape, 1 if rank == 0 else 2, [0, 1]))
    try:
        check_same(plan.digest, dist.group.WORLD, CPU)
    except WeightError as error:
        return str(error)
    return "no error"


def test_ranks_that_planned_differently_notice() -> None:
    for message in run_ranks(other_plan, 2, shape=model("llama")):
        assert message.startswith("ranks [1] computed another reshard plan than rank 0")


def test_a_single_process_needs_no_group() -> None:
    shape = model("qwen3")
    checkpoint = random_checkpoint(shape)
    sources, targets = actor_side(shape, 1, 1, [0]), rollout_side(shape, 1, [0])
    schedule = make_schedule(make_plan(sources, targets), 0, dtype=torch.float32, bucket_bytes=1000)
    source = {name: materialise(at, checkpoint) for name, at in sources[0].items()}
    target = {name: torch.full(at.shape, torch.nan) for name, at in targets[0].items()}
    report = execute(schedule, source, target, group=None)
    assert_equal(target, {n: materialise(at, checkpoint) for n, at in targets[0].items()})
    assert (report.num_messages, report.peak_extra_bytes) == (0, 0)
