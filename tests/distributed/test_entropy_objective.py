"""The entropy as the objective; and the temperature of the loss, which may be the sampler's."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from test_training_oracle import load_reference, random_examples, response_log_softmax
from torch_engine import build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.actor.result import UpdateResult
from osft_mcore.config.check import check
from osft_mcore.config.schema import (
    AlgorithmConfig,
    AnnealingConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example
from osft_mcore.train.osft import open_loop
from osft_mcore.train.sft import run_sft
from osft_mcore.train.start import build_actor

ONE = Topology(tp=1, pp=1, dp=1)
TAU_TRAIN, COEF, NUM_UPDATES = 0.7, 3.0, 3


def _updates(_rank: int, folder: Path, tp: int) -> list[UpdateResult]:
    """On one batch: updates, and the score after the last."""
    context = join_groups(Topology(tp=tp, pp=1, dp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=ParallelConfig(tp=tp),
        train=TrainConfig(lr=1e-4, micro_batch_size=2, weight_decay=0.0),
        algorithm=AlgorithmConfig(objective="entropy", entropy_coef=COEF, tau_train=TAU_TRAIN),
    )
    actor = build_actor(config, context)
    batch = random_examples(actor.shape.vocab)
    updates = [actor.update(batch, tau_sample=1.0, lr=1e-4) for _ in range(NUM_UPDATES)]
    return [*updates, actor.score(batch, tau_sample=1.0)]


def plain_entropy(folder: Path) -> tuple[float, float]:
    """Mean entropy of the batch by transformers, and its gradient norm by autograd."""
    model = load_reference(folder)
    trained = [e for e in random_examples(model.config.vocab_size) if e.trained]
    log_p_TV = torch.cat([response_log_softmax(model, e, TAU_TRAIN) for e in trained])
    entropy = -(log_p_TV.exp() * log_p_TV).sum(dim=-1).mean()
    entropy.backward()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return entropy.item(), float(torch.stack(norms).norm())


@pytest.mark.parametrize("tp", [1, 2])
def test_an_update_lowers_the_entropy_by_its_own_gradient(tmp_path: Path, tp: int) -> None:
    """The first one's loss and gradient norm are those of plain autograd."""
    folder = save_random_model(tmp_path / "model")
    expected, grad_norm = plain_entropy(folder)
    results = run_ranks(_updates, tp, folder=folder, tp=tp)[0]
    assert results[0].entropy == pytest.approx(expected, rel=1e-5)
    assert results[0].grad_norm == pytest.approx(COEF * grad_norm, rel=1e-4)
    for result in results:
        assert result.loss == pytest.approx(COEF * result.entropy, rel=1e-6)
    entropies = [result.entropy for result in results]
    assert entropies == sorted(entropies, reverse=True)
    assert entropies[-1] < 0.99 * entropies[0]


def follow_config(start: Start, out: Path, *, top_p: float) -> RunConfig:
    """Three steps of one update; tau_sample 0.6, 0.8, 1."""
    config = toy_config(start, out, ONE)
    annealing = AnnealingConfig(mode="linear", end_tau=1.0, steps=2)
    return replace(
        config,
        rollout=replace(config.rollout, annealing=annealing, top_p=top_p),
        train=replace(config.train, steps=3, prompts_per_update=8),
        algorithm=AlgorithmConfig(objective="entropy", follow_tau_sample=True),
        evaluation=EvaluationConfig(),
    )


def _follow(_rank: int, start: Start, out: Path, top_p: float) -> list[tuple[Any, ...]]:
    """Per update: temperatures, mean -log p of the sampler, and what the actor found."""
    context = join_groups(ONE, device=torch.device("cpu"))
    config = follow_config(start, out, top_p=top_p)
    check(config, world_size=1, phase="train", device="cpu")
    seen = []
    with open_loop(config, context, Console(enabled=False), build_torch_engine) as loop:
        real_update = loop.actor.update

        def update(
            examples: Sequence[Example], *, tau_train: float, tau_sample: float, lr: float
        ) -> UpdateResult:
            result = real_update(examples, tau_train=tau_train, tau_sample=tau_sample, lr=lr)
            logprobs = [lp for e in examples for lp in e.rollout_logprobs or ()]
            seen.append((tau_train, tau_sample, -sum(logprobs) / len(logprobs), result))
            return result

        loop.actor.update = update
        loop.sync.push()
        loop.fit()
    return seen


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_loss_follows_the_annealed_temperature(tmp_path: Path, top_p: float) -> None:
    """Also where the sampler reports log-probabilities at another one, because of top_p."""
    start = write_start(tmp_path / "start")
    [seen] = run_ranks(_follow, 1, start=start, out=tmp_path / "run", top_p=top_p)
    taus = pytest.approx([0.6, 0.8, 1.0])
    assert [tau_train for tau_train, *_ in seen] == taus
    records = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [record["rollout/tau_sample"] for record in records] == taus
    assert [record["loss/tau_train"] for record in records] == taus
    for record, (tau_train, tau_sample, nll, result) in zip(records, seen, strict=True):
        assert tau_sample == (tau_train if top_p == 1.0 else 1.0)
        assert record["loss/loss"] == pytest.approx(record["loss/entropy"], rel=1e-5)
        # The sampler's own figure, at the temperature that it used.
        same = result.nll == pytest.approx(nll, abs=1e-5)
        assert same == (tau_train == tau_sample)


def _sft(_rank: int, start: Start, out: Path) -> None:
    data, model = start
    config = RunConfig(
        output_dir=str(out),
        model=ModelConfig(path=str(model), dtype="fp32"),
        rollout=RolloutConfig(max_prompt_tokens=16, max_response_tokens=24),
        train=TrainConfig(steps=1, prompts_per_step=4, prompts_per_update=4, micro_batch_size=4),
        algorithm=AlgorithmConfig(tau_train=0.8),
        data=DataConfig(train=str(data / "sft.parquet")),
        checkpoint=CheckpointConfig(final=False),
    )
    check(config, world_size=1, phase="sft", device="cpu")
    run_sft(config, join_groups(ONE, device=torch.device("cpu")), Console(enabled=False))


def test_sft_tells_the_temperature_of_its_loss(tmp_path: Path) -> None:
    run_ranks(_sft, 1, start=write_start(tmp_path / "start"), out=tmp_path / "run")
    [record] = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert record["loss/tau_train"] == 0.8
