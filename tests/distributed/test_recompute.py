"""Memory for time: what is computed twice changes no result, and keeps less in between."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from live_memory import LiveMemory
from models import save_random_model
from ranks import run_ranks
from token_examples import token_examples

from osft_mcore.actor.actor import Actor
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from osft_mcore.loss.linear import token_loss
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.start import build_actor

CHOICES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "loss": {"recompute_loss": True},
}
# tp, pp, vpp, sequence parallelism, model. Five layers: stages and chunks are uneven.
LAYOUTS = {
    "tp1": (1, 1, 1, False, "qwen3"),
    "tp2": (2, 1, 1, False, "qwen3"),
    "tp2_sp": (2, 1, 1, True, "qwen3"),
    "pp2": (1, 2, 1, False, "qwen2"),
    "pp3": (1, 3, 1, False, "qwen2"),
    "pp2_vpp2": (1, 2, 2, False, "qwen2"),
}
NUM_STEPS = 2
LR = 1e-4
TOLERANCE = 1e-6
HIDDEN = 64


class Trained(NamedTuple):
    """What came of a few updates on one rank."""

    figures: list[tuple[float, float, float, float]]
    """loss, grad_norm, nll, entropy of every update, and of a forward pass after them"""
    gradients: dict[str, torch.Tensor]
    """Of the last update."""
    weights: dict[str, torch.Tensor]


def actor_of(
    folder: Path, context: ParallelContext, choice: str, *, sequence_parallel: bool = False
) -> Actor:
    topology = context.topology
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=ParallelConfig(
            tp=topology.tp, pp=topology.pp, vpp=topology.vpp, sequence_parallel=sequence_parallel
        ),
        train=TrainConfig(lr=LR, micro_batch_size=2, **CHOICES[choice]),
    )
    return build_actor(config, context)


def train(_rank: int, folder: Path, layout: str) -> dict[str, Trained]:
    tp, pp, vpp, sequence_parallel, _ = LAYOUTS[layout]
    context = join_groups(Topology(tp=tp, pp=pp, dp=1, vpp=vpp), device=torch.device("cpu"))
    results = {}
    for choice in CHOICES:
        actor = actor_of(folder, context, choice, sequence_parallel=sequence_parallel)
        batch = token_examples(4, actor.shape.vocab, responses=(6, 12))
        steps = [actor.update(batch, tau_sample=0.6, lr=LR) for _ in range(NUM_STEPS)]
        steps.append(actor.score(batch, tau_sample=0.6))
        parameters = [
            (f"{number}.{name}", parameter)
            for number, chunk in enumerate(actor.chunks)
            for name, parameter in chunk.named_parameters()
        ]
        results[choice] = Trained(
            figures=[(r.loss, r.grad_norm, r.nll, r.entropy) for r in steps],
            gradients={name: parameter.main_grad.clone() for name, parameter in parameters},
            weights={name: parameter.data.clone() for name, parameter in parameters},
        )
    return results


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        kind: save_random_model(
            tmp_path_factory.mktemp(kind), kind, tied=tied, vocab=101, layers=5, hidden=HIDDEN
        )
        for kind, tied in (("qwen2", True), ("qwen3", False))
    }


@pytest.fixture(scope="module")
def on_one_rank(models: dict[str, Path]) -> dict[str, dict[str, Trained]]:
    return {
        kind: run_ranks(train, 1, folder=folder, layout="tp1")[0] for kind, folder in models.items()
    }


def assert_close(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str
) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.any(), f"{where}: {name} shows nothing"
        difference = float((found[name] - tensor).abs().max())
        assert difference <= TOLERANCE, f"{where}: {name}: {difference}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_computed_twice_changes_no_result(
    models: dict[str, Path], on_one_rank: dict[str, dict[str, Trained]], layout: str
) -> None:
    """Against the same layout that keeps all; figures also against one rank that keeps all."""
    tp, pp, _, _, kind = LAYOUTS[layout]
    by_rank = (
        list(on_one_rank.values())
        if layout == "tp1"
        else run_ranks(train, tp * pp, folder=models[kind], layout=layout)
    )
    for rank, results in enumerate(by_rank):
        for choice, found in results.items():
            where = f"rank {rank}, {choice}"
            assert_close(found.gradients, results["none"].gradients, f"{where}: gradient")
            assert_close(found.weights, results["none"].weights, f"{where}: weight")
            expected = (results if layout == "tp1" else on_one_rank[kind])["none"].figures
            for ours, theirs in zip(found.figures, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=TOLERANCE), where


NUM_LAYERS, FFN, SEQUENCES, LENGTH = 6, 256, 2, 240


class Memory(NamedTuple):
    """In bytes, without weights, gradients and optimizer."""

    kept: int
    """From a forward pass of the model for its backward pass."""
    peak: int
    """Of an update in one micro-batch."""


def measure(_rank: int, folder: Path, choices: list[str]) -> dict[str, Memory]:
    context = join_groups(Topology(tp=1, pp=1, dp=1), device=torch.device("cpu"))
    found = {}
    for choice in choices:
        actor = actor_of(folder, context, choice)
        batch = token_examples(SEQUENCES, actor.shape.vocab, responses=(LENGTH // 2, LENGTH))
        # The first update makes Adam's moments.
        actor.update(batch, tau_sample=0.6, lr=LR)
        with LiveMemory() as update:
            actor.update(batch, tau_sample=0.6, lr=LR)
        assert update.now < 2**12, "an update leaves figures alone behind"
        positions_BS = torch.arange(LENGTH).expand(SEQUENCES, -1)
        with megatron_device(), LiveMemory() as forward:
            hidden_BSH = actor.chunks[0](positions_BS % actor.shape.vocab, positions_BS, None)
            assert hidden_BSH.requires_grad
            found[choice] = Memory(kept=forward.now, peak=update.peak)
    return found


def test_activations_that_are_computed_again_are_not_kept(tmp_path: Path) -> None:
    folder = save_random_model(
        tmp_path, vocab=67, layers=NUM_LAYERS, hidden=HIDDEN, ffn=FFN, head_dim=32
    )
    (found,) = run_ranks(measure, 1, folder=folder, choices=["none", "selective", "full"])
    none, selective, full = found["none"], found["selective"], found["full"]
    wide, narrow = (4 * SEQUENCES * LENGTH * size for size in (FFN, HIDDEN))
    # Gate and up, the gate's activation, its sigmoid, their product.
    assert none.kept - selective.kept >= NUM_LAYERS * 4 * wide
    # The layers' inputs, and around them the embedding, rotary angles, the last norm.
    assert full.kept <= (NUM_LAYERS + 4) * narrow
    assert none.kept > 2 * selective.kept > 4 * full.kept
    assert none.peak > 1.5 * selective.peak > 3 * full.peak


def test_a_loss_that_is_computed_again_adds_to_the_gradient_itself(tmp_path: Path) -> None:
    """The peak is at the loss, where all activations exist: it lacks a copy of the gradient."""
    vocab = 2000
    folder = save_random_model(tmp_path, vocab=vocab, layers=1, hidden=HIDDEN)
    (found,) = run_ranks(measure, 1, folder=folder, choices=["none", "loss"])
    copy = 4 * vocab * HIDDEN
    assert found["none"].peak - found["loss"].peak >= copy


def loss_memory(_rank: int, num_tokens: int, vocab: int) -> dict[bool, int]:
    """Bytes that a loss keeps for its backward pass, by `recompute`."""
    found = {}
    for recompute in (False, True):
        hidden_TH = torch.randn(num_tokens, HIDDEN, requires_grad=True)
        weight_VH = torch.randn(vocab, HIDDEN, requires_grad=True)
        targets_T = torch.zeros(num_tokens, dtype=torch.long)
        with LiveMemory() as memory:
            loss = token_loss(
                hidden_TH,
                weight_VH,
                targets_T,
                lambda logprobs_C, _, rows: -logprobs_C,
                tau_train=1.0,
                tau_sample=1.0,
                vocab=vocab,
                tp_group=dist.group.WORLD,
                recompute=recompute,
            ).loss
            assert loss.requires_grad
            found[recompute] = memory.now
    return found


def test_the_loss_keeps_gradients_or_a_few_numbers_per_token() -> None:
    num_tokens, vocab = 300, 1000
    (found,) = run_ranks(loss_memory, 1, num_tokens=num_tokens, vocab=vocab)
    assert found[False] >= 4 * (num_tokens + vocab) * HIDDEN
    assert found[True] <= 4 * num_tokens * 16
