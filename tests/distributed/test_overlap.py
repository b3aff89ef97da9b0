"""Gradients that are reduced while the backward pass goes on are the same gradients.

It is on where a GPU can do both at once; here gloo does, by the same path.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from token_examples import token_examples

from osft_mcore.actor import actor as actor_module
from osft_mcore.actor.actor import Actor
from osft_mcore.actor.optimizer import wrap_data_parallel
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology, topology_of
from osft_mcore.train.start import build_actor

VOCAB, LR = 67, 1e-3
SIZES = (16, 8, 16)
"""Examples by update: the micro-batches are not always as many."""
BUCKET = 3000
"""Elements: several buckets in the models below."""


@dataclass(frozen=True, kw_only=True)
class Case:
    tied: bool
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    """Of the two copies of the weights; the rest is dp."""
    distributed_optimizer: bool = True
    train: Any = None

    @property
    def topology(self) -> Topology:
        return topology_of(self.parallel, rollout_tp=1)

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            pp=self.pp,
            vpp=self.vpp,
            cp=self.cp,
            dp=2 // self.cp,
            distributed_optimizer=self.distributed_optimizer,
        )


CASES = {
    "tied": Case(tied=True),
    "untied, cp2": Case(tied=False, cp=2),
    "untied, whole optimizer": Case(tied=False, distributed_optimizer=False),
    "untied, recomputed": Case(tied=False, train={"recompute": "full", "recompute_loss": True}),
    "untied, pp2": Case(tied=False, pp=2),
    "tied, pp2 vpp2": Case(tied=True, pp=2, vpp=2, train={"offload": "optimizer"}),
}


class Trained(NamedTuple):
    figures: list[tuple[float, float, float]]
    weights: dict[str, torch.Tensor]
    in_flight: list[list[bool]]
    """By update, of each bucket: whether its reduction had begun when the backward pass ended."""


def watch(actor: Actor) -> list[list[bool]]:
    """Looks at every bucket when the schedule has come to its end."""
    config = actor.wrapped[0].config
    finalize, seen = config.finalize_model_grads_func, []

    def watching(*args: Any, **kwargs: Any) -> None:
        groups = [group for chunk in actor.wrapped for group in chunk.bucket_groups]
        seen.append([group.grad_reduce_handle is not None for group in groups])
        finalize(*args, **kwargs)

    config.finalize_model_grads_func = watching
    return seen


def train(actor: Actor) -> Trained:
    batch = token_examples(16, VOCAB, responses=(1, 9))
    in_flight, results = watch(actor), []
    for size in SIZES:
        results.append(actor.update(batch[:size], tau_sample=0.6, lr=LR))
        # No gradients: nothing may be begun.
        actor.score(batch, tau_sample=0.6)
    weights = {name: tensor.clone() for name, tensor in actor.parameters().items()}
    return Trained([(r.loss, r.grad_norm, r.nll) for r in results], weights, in_flight)


def train_both(_rank: int, folder: Path, case: Case) -> list[Trained]:
    context = join_groups(case.topology, device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=case.parallel,
        # Unclipped: how the norm is summed up depends on the buckets, and weights on nothing else.
        train=TrainConfig(lr=LR, micro_batch_size=2, clip_grad=0, **(case.train or {})),
    )
    found = []
    for overlaps in (False, True):

        def wrap(chunks: Any, overlaps: bool = overlaps, **options: Any) -> list[Any]:
            options |= {"overlap_grad_reduce": overlaps, "bucket_size": BUCKET}
            return wrap_data_parallel(chunks, **options)

        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(actor_module, "wrap_data_parallel", wrap)
            found.append(train(build_actor(config, context)))
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_reduced_on_the_way_gradients_are_the_same(tmp_path: Path, case: Case) -> None:
    folder = save_random_model(tmp_path, tied=case.tied, vocab=VOCAB, layers=4)
    by_rank = run_ranks(train_both, case.topology.world_size, folder=folder, case=case)
    for rank, (apart, together) in enumerate(by_rank):
        for ours, theirs in zip(together.figures, apart.figures, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-6)
        for name, tensor in apart.weights.items():
            assert torch.equal(together.weights[name], tensor), f"rank {rank}: {name}"
        assert not any(map(any, apart.in_flight))
        first, *later = together.in_flight
        # It shows how often each parameter's gradient comes.
        assert not any(first)
        assert len(later) == len(SIZES) - 1
        assert all(map(all, later))
    # Stages after the first have one bucket: their reduction is not what others wait for.
    assert len(by_rank[0][1].in_flight[0]) > 2
