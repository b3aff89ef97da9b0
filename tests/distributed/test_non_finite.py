"""A NaN or an infinity on one rank: no rank takes the step, and no engine gets the weights."""

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bridge import Bridge
from layouts import assert_equal
from models import save_random_model
from ranks import run_ranks
from torch import Tensor

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.result import UpdateResult
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example
from osft_mcore.train.start import build_actor

LR = 1e-3
NORM = "decoder.final_layernorm.weight"
Options = dict[str, Any]
LAYOUTS: dict[str, Options] = {
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "dp2": {"dp": 2},
    "cp2": {"cp": 2},
    "cp2, plain optimizer": {"cp": 2, "distributed_optimizer": False},
    "dp2, plain optimizer": {"dp": 2, "distributed_optimizer": False},
    "dp2, plain optimizer, bf16": {"dp": 2, "distributed_optimizer": False, "dtype": "bf16"},
}
FAULTS = {
    "gradient of rank 0": "gradient norm is nan",
    "reduced gradient of rank 1": "gradient norm is inf",
    "norms of rank 1": "gradient norm is nan",
    "weight of rank 1, NaN": "loss is nan, gradient norm is nan",
    "weight of rank 1, large": "gradient norm is inf",
    "loss": "loss is inf",
}


def batch(seed: int) -> list[Example]:
    rng = random.Random(seed)

    def ids() -> tuple[int, ...]:
        return tuple(rng.randrange(67) for _ in range(rng.randint(2, 9)))

    return [Example(prompt_token_ids=ids(), response_token_ids=ids()) for _ in range(8)]


def make_actor(folder: Path, context: Any, dtype: Any, parallel: Options) -> Actor:
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype=dtype),
        parallel=ParallelConfig(**parallel),
        train=TrainConfig(lr=LR, micro_batch_size=2, clip_grad=0.5),
    )
    return build_actor(config, context)


def gradients(actor: Actor) -> Iterator[tuple[Any, Tensor]]:
    """Parameters and where Megatron-Core adds up their gradients."""
    for chunk in actor.chunks:
        for parameter in chunk.parameters():
            yield parameter, parameter.main_grad


def is_whole(parameter: Any) -> bool:
    return not getattr(parameter, "tensor_model_parallel", False)


@contextmanager
def broken(actor: Actor, fault: str) -> Iterator[None]:
    """Something on one rank is not finite, or overflows, as long as this is open."""
    rank, real, weights = actor.context.rank, actor._forward_backward, actor.parameters()
    place = actor.context.coordinates
    # Of the ranks with the loss, the last one whose figure counts: those of a TP group are alike.
    counts = actor.context.is_last_stage and place.tp_rank == 0
    loses = counts and place.copy == actor.context.topology.copies - 1
    if not (loses if fault == "loss" else f"rank {rank}" in fault):
        yield
    elif fault.startswith("weight"):
        before = weights[NORM].clone()
        weights[NORM].fill_(math.nan if fault.endswith("NaN") else 1e36)
        yield
        weights[NORM].copy_(before)
    elif fault.startswith("gradient"):
        hooks = [
            parameter.register_hook(lambda gradient: gradient.fill_(math.nan))
            for parameter, _ in gradients(actor)
        ]
        yield
        for hook in hooks:
            hook.remove()
    else:

        def forward_backward(*args: Any, **options: Any) -> Any:
            parts = real(*args, **options)
            if fault == "loss":
                parts[0].totals[0] = math.inf
            for parameter, gradient in gradients(actor):
                if fault.startswith("reduced"):
                    gradient.fill_(math.inf)
                elif fault.startswith("norms") and parameter.ndim == 1 and is_whole(parameter):
                    # Rank 0 of a TP group holds the same and speaks for both.
                    gradient.fill_(math.nan)
            return parts

        actor._forward_backward = forward_backward  # type: ignore[method-assign]
        yield
        actor._forward_backward = real  # type: ignore[method-assign]


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def state(actor: Actor) -> dict[str, Any]:
    """Weights and all of the optimizer, to the bit."""
    found: dict[str, Any] = {name: bits(tensor) for name, tensor in actor.parameters().items()}
    for part in actor.optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            found |= {f"group {k}": v for k, v in group.items() if k not in ("params", "lr")}
        main = [main for group in part.optimizer.param_groups for main in group["params"]]
        for number, tensor in enumerate(main):
            found[f"main {number}"] = bits(tensor)
            for key, value in part.optimizer.state[tensor].items():
                found[f"{key} {number}"] = bits(value) if torch.is_tensor(value) else value
    return found


def differing(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    assert found.keys() == expected.keys()
    return [name for name, value in found.items() if value != expected[name]]


def train(
    _rank: int, folder: Path, layout: Options
) -> tuple[list[str], list[UpdateResult], list[UpdateResult], bool]:
    """An actor that is hit by every fault, before its first update and later, and one that is not.

    Returns what differs that should not, the skipped updates, and what came after them, in both.
    """
    parallel = {"dtype": "fp32", **layout}
    dtype = parallel.pop("dtype")
    sizes = {axis: parallel.get(axis, 1) for axis in ("tp", "cp", "pp", "dp")}
    context = join_groups(Topology(**sizes), device=torch.device("cpu"))
    hit, spared = (make_actor(folder, context, dtype, parallel) for _ in range(2))
    wrong, skipped = [], []

    def update_both(seed: int) -> tuple[UpdateResult, UpdateResult]:
        before = state(hit)
        found, expected = (a.update(batch(seed), tau_sample=1.0, lr=LR) for a in (hit, spared))
        assert state(hit) != before, "a step moves weights"
        return found, expected

    def break_once(fault: str) -> None:
        before = state(hit)
        with broken(hit, fault):
            skipped.append(hit.update(batch(2), tau_sample=1.0, lr=7 * LR))
        wrong.extend(f"{fault}: {name}" for name in differing(state(hit), before))

    break_once("gradient of rank 0")
    first = update_both(1)
    for fault in FAULTS:
        break_once(fault)
    second = update_both(3)
    wrong += [f"at the end: {name}" for name in differing(state(hit), state(spared))]
    after = [first[0], second[0]]
    return wrong, skipped, after, after == [first[1], second[1]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), tied=True, vocab=67)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_a_fault_of_one_rank_leaves_all_ranks_as_they_were(folder: Path, layout: Options) -> None:
    by_rank = run_ranks(train, 2, folder=folder, layout=layout)
    for wrong, skipped, after, as_spared in by_rank:
        assert wrong == []
        expected = ["gradient norm is nan", *FAULTS.values()]
        assert [result.not_finite for result in skipped] == expected
        assert all(result.skipped for result in skipped)
        assert not any(result.skipped for result in after)
        assert as_spared
        # NaN is not equal to itself, but reads the same.
        assert repr(skipped) == repr(by_rank[0][1]), "every rank reports the same"
        assert after == by_rank[0][2]


def push_broken_weights(rank: int, **options: Any) -> tuple[set[str], list[str]]:
    """Two pushes of a NaN that rank 1 alone has, between two good ones."""
    bridge = Bridge(rank, **options)
    bridge.sync.push()
    delivered = {name: tensor.clone() for name, tensor in bridge.engine.params.items()}
    held = {name: tensor.clone() for name, tensor in bridge.weights.items()}
    bridge.sync.close()
    if rank == 1:
        bridge.weights["decoder.layers.1.mlp.linear_fc2.weight"][-1, -1] = math.nan
    messages = {bridge.failed_push() for _ in range(2)}
    lent = {tensor.data_ptr() for tensor in bridge.weights.values()}
    kept = {n: t for n, t in bridge.engine.params.items() if t.data_ptr() not in lent}
    assert kept or options["mode"] == "alias"
    assert_equal(kept, {name: delivered[name] for name in kept})
    diary = list(bridge.engine.diary)
    for name, tensor in held.items():
        bridge.weights[name].copy_(tensor)
    assert bridge.sync.push().version == 2
    assert_equal(bridge.engine.params, bridge.expected())
    return messages, diary


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "copy", "engine_tp": 1, "verify": "off"},
        {"mode": "alias", "engine_tp": 2},
        {"mode": "reload", "engine_tp": 1, "verify": "off"},
    ],
    ids=lambda options: options["mode"],
)
def test_weights_that_are_not_finite_are_pushed_nowhere(options: Options) -> None:
    for messages, diary in run_ranks(push_broken_weights, 2, **options):
        [message] = messages
        assert message.startswith("rank 1: 1 of the actor's ")
        assert message.endswith(
            " parameters hold NaN or infinity: 'decoder.layers.1.mlp.linear_fc2.weight'"
        )
        refusal = f"refuses: weight version 2 was not delivered: {message}"
        assert diary == ["closed", "open at 1", "closed", refusal, "closed", refusal]
