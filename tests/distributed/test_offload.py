"""Memory that leaves the device between uses: it is gone, and what comes back is the same bits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from token_examples import token_examples

from osft_mcore.actor import actor as actor_module
from osft_mcore.actor.actor import Actor
from osft_mcore.actor.offload import HostCopies
from osft_mcore.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    Offload,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.start import build_actor

CHOICES: tuple[Offload, ...] = ("none", "optimizer", "all")
VOCAB, LR = 67, 1e-3
NORM = "decoder.final_layernorm.weight"
"""On the last stage."""


@dataclass(frozen=True, kw_only=True)
class Case:
    topology: Topology
    dtype: Literal["bf16", "fp32"] = "bf16"
    distributed_optimizer: bool = True
    kl_coef: float = 0.0


CASES = {
    "dp2, sharded": Case(topology=Topology(tp=1, pp=1, dp=2)),
    "dp2, sharded, fp32": Case(topology=Topology(tp=1, pp=1, dp=2), dtype="fp32"),
    "dp2, whole optimizer": Case(topology=Topology(tp=1, pp=1, dp=2), distributed_optimizer=False),
    "tp2, with a reference": Case(topology=Topology(tp=2, pp=1, dp=1), kl_coef=0.1),
    "pp2, fp32": Case(topology=Topology(tp=1, pp=2, dp=1), dtype="fp32"),
}


class Bytes(NamedTuple):
    """That storages have at one moment."""

    weights: int
    optimizer: int
    """Without what are weights."""
    gradients: int


def held(actor: Actor) -> Bytes:
    state = actor._live_state()
    weights = {
        storage._cdata: storage.nbytes()
        for part in state
        if part.kind == "weight"
        for storage in [part.tensor.untyped_storage()]
    }
    optimizer = {
        storage._cdata: storage.nbytes()
        for part in state
        for storage in [part.tensor.untyped_storage()]
        if storage._cdata not in weights
    }
    gradients = [b.grad_data.untyped_storage().nbytes() for c in actor.wrapped for b in c.buffers]
    return Bytes(sum(weights.values()), sum(optimizer.values()), sum(gradients))


@contextmanager
def watched(actor: Actor, seen: dict[str, Bytes]) -> Iterator[None]:
    """What is held when the gradients are complete, and in the optimizer's step."""

    def watching(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[name] = held(actor)
            return function(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name in ("gradient_norm", "take_step"):
            monkeypatch.setattr(actor_module, name, watching(name, getattr(actor_module, name)))
        yield


class Trained(NamedTuple):
    figures: list[tuple[float, ...]]
    state: dict[str, torch.Tensor]
    skipped: int
    moments: dict[str, Bytes]


def train(actor: Actor) -> Trained:
    """Three updates, a skipped one and a forward pass among them; rests, and calls in between."""
    batch, moments = token_examples(8, VOCAB, responses=(1, 9)), dict[str, Bytes]()
    moments["start"] = held(actor)
    results = [actor.update(batch, tau_sample=0.6, lr=LR)]
    moments["updated"] = held(actor)
    actor.rest()
    moments["rest"] = held(actor)
    results.append(actor.score(batch, tau_sample=0.6))
    moments["scored"] = held(actor)
    actor.rest()
    actor.rest()
    norm = actor.parameters().get(NORM, torch.zeros(1))
    kept = float(norm[0])
    norm[0] = torch.nan
    results.append(actor.update(batch, tau_sample=0.6, lr=LR))
    moments["skipped"] = held(actor)
    norm[0] = kept
    actor.rest()
    for _ in range(2):
        with watched(actor, moments):
            results.append(actor.update(batch, tau_sample=0.6, lr=LR))
    actor.rest()
    state = {f"{t.kind}/{t.param}/{t.start}": t.tensor.clone() for t in actor.training_state()}
    assert all(tensor.any() for name, tensor in state.items() if "exp_avg" in name)
    return Trained(
        figures=[(r.loss, r.grad_norm, r.nll, r.kl or 0.0) for r in results if not r.skipped],
        state=state,
        skipped=sum(r.skipped for r in results),
        moments=moments,
    )


def train_all(_rank: int, folder: Path, case: Case) -> dict[Offload, Trained]:
    topology = case.topology
    context = join_groups(topology, device=torch.device("cpu"))
    found = {}
    for choice in CHOICES:
        config = RunConfig(
            model=ModelConfig(path=str(folder), dtype=case.dtype),
            parallel=ParallelConfig(
                tp=topology.tp,
                pp=topology.pp,
                dp=topology.dp,
                distributed_optimizer=case.distributed_optimizer,
            ),
            train=TrainConfig(lr=LR, micro_batch_size=2, offload=choice),
            algorithm=AlgorithmConfig(kl_coef=case.kl_coef),
        )
        found[choice] = train(build_actor(config, context))
    return found


@pytest.fixture(scope="module")
def by_case(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[Offload, Trained]]]:
    folder = save_random_model(tmp_path_factory.mktemp("model"), tied=True, vocab=VOCAB, layers=2)
    return {
        name: run_ranks(train_all, case.topology.world_size, folder=folder, case=case)
        for name, case in CASES.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_training_is_the_same_to_the_bit(
    by_case: dict[str, list[dict[Offload, Trained]]], name: str
) -> None:
    for found in by_case[name]:
        expected = found["none"]
        assert expected.skipped == 1
        for choice in ("optimizer", "all"):
            ours = found[choice]
            assert ours.skipped == 1
            assert ours.figures == expected.figures
            assert ours.state.keys() == expected.state.keys()
            for key, tensor in expected.state.items():
                assert torch.equal(ours.state[key], tensor), f"{choice}: {key}"


@pytest.mark.parametrize("name", CASES)
def test_what_nobody_needs_takes_no_memory(
    by_case: dict[str, list[dict[Offload, Trained]]], name: str
) -> None:
    for found in by_case[name]:
        everything = found["none"].moments["updated"]
        assert all(everything)
        assert set(found["none"].moments.values()) <= {
            everything,
            # Adam has made no moments yet.
            found["none"].moments["start"],
        }
        alone = Bytes(everything.weights, 0, 0)
        for choice, resting in (("optimizer", alone), ("all", Bytes(0, 0, 0))):
            moments = found[choice].moments
            assert moments["start"] == moments["updated"] == moments["skipped"] == alone, choice
            assert moments["scored"] == alone
            assert moments["rest"] == resting
            # Activations and optimizer state are never there together.
            assert moments["gradient_norm"] == Bytes(everything.weights, 0, everything.gradients)
            assert moments["take_step"] == everything


def test_views_of_a_storage_come_back_and_are_read_meanwhile() -> None:
    flat = torch.arange(12, dtype=torch.float32)
    rows, bits = flat.view(3, 4)[1:], flat[3:9].view(torch.int32)
    expected = [tensor.clone() for tensor in (flat, rows, bits)]
    copies = HostCopies([rows, bits])
    for _ in range(2):
        copies.put_away()
        assert flat.untyped_storage().nbytes() == 0
        copies.put_away()
        read = [copies.readable(tensor) for tensor in (flat, rows, bits)]
        assert all(map(torch.equal, read, expected))
        copies.fetch()
        assert all(map(torch.equal, (flat, rows, bits), expected))
        assert copies.readable(rows) is rows
        copies.fetch()
        flat += 1
        # What has been read is a copy, until the next one.
        assert all(map(torch.equal, read, expected))
        expected = [tensor.clone() for tensor in (flat, rows, bits)]
    assert copies.in_place
    assert not HostCopies([]).in_place
