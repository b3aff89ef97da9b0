"""A push delivers the whole of the weights under the next version, or leaves the target closed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from layouts import assert_equal, materialise, model, random_checkpoint
from ranks import run_ranks

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import megatron_layouts, vllm_layouts
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.sync import WeightSync

SHAPE = model("qwen2", kv_heads=2)
Layouts = dict[int, dict[str, Layout]]


def actor_layouts(shape: ModelShape) -> Layouts:
    return {
        rank: megatron_layouts(
            shape, tp=2, tp_rank=rank, pp=1, pp_rank=0, vocab_padded=128, transformer_engine=False
        )
        for rank in range(2)
    }


def engine_layouts(shape: ModelShape, tp: int = 1) -> Layouts:
    return {
        rank: vllm_layouts(shape, tp=tp, tp_rank=rank % tp, vocab_padded=128) for rank in range(2)
    }


class DictTarget:
    """Parameters in a dict, and a diary of what was asked of it."""

    def __init__(self, layouts: dict[str, Layout]) -> None:
        self.params = {name: torch.full(at.shape, torch.nan) for name, at in layouts.items()}
        self.diary: list[str] = []

    def begin_update(self) -> dict[str, torch.Tensor]:
        self.diary.append("closed")
        return self.params

    def finish_update(self, version: int) -> None:
        self.diary.append(f"open at {version}")


class Bridge:
    """Actor, target and sync of one rank; the actor's weights are `checkpoint` times `scale`."""

    def __init__(self, rank: int, *, engine_tp: int = 1) -> None:
        sources, targets = actor_layouts(SHAPE), engine_layouts(SHAPE, engine_tp)
        world = dist.group.WORLD
        assert world is not None
        self.rank, self.sources, self.targets = rank, sources, targets
        self.checkpoint = random_checkpoint(SHAPE)
        self.scale = 1.0
        self.target = DictTarget(targets[rank])
        self.sync = WeightSync(
            make_plan(sources, targets),
            sources,
            rank=rank,
            source_params=lambda: self.shard(self.sources),
            target=self.target,
            dtype=torch.float32,
            bucket_bytes=4096,
            group=world,
            device=torch.device("cpu"),
        )

    def shard(self, layouts: Layouts) -> dict[str, torch.Tensor]:
        scaled = {name: tensor * self.scale for name, tensor in self.checkpoint.items()}
        return {name: materialise(at, scaled) for name, at in layouts[self.rank].items()}


def push_three_times(rank: int) -> list[int]:
    bridge = Bridge(rank)
    assert bridge.sync.version == 0
    versions = []
    for scale in (1.0, 2.0, -3.0):
        bridge.scale = scale
        report = bridge.sync.push()
        assert report.version == bridge.sync.version
        versions.append(report.version)
        assert_equal(bridge.target.params, bridge.shard(bridge.targets))
        assert report.transfer.bytes_sent > 0
    opened = [f"open at {version}" for version in versions]
    opened_at = [entry for pair in zip(["closed"] * 3, opened, strict=True) for entry in pair]
    assert bridge.target.diary == opened_at
    return versions


def test_versions_count_up_and_each_push_delivers_the_weights_of_its_time() -> None:
    assert run_ranks(push_three_times, 2) == [[1, 2, 3]] * 2


def missing(params: dict[str, torch.Tensor]) -> None:
    del params["model.norm.weight"]


def extra(params: dict[str, torch.Tensor]) -> None:
    params["model.extra.weight"] = torch.zeros(5)


def wrong_shape(params: dict[str, torch.Tensor]) -> None:
    params["model.norm.weight"] = torch.zeros(5)


def push_into_spoilt(
    rank: int, spoil: Callable[[dict[str, torch.Tensor]], None], ranks: list[int]
) -> tuple[str, int, list[str], bool]:
    """One good push, then one into a spoilt target: error, version, diary, target unchanged."""
    bridge = Bridge(rank)
    bridge.sync.push()
    delivered = bridge.shard(bridge.targets)
    if rank in ranks:
        spoil(bridge.target.params)
    bridge.scale = 2.0
    error = "no error"
    try:
        bridge.sync.push()
    except WeightError as raised:
        error = str(raised)
    unchanged = all(
        torch.equal(tensor, delivered[name])
        for name, tensor in bridge.target.params.items()
        if name in delivered and tensor.shape == delivered[name].shape
    )
    return error, bridge.sync.version, bridge.target.diary, unchanged


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (missing, "target parameter 'model.norm.weight' is missing"),
        (extra, "target parameter 'model.extra.weight' has no layout: it would be left as it is"),
        (
            wrong_shape,
            "target parameter 'model.norm.weight' has shape (5,), its layout says (24,)",
        ),
    ],
    ids=["missing", "extra", "wrong_shape"],
)
def test_a_target_that_does_not_fit_stays_closed(spoil: Any, problem: str) -> None:
    closed = (1, ["closed", "open at 1", "closed"], True)
    everywhere = run_ranks(push_into_spoilt, 2, spoil=spoil, ranks=[0, 1])
    assert everywhere == [(f"rank 0: {problem}\nrank 1: {problem}", *closed)] * 2
    # Where one rank alone is wrong, every rank names it and the parameter.
    on_one = run_ranks(push_into_spoilt, 2, spoil=spoil, ranks=[1])
    assert on_one == [(f"rank 1: {problem}", *closed)] * 2


def recover(rank: int) -> list[str]:
    """A target that is mended is filled by the next push."""
    bridge = Bridge(rank)
    norm = bridge.target.params.pop("model.norm.weight")
    with pytest.raises(WeightError):
        bridge.sync.push()
    bridge.target.params["model.norm.weight"] = norm
    bridge.sync.push()
    assert_equal(bridge.target.params, bridge.shard(bridge.targets))
    return bridge.target.diary


def test_a_refused_push_can_be_repeated() -> None:
    assert run_ranks(recover, 2) == [["closed", "closed", "open at 1"]] * 2


def plan_alone(rank: int) -> str:
    try:
        Bridge(rank, engine_tp=1 if rank == 0 else 2)
    except WeightError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_plans_do_not_start() -> None:
    for message in run_ranks(plan_alone, 2):
        assert message.startswith("ranks [1] computed another reshard plan than rank 0"), message


def leave_out(rank: int) -> str:
    """Targets without the final norm: the actor trains a weight that would never arrive."""
    sources, targets = actor_layouts(SHAPE), engine_layouts(SHAPE)
    for layouts in targets.values():
        del layouts["model.norm.weight"]
    world = dist.group.WORLD
    assert world is not None
    try:
        WeightSync(
            make_plan(sources, targets), sources, rank=rank, source_params=dict,
            target=DictTarget(targets[rank]), dtype=torch.float32, bucket_bytes=4096,
            group=world, device=torch.device("cpu"),
        )  # fmt: skip
    except WeightError as error:
        return str(error)
    return "no error"


def test_a_weight_that_reaches_no_target_is_refused_before_the_first_push() -> None:
    message = "24 rows of 'model.norm.weight' reach no target, the first is row 0"
    assert run_ranks(leave_out, 2) == [message] * 2
