"""A push delivers the whole of the weights under the next version, or leaves the engine closed."""

import dataclasses
import os
import re
import signal
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from bridge import SHAPE, Bridge, actor_side, engine_side
from layouts import assert_equal, model
from ranks import run_ranks

from osft_mcore.errors import WeightError
from osft_mcore.weights import execute, schedule, stream, transport
from osft_mcore.weights.layout import Layouts
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.sync import PushReport

MODES = [
    {"mode": mode, "engine_tp": tp, "verify": verify}
    for mode, tp, verify in (
        ("copy", 1, "sample"),
        ("copy", 2, "full"),
        ("auto", 1, "full"),
        ("auto", 2, "sample"),
        ("alias", 2, "full"),
        ("reload", 1, "sample"),
        ("reload", 2, "full"),
    )
]


def push_three_times(rank: int, **options: Any) -> list[tuple[int, int]]:
    # Full proof with rows that travel in place, samples with rows in buffers.
    schedule.SOLO_BYTES = 256 if options["verify"] == "full" else schedule.SOLO_BYTES
    bridge = Bridge(rank, **options)
    assert bridge.sync.version == 0
    found = []
    for scale in (1.0, 2.0, -3.0):
        bridge.sync.close()
        bridge.train(scale)
        report = bridge.sync.push()
        assert_equal(bridge.engine.params, bridge.expected())
        assert report.version == bridge.sync.version
        found.append((report.version, report.bytes_received))
    assert bridge.engine.diary == [
        entry for version in (1, 2, 3) for entry in ("closed", f"open at {version}")
    ]
    return found


@pytest.mark.parametrize("options", MODES, ids=lambda o: "-".join(map(str, o.values())))
def test_each_push_delivers_the_weights_of_its_time_under_the_next_version(
    options: dict[str, Any],
) -> None:
    first, second = run_ranks(push_three_times, 2, **options)
    assert first == second
    assert [version for version, _ in first] == [1, 2, 3]


def report_of(rank: int, world: int, **options: Any) -> tuple[PushReport, int]:
    """The push's report, and the bytes of this rank's parameters that are not the actor's."""
    bridge = Bridge(rank, world=world, **options)
    report = bridge.sync.push()
    assert_equal(bridge.engine.params, bridge.expected())
    lent = {tensor.data_ptr() for tensor in bridge.weights.values()}
    own = [t for t in bridge.engine.params.values() if t.data_ptr() not in lent]
    return report, sum(t.numel() * t.element_size() for t in own)


def test_where_layouts_coincide_only_fused_attention_is_copied() -> None:
    # Two groups of query heads on each rank: vLLM wants another order than Megatron-Core.
    shape = model("qwen2", kv_heads=4)
    qkv = shape.num_layers * (24 + 2 * 4) * shape.head_dim * (shape.hidden + 1) * 4 // 2
    for report, own in run_ranks(report_of, 2, world=2, shape=shape, engine_tp=2, mode="alias"):
        assert report.bytes_received == report.bytes_least == 0
        assert report.bytes_local == 2 * qkv
        assert own == qkv
    # One group on each rank: the same order, nothing at all is copied.
    shape = model("qwen2", kv_heads=2)
    for report, own in run_ranks(report_of, 2, world=2, shape=shape, engine_tp=2, mode="alias"):
        assert (report.bytes_received, report.bytes_local, own) == (0, 0, 0)
        assert report.bytes_aliased > 0


def test_a_pipeline_stage_lends_what_it_has() -> None:
    """tp2 pp2 -> two replicas of tp 2: each stage aliases its own layers and receives the other."""
    for report, own in run_ranks(report_of, 4, world=4, pp=2, engine_tp=2, mode="auto"):
        assert report.ratio == 1.0
        assert report.bytes_received > 0
        assert report.bytes_aliased > 0
        assert own > 0


def refused_alias(rank: int) -> str:
    with pytest.raises(WeightError) as error:
        Bridge(rank, engine_tp=1, mode="alias")
    return str(error.value)


def test_alias_where_layouts_differ_is_refused_with_the_reasons() -> None:
    for message in run_ranks(refused_alias, 2):
        assert message.startswith("sync.mode: alias needs actor and engine to lay")
        assert (
            "model.layers.*.mlp.down_proj.weight: the engine's shards have another shape" in message
        )
        assert "norm" not in message


def missing(params: dict[str, torch.Tensor]) -> None:
    del params["model.norm.weight"]


def extra(params: dict[str, torch.Tensor]) -> None:
    params["model.extra.weight"] = torch.zeros(5)


def wrong_shape(params: dict[str, torch.Tensor]) -> None:
    params["model.norm.weight"] = torch.zeros(5)


def wrong_dtype(params: dict[str, torch.Tensor]) -> None:
    params["model.norm.weight"] = torch.zeros(24, dtype=torch.bfloat16)


def push_into_spoilt(
    rank: int, spoil: Callable[[dict[str, torch.Tensor]], None], ranks: list[int]
) -> tuple[str, int, list[str], bool]:
    """One good push, then one into a spoilt engine: error, version, diary, engine unchanged."""
    bridge = Bridge(rank)
    bridge.sync.push()
    delivered = bridge.expected()
    if rank in ranks:
        spoil(bridge.engine.params)
    bridge.train(2.0)
    error = bridge.failed_push()
    unchanged = all(
        torch.equal(tensor, delivered[name])
        for name, tensor in bridge.engine.params.items()
        if name in delivered and tensor.shape == delivered[name].shape and tensor.any()
    )
    return error, bridge.sync.version, bridge.engine.diary, unchanged


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (missing, "target parameter 'model.norm.weight' is missing"),
        (extra, "target parameter 'model.extra.weight' has no layout: it would be left as it is"),
        (
            wrong_shape,
            "target parameter 'model.norm.weight' has shape (5,), its layout says (24,)",
        ),
        (
            wrong_dtype,
            "target parameter 'model.norm.weight' is torch.bfloat16, the actor's weights are "
            "torch.float32",
        ),
    ],
    ids=["missing", "extra", "wrong_shape", "wrong_dtype"],
)
def test_an_engine_that_does_not_fit_stays_closed(spoil: Any, problem: str) -> None:
    def closed(message: str) -> tuple[str, int, list[str], bool]:
        refusal = f"refuses: weight version 2 was not delivered: {message}"
        return message, 1, ["closed", "open at 1", "closed", refusal], True

    both = f"rank 0: {problem}\nrank 1: {problem}"
    assert run_ranks(push_into_spoilt, 2, spoil=spoil, ranks=[0, 1]) == [closed(both)] * 2
    # Where one rank alone is wrong, every rank names it and the parameter.
    alone = closed(f"rank 1: {problem}")
    assert run_ranks(push_into_spoilt, 2, spoil=spoil, ranks=[1]) == [alone] * 2


def push_from_spoilt(rank: int, mode: str, spoil: str) -> str:
    """Rank 1's actor lacks a parameter, or has one too many."""
    bridge = Bridge(rank, engine_tp=2, mode=mode)
    bridge.sync.push()
    if rank == 1:
        norm = bridge.weights.pop("decoder.final_layernorm.weight")
        if spoil == "extra":
            bridge.weights |= {"decoder.final_layernorm.weight": norm, "adapter.weight": norm}
    return bridge.failed_push()


@pytest.mark.parametrize("mode", ["copy", "auto", "alias", "reload"])
@pytest.mark.parametrize("spoil", ["missing", "extra"])
def test_an_actor_that_does_not_fit_is_named_on_all_ranks(mode: str, spoil: str) -> None:
    message = {
        "missing": "rank 1: source parameter 'decoder.final_layernorm.weight' is missing",
        "extra": "rank 1: source parameter 'adapter.weight' has no layout",
    }[spoil]
    for found in run_ranks(push_from_spoilt, 2, mode=mode, spoil=spoil):
        assert found.startswith(message), found


def recover(rank: int) -> list[str]:
    """An engine that is mended is filled by the next push."""
    bridge = Bridge(rank)
    norm = bridge.engine.params.pop("model.norm.weight")
    assert "model.norm.weight" in bridge.failed_push()
    bridge.engine.params["model.norm.weight"] = norm
    bridge.sync.push()
    assert_equal(bridge.engine.params, bridge.expected())
    return [entry.split(":")[0] for entry in bridge.engine.diary]


def test_a_refused_push_can_be_repeated() -> None:
    assert run_ranks(recover, 2) == [["closed", "refuses", "closed", "open at 1"]] * 2


def fail_at_the_end(rank: int, kind: type[Exception]) -> tuple[str, list[str]]:
    """Rank 1's engine cannot open; the other one must not be left open alone."""
    bridge = Bridge(rank)
    if rank == 1:

        def finish_update(version: int) -> None:
            raise kind(f"cannot open at {version}")

        bridge.engine.finish_update = finish_update  # type: ignore[method-assign]
    return bridge.failed_push(), bridge.engine.diary


@pytest.mark.parametrize("kind", [WeightError, ValueError])
def test_a_version_is_open_on_all_ranks_or_on_none(kind: type[Exception]) -> None:
    why = "cannot open at 1" if kind is WeightError else "ValueError('cannot open at 1')"
    for message, diary in run_ranks(fail_at_the_end, 2, kind=kind):
        assert message == f"rank 1: {why}"
        assert diary[-1] == f"refuses: weight version 1 was not delivered: rank 1: {why}"


MANY_LAYERS = dataclasses.replace(SHAPE, num_layers=60)
"""Several portions of half a MiB."""


def reload_fails(rank: int, kind: type[Exception]) -> tuple[str, int]:
    """Rank 1's loader gives up early; rank 0 still needs what rank 1 sends."""
    bridge = Bridge(rank, mode="reload", shape=MANY_LAYERS)
    num_executed = []
    real = stream.execute

    def execute_one(*args: Any, **kwargs: Any) -> Any:
        num_executed.append(1)
        return real(*args, **kwargs)

    stream.execute = execute_one  # type: ignore[assignment]
    if rank == 1:

        def reload(tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
            name, _ = next(iter(tensors))
            raise kind(f"cannot load {name}")

        bridge.engine.reload = reload  # type: ignore[method-assign]
    return bridge.failed_push(), len(num_executed)


@pytest.mark.parametrize("kind", [WeightError, KeyError])
def test_a_loader_that_fails_on_one_rank_fails_on_all(kind: type[Exception]) -> None:
    why = "cannot load model.embed_tokens.weight"
    expected = f"rank 1: {why}" if kind is WeightError else f"rank 1: KeyError('{why}')"
    (message, portions), other = run_ranks(reload_fails, 2, kind=kind)
    assert (message, portions) == other
    assert message == expected
    assert portions > 3


def plan_with_settings(rank: int, of_rank_1: dict[str, Any]) -> str:
    with pytest.raises(WeightError) as error:
        Bridge(rank, **(of_rank_1 if rank == 1 else {}))
    return str(error.value)


@pytest.mark.parametrize(
    "settings", [{"bucket_mib": 2}, {"verify": "off"}, {"mode": "auto"}], ids=str
)
def test_ranks_with_different_settings_do_not_start(settings: dict[str, Any]) -> None:
    """They would wait for messages of other sizes, or for digests that never come."""
    for message in run_ranks(plan_with_settings, 2, of_rank_1=settings):
        assert message.startswith("ranks [1] computed another reshard plan than rank 0"), message


def lose_rank_while_reporting(rank: int) -> tuple[str, list[str]]:
    """Rank 1 dies when all is delivered, before the version opens."""
    bridge = Bridge(rank, group=dist.new_group(timeout=timedelta(seconds=4)))
    real = bridge.sync._report

    def report(*args: Any) -> PushReport:
        if rank == 1:
            os._exit(1)
        return real(*args)

    bridge.sync._report = report  # type: ignore[method-assign]
    message = bridge.failed_push()
    dist.destroy_process_group()
    return message, bridge.engine.diary


def test_no_engine_opens_when_a_rank_is_lost_at_the_end() -> None:
    message, diary = run_ranks(lose_rank_while_reporting, 2, lost=[1], timeout_s=60)[0]
    assert "while reporting the push" in message
    assert diary == ["closed", f"refuses: weight version 1 was not delivered: {message}"]


def reload_report(rank: int) -> tuple[int, int]:
    report = Bridge(rank, mode="reload", shape=MANY_LAYERS).sync.push()
    return report.peak_extra_bytes, report.bytes_received


def test_reload_needs_no_more_than_the_bucket_while_tensors_fit() -> None:
    largest = max(at.shape[at.dim] * at.row_elements * 4 for at in hf_layouts(MANY_LAYERS).values())
    whole = sum(at.shape[at.dim] * at.row_elements * 4 for at in hf_layouts(MANY_LAYERS).values())
    for peak, received in run_ranks(reload_report, 2):
        assert largest < peak <= 2**20
        # Each of two ranks gets what the other one has; norms they both have.
        assert 0.9 * whole < received < whole


def plan_alone(rank: int) -> str:
    with pytest.raises(WeightError) as error:
        Bridge(rank, engine_tp=1 if rank == 0 else 2)
    return str(error.value)


def test_ranks_with_different_plans_do_not_start() -> None:
    for message in run_ranks(plan_alone, 2):
        assert message.startswith("ranks [1] computed another reshard plan than rank 0"), message


# Wrong on purpose: each must be caught, and named.

K_PROJ = "model.layers.1.self_attn.k_proj.weight"
QKV = "model.layers.1.self_attn.qkv_proj.weight"


def without(side: Layouts, name: str) -> Layouts:
    return {
        rank: {param: at for param, at in layouts.items() if param != name}
        for rank, layouts in side.items()
    }


def shifted(side: Layouts, *, ranks: list[int]) -> Layouts:
    """One interval of one parameter is a row too far, on these ranks."""

    def shift(layouts: Any) -> Any:
        moved = tuple(
            dataclasses.replace(at, start=at.start + 1, stop=at.stop + 1)
            if at.tensor == K_PROJ
            else at
            for at in layouts[QKV].intervals
        )
        return {**layouts, QKV: dataclasses.replace(layouts[QKV], intervals=moved)}

    return {rank: shift(at) if rank in ranks else at for rank, at in side.items()}


def start_error(rank: int, sources: Layouts | None, targets: Layouts | None) -> str:
    with pytest.raises(WeightError) as error:
        Bridge(rank, tp=2, engine_tp=2, sources=sources, targets=targets)
    return str(error.value)


def test_a_parameter_dropped_from_one_side_of_the_table_is_named_before_the_first_push() -> None:
    actor, engine = actor_side(SHAPE, tp=2), engine_side(SHAPE, tp=2)
    lost = "decoder.layers.1.mlp.linear_fc2.weight"
    [message] = set(run_ranks(start_error, 2, sources=without(actor, lost), targets=None))
    tensor = "'model.layers.1.mlp.down_proj.weight'"
    assert message == f"{tensor} is held by no parameter of the actor"
    lost = "model.layers.1.mlp.down_proj.weight"
    [message] = set(run_ranks(start_error, 2, sources=None, targets=without(engine, lost)))
    assert message == f"{tensor} reaches no parameter of the engine"


def push_without_a_row_of_the_table(rank: int) -> str:
    """The table lacks a parameter on both sides, so that the layouts fit; the models have it."""
    actor, engine = actor_side(SHAPE, tp=2), engine_side(SHAPE, tp=2)
    bridge = Bridge(
        rank,
        engine_tp=2,
        sources=without(actor, "decoder.layers.1.mlp.linear_fc2.weight"),
        targets=without(engine, "model.layers.1.mlp.down_proj.weight"),
    )
    whole = Bridge(rank, engine_tp=2)
    bridge.weights, bridge.engine.params = whole.weights, whole.engine.params
    return bridge.failed_push()


def test_a_parameter_dropped_from_both_sides_of_the_table_is_named_by_the_first_push() -> None:
    for message in run_ranks(push_without_a_row_of_the_table, 2):
        assert message.splitlines() == [
            f"rank {rank}: {side} parameter {name!r} has no layout: it would be left as it is"
            for rank in range(2)
            for side, name in (
                ("source", "decoder.layers.1.mlp.linear_fc2.weight"),
                ("target", "model.layers.1.mlp.down_proj.weight"),
            )
        ]


@pytest.mark.parametrize("ranks", [[0, 1], [1]])
def test_a_shifted_interval_is_named_before_the_first_push(ranks: list[int]) -> None:
    engine = shifted(engine_side(SHAPE, tp=2), ranks=ranks)
    [message] = set(run_ranks(start_error, 2, sources=None, targets=engine))
    assert f"the engine's ranks hold '{K_PROJ}' unevenly" in message


def corrupt(rank: int, *, where: slice, verify: str) -> tuple[str, str]:
    """The second parcel that rank 1 receives in the second push arrives changed."""
    schedule.PIECES_PER_BUCKET = 32
    bridge = Bridge(rank, bucket_mib=1, verify=verify)
    bridge.sync.push()
    real, arrived = transport.InFlight.wait, []

    def wait(parcels: transport.InFlight) -> None:
        real(parcels)
        arrived.extend(parcels.receives)
        if rank == 1 and len(arrived) == 1:
            arrived[0].buffer[where] += 1

    transport.InFlight.wait = wait  # type: ignore[method-assign]
    message = bridge.failed_push()
    return message, bridge.engine.diary[-1]


@pytest.mark.parametrize(
    ("where", "verify"), [(slice(None), "sample"), (slice(100, 101), "full")], ids=["all", "one"]
)
def test_a_bucket_corrupted_in_flight_is_named(where: slice, verify: str) -> None:
    for message, last in run_ranks(corrupt, 2, where=where, verify=verify):
        assert message.startswith("rank 1: rows 0:64 of 'model.embed_tokens.weight' are not what")
        assert "rank 0 holds as 'embedding.word_embeddings.weight'" in message
        assert last == f"refuses: weight version 2 was not delivered: {message}"


def lose_rank(rank: int, how: str, mode: str) -> tuple[str, str]:
    """Rank 2 stops in the middle of the second push."""
    group = dist.new_group(timeout=timedelta(seconds=4))
    bridge = Bridge(rank, pp=2, engine_tp=4, world=4, group=group, mode=mode)
    bridge.sync.push()
    real = execute.post

    def post(*args: Any) -> Any:
        if rank == 2:
            os.kill(os.getpid(), signal.SIGKILL if how == "dies" else signal.SIGSTOP)
        return real(*args)

    execute.post = post  # type: ignore[assignment]
    message = bridge.failed_push()
    dist.destroy_process_group()
    return message, bridge.engine.diary[-1]


@pytest.mark.parametrize(("how", "mode"), [("dies", "copy"), ("hangs", "copy"), ("dies", "reload")])
def test_when_a_rank_is_lost_mid_push_the_others_stop_and_say_so(how: str, mode: str) -> None:
    results = run_ranks(lose_rank, 4, lost=[2], timeout_s=60, how=how, mode=mode)
    for rank in (0, 1, 3):
        message, last = results[rank]
        assert re.match(
            r"the push broke off while (sending|receiving) '\S+\.weight' .*(to|from) rank 2: "
            r"a rank died, or did not answer within deadlines\.sync \(",
            message,
        ), message
        assert last == f"refuses: weight version 2 was not delivered: {message}"


def share_nothing(rank: int) -> str:
    """An engine that keeps its own memory although it was told to share."""
    bridge = Bridge(rank, engine_tp=2, mode="alias")
    bridge.engine.share = lambda memory: None  # type: ignore[method-assign]
    return bridge.failed_push()


def test_an_alias_that_is_a_copy_is_named() -> None:
    for message in run_ranks(share_nothing, 2):
        assert "rank 0: target parameter 'model.norm.weight' should be the memory of" in message
        assert "rank 1: target parameter 'model.norm.weight' should be the memory of" in message


def stale_head(rank: int) -> str:
    """A tied model whose engine has a head of its own, which no plan would ever fill."""
    bridge = Bridge(rank, shape=model("qwen2", kv_heads=2, tied=True))
    bridge.engine.params["lm_head.weight"] = torch.zeros(128, 24)
    return bridge.failed_push()


def test_a_stale_tied_head_is_named() -> None:
    for message in run_ranks(stale_head, 2):
        assert "rank 0: target parameter 'lm_head.weight' has no layout" in message
