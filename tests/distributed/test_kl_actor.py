"""An actor with a KL penalty: against transformers, over layouts, and what the penalty does."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import save_random_model
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from test_kl import plain_kl
from test_training_oracle import random_examples, response_logprobs
from token_examples import token_examples
from torch import Tensor

from osft_mcore.actor.export import export_hf
from osft_mcore.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.errors import WeightError
from osft_mcore.loss.objectives import KlKind
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example
from osft_mcore.train.start import build_actor

TAU, COEF = 0.8, 0.5

Layout = tuple[int, int, int, int, int]
"""tp, pp, vpp, dp, micro-batch size"""
ONE: Layout = (1, 1, 1, 1, 4)
LR, NUM_STEPS, NUM_EXAMPLES = 1e-4, 3, 8
Figures = list[tuple[float, float, float, float, float]]
"""Loss, gradient norm, negative log-likelihood, entropy, KL of each update."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The starting model, and another of its shape."""
    start, other = tmp_path_factory.mktemp("start"), tmp_path_factory.mktemp("other")
    save_random_model(start, layers=4, tied=True)
    return start, save_random_model(other, layers=4, tied=True, seed=7)


def batch_of(vocab: int) -> list[Example]:
    return token_examples(NUM_EXAMPLES, vocab, seed=3, untrained_every=5)


def _train(
    _rank: int,
    model: Path,
    out: Path,
    layout: Layout,
    algorithm: AlgorithmConfig,
    lr: float,
    **options: Any,
) -> Figures:
    tp, pp, vpp, dp, micro_batch_size = layout
    cp = options.get("cp", 1)
    topology = Topology(tp=tp, cp=cp, pp=pp, dp=dp, vpp=vpp)
    context = join_groups(topology, device=torch.device("cpu"))
    model_config = ModelConfig(
        path=str(model), dtype="fp32", init=options.pop("init", "pretrained")
    )
    train = TrainConfig(
        micro_batch_size=micro_batch_size,
        max_tokens_per_micro_batch=options.pop("max_tokens", None),
        weight_decay=0.0,
        eps=1e-4,
    )
    config = RunConfig(
        model=model_config,
        parallel=ParallelConfig(tp=tp, pp=pp, dp=dp, vpp=vpp, **options),
        train=train,
        algorithm=algorithm,
    )
    actor = build_actor(config, context)
    batch = batch_of(actor.shape.vocab)
    results = [actor.update(batch, tau_sample=0.6, lr=lr) for _ in range(NUM_STEPS)]
    export_hf(actor, out, max_shard_bytes=2**30, bucket_bytes=2**12)
    assert all(result.kl is not None for result in results) == (algorithm.kl_coef > 0)
    return [(r.loss, r.grad_norm, r.nll, r.entropy, r.kl or 0.0) for r in results]


def run(
    model: Path, out: Path, layout: Layout, algorithm: AlgorithmConfig, lr: float = LR, **more: Any
) -> tuple[Figures, dict[str, Tensor]]:
    tp, pp, _, dp, _ = layout
    told = run_ranks(
        _train, tp * pp * dp * more.get("cp", 1),
        model=model, out=out, layout=layout, algorithm=algorithm, lr=lr, **more,
    )  # fmt: skip
    assert all(part == told[0] for part in told), "every rank reports the same figures"
    return told[0], load_file(out / "model.safetensors")


def to_other(models: tuple[Path, Path], **options: Any) -> AlgorithmConfig:
    return AlgorithmConfig(tau_train=TAU, kl_coef=COEF, reference=str(models[1]), **options)


@pytest.fixture(scope="module")
def one_rank(models: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("one_rank") / "hf"
    return run(models[0], out, ONE, to_other(models))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        ((1, 1, 1, 1, 2), {}),
        ((2, 1, 1, 1, 2), {}),
        ((1, 2, 1, 1, 1), {}),
        ((1, 1, 1, 2, 2), {}),
        ((2, 1, 1, 1, 2), {"sequence_parallel": True}),
        ((1, 2, 2, 1, 2), {}),
        ((2, 1, 1, 1, 2), {"sequence_parallel": True, "max_tokens": 24}),
        ((1, 2, 1, 1, 2), {"max_tokens": 24}),
        ((1, 2, 1, 1, 2), {"cp": 2}),
    ],
    ids=[
        "micro2",
        "tp2",
        "pp2",
        "dp2",
        "tp2_sp",
        "pp2_vpp2",
        "tp2_sp_tokens",
        "pp2_tokens",
        "pp2_cp2",
    ],
)
def test_updates_are_the_same_in_every_layout(
    models: Any, one_rank: Any, tmp_path: Path, layout: Layout, options: dict[str, Any]
) -> None:
    figures, weights = run(models[0], tmp_path / "hf", layout, to_other(models), **options)
    for ours, theirs in zip(figures, one_rank[0], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for name, tensor in one_rank[1].items():
        difference = float((weights[name] - tensor).abs().max())
        assert difference <= 1e-6, f"{name}: {difference}"


def plain_update(models: tuple[Path, Path]) -> tuple[float, float, float]:
    """Loss, gradient norm and KL of the first update, by transformers in float64."""
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(
            folder, attn_implementation="eager", dtype=torch.float64
        )
        for folder in models
    )
    trained = [e for e in batch_of(ours.config.vocab_size) if e.trained]
    logprobs_T = torch.cat([response_logprobs(ours, example, TAU) for example in trained])
    with torch.no_grad():
        reference_T = torch.cat([response_logprobs(theirs, example, TAU) for example in trained])
    kl = plain_kl(logprobs_T - reference_T, "k3").mean()
    loss = -logprobs_T.mean() + COEF * kl
    loss.backward()
    norms = [p.grad.norm() for p in ours.parameters() if p.grad is not None]
    return loss.item(), float(torch.stack(norms).norm()), kl.item()


def test_the_first_update_is_that_of_two_transformers_models(models: Any, one_rank: Any) -> None:
    """Both at tau_train; the reference's answers to the same tokens."""
    loss, grad_norm, kl = plain_update(models)
    found = one_rank[0][0]
    assert found[0] == pytest.approx(loss, rel=1e-5)
    assert found[1] == pytest.approx(grad_norm, rel=1e-4)
    assert found[4] == pytest.approx(kl, rel=1e-5)
    assert kl > 0.05


@pytest.mark.parametrize(
    ("layout", "kind", "init"),
    [((2, 1, 1, 1, 2), "k2", "pretrained"), ((1, 2, 1, 1, 2), "k3", "random")],
)
def test_to_the_starting_model_the_penalty_begins_at_zero(
    models: Any, tmp_path: Path, layout: Layout, kind: KlKind, init: str
) -> None:
    """Value and gradient: the first update is the one without a penalty. Then it acts."""
    plain = AlgorithmConfig(tau_train=TAU)
    penalty = AlgorithmConfig(tau_train=TAU, kl_coef=5.0, kl_kind=kind)
    expected, _ = run(models[0], tmp_path / "plain", layout, plain, init=init)
    found, _ = run(models[0], tmp_path / "kl", layout, penalty, init=init)
    assert found[0][4] == pytest.approx(0, abs=1e-6)
    assert found[0][:4] == pytest.approx(expected[0][:4], rel=1e-6)
    assert found[1][4] > 1e-5
    assert found[1][0] == pytest.approx(found[1][2] + 5.0 * found[1][4], rel=1e-5)
    assert found[2][1] != pytest.approx(expected[2][1], rel=1e-4)


def _refusal(_rank: int, model: Path, reference: Path) -> str:
    context = join_groups(Topology(tp=1, pp=1, dp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(model), dtype="fp32"),
        algorithm=AlgorithmConfig(kl_coef=COEF, reference=str(reference)),
    )
    with pytest.raises(WeightError) as refused:
        build_actor(config, context)
    return str(refused.value)


def test_a_reference_that_is_not_finite_is_refused(models: Any, tmp_path: Path) -> None:
    """No update with it ever would be."""
    broken = shutil.copytree(models[1], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = math.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    [said] = run_ranks(_refusal, 1, model=models[0], reference=broken)
    assert said.startswith(f"algorithm.reference: {broken}: 1 of the reference model's ")
    assert said.endswith("parameters hold NaN or infinity: 'decoder.final_layernorm.weight'")


def _push_away(_rank: int, model: Path, coefs: tuple[float, ...]) -> list[tuple[float, float]]:
    """For each coefficient: KL, and how far the weights have come, after some updates."""
    context = join_groups(Topology(tp=1, pp=1, dp=1), device=torch.device("cpu"))
    ends = []
    for coef in coefs:
        config = RunConfig(
            model=ModelConfig(path=str(model), dtype="fp32"),
            train=TrainConfig(micro_batch_size=8, weight_decay=0.0, eps=1e-4, clip_grad=0.0),
            algorithm=AlgorithmConfig(kl_coef=coef, kl_kind="k2"),
        )
        actor = build_actor(config, context)
        start = {name: tensor.clone() for name, tensor in actor.parameters().items()}
        batch = batch_of(actor.shape.vocab)
        for _ in range(12):
            actor.update(batch, tau_sample=1.0, lr=1e-3)
        moved = [(p - start[name]).square().sum() for name, p in actor.parameters().items()]
        ends.append((actor.score(batch, tau_sample=1.0).kl, float(torch.stack(moved).sum().sqrt())))
    return ends


def test_a_large_penalty_keeps_the_model_where_it_was(models: Any) -> None:
    """Answers and weights: the larger, the closer."""
    [((free_kl, free), (held_kl, held), (bound_kl, bound))] = run_ranks(
        _push_away, 1, model=models[0], coefs=(1e-9, 1.0, 30.0)
    )
    assert free_kl > 1.5 * held_kl > 10 * bound_kl > 0
    assert free > held > bound > 0


def _score(_rank: int, models: tuple[Path, Path]) -> list[tuple[float, float]]:
    """Before and after an update; then with other temperatures."""
    context = join_groups(Topology(tp=1, pp=1, dp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(models[0]), dtype="fp32"),
        train=TrainConfig(micro_batch_size=2),
        algorithm=AlgorithmConfig(kl_coef=0.5, kl_kind="k1", reference=str(models[1])),
    )
    actor = build_actor(config, context)
    batch = random_examples(actor.shape.vocab)
    before = {name: tensor.clone() for name, tensor in _weights_of(actor).items()}
    results = [actor.score(batch, tau_sample=1.0)]
    results.append(actor.update(batch, tau_sample=1.0, lr=1e-2))
    results.append(actor.score(batch, tau_sample=1.0, tau_train=2.0))
    for name, tensor in _weights_of(actor).items():
        assert torch.equal(tensor, before[name]), f"{name}: the reference has changed"
        assert not tensor.requires_grad
    return [(result.nll, result.kl or 0.0) for result in results]


def _weights_of(actor: Any) -> dict[str, Tensor]:
    return dict(actor.reference._params)


def test_the_reference_stays_and_follows_the_temperature(models: Any) -> None:
    """k1 is the difference of two log-likelihoods, so that the reference's can be told."""
    [(scored, updated, hotter)] = run_ranks(_score, 1, models=models)
    assert scored == updated
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        models[1], attn_implementation="eager", dtype=torch.float32
    )
    trained = [e for e in random_examples(theirs.config.vocab_size) if e.trained]
    for (nll, kl), tau in ((updated, 1.0), (hotter, 2.0)):
        with torch.no_grad():
            logprobs_T = torch.cat([response_logprobs(theirs, e, tau) for e in trained])
        assert -nll - kl == pytest.approx(logprobs_T.mean().item(), abs=1e-5)
