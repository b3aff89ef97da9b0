"""The actor against transformers and torch.optim.AdamW in plain code."""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from models import save_random_model
from ranks import run_ranks
from safetensors.torch import load_file
from torch import Tensor

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.export import export_hf
from osft_mcore.actor.result import UpdateResult
from osft_mcore.config.schema import (
    AlgorithmConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example
from osft_mcore.train.start import build_actor

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"kind": "qwen2", "tied": True, "vocab": 67},
    "qwen3_untied": {"kind": "qwen3", "tied": False, "vocab": 129},
    "llama_untied": {"kind": "llama", "tied": False, "vocab": 33},
}
NUM_STEPS, NUM_EXAMPLES, MICRO_BATCH, TP = 3, 8, 2, 2
TAU_TRAIN, TAU_SAMPLE = 0.8, 0.6
# Weight decay and clipping are strong, so that getting either wrong moves weights by far more
# than the tolerance: an undecayed norm of 1 stands 3 * LR * 1.0 = 3e-4 from a decayed one.
TRAIN = TrainConfig(lr=1e-4, weight_decay=1.0, clip_grad=0.25, micro_batch_size=MICRO_BATCH)


def random_examples(vocab: int) -> list[Example]:
    """Given answers (no rollout log-probabilities), every fourth kept out of the loss."""
    rng = random.Random(11)

    def ids(low: int, high: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab) for _ in range(rng.randint(low, high)))

    return [
        Example(prompt_token_ids=ids(1, 6), response_token_ids=ids(1, 12), trained=i % 4 != 3)
        for i in range(NUM_EXAMPLES)
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    loss: float
    grad_norm: float
    entropy: float


def load_reference(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )


def response_log_softmax(model: Any, example: Example, tau: float) -> Tensor:
    """log softmax(z / tau) at the positions that predict the response, [response, vocab]."""
    ids = torch.tensor([example.prompt_token_ids + example.response_token_ids])
    logits = model(ids).logits[0]
    first = len(example.prompt_token_ids) - 1
    return torch.log_softmax(logits[first:-1] / tau, dim=-1)


def response_logprobs(model: Any, example: Example, tau: float) -> Tensor:
    log_p = response_log_softmax(model, example, tau)
    return log_p.gather(1, torch.tensor(example.response_token_ids)[:, None])[:, 0]


def plain_adamw(model: Any) -> torch.optim.Optimizer:
    """Megatron's rule: every 1-D parameter (norms, biases) is left out of weight decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": TRAIN.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=TRAIN.lr, betas=(TRAIN.beta1, TRAIN.beta2), eps=TRAIN.eps,
    )  # fmt: skip


def train_plainly(folder: Path) -> tuple[list[Step], dict[str, Tensor]]:
    """The whole batch, one example at a time, without padding."""
    model = load_reference(folder)
    optimizer = plain_adamw(model)
    trained = [e for e in random_examples(model.config.vocab_size) if e.trained]
    num_tokens = sum(len(e.response_token_ids) for e in trained)
    steps = []
    for _ in range(NUM_STEPS):
        optimizer.zero_grad()
        loss, entropy = 0.0, 0.0
        for example in trained:
            part = -response_logprobs(model, example, TAU_TRAIN).sum() / num_tokens
            part.backward()
            loss += float(part.detach())
            log_p = response_log_softmax(model, example, TAU_TRAIN).detach()
            entropy -= float((log_p.exp() * log_p).sum()) / num_tokens
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), TRAIN.clip_grad)
        optimizer.step()
        steps.append(Step(loss=loss, grad_norm=float(norm), entropy=entropy))
    return steps, {name: p.detach().clone() for name, p in model.named_parameters()}


def make_actor(folder: Path) -> Actor:
    context = join_groups(Topology(tp=TP, pp=1, dp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=ParallelConfig(tp=TP),
        train=TRAIN,
        algorithm=AlgorithmConfig(tau_train=TAU_TRAIN),
    )
    return build_actor(config, context)


def _train(rank: int, folder: Path, out: Path) -> list[UpdateResult]:
    actor = make_actor(folder)
    examples = random_examples(actor.shape.vocab)
    results = [actor.update(examples, tau_sample=1.0, lr=TRAIN.lr) for _ in range(NUM_STEPS)]
    export_hf(actor, out, max_shard_bytes=2**30, bucket_bytes=2**12)
    return results


@pytest.fixture(scope="module", params=MODELS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp(request.param), **MODELS[request.param])


def test_training_equals_transformers_with_adamw(folder: Path, tmp_path: Path) -> None:
    steps, weights = train_plainly(folder)
    for results in run_ranks(_train, TP, folder=folder, out=tmp_path / "hf"):
        for found, expected in zip(results, steps, strict=True):
            assert found.loss == pytest.approx(expected.loss, abs=1e-5)
            assert found.nll == pytest.approx(expected.loss, abs=1e-5), "token mean, one batch"
            assert found.entropy == pytest.approx(expected.entropy, abs=1e-5)
            assert found.grad_norm == pytest.approx(expected.grad_norm, rel=1e-4)
            assert found.agreement is None, "given answers have nothing to agree with"
    assert min(step.grad_norm for step in steps) > 2 * TRAIN.clip_grad
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert exported.keys() == weights.keys()
    for name, tensor in exported.items():
        difference = float((tensor - weights[name]).abs().max())
        assert difference <= 1e-5, f"{name}: {difference}"


def sampled_examples(folder: Path) -> list[Example]:
    """As a rollout engine would return them: transformers' log-probabilities, two replicas."""
    model = load_reference(folder)
    with torch.no_grad():
        return [
            replace(
                example,
                rollout_logprobs=tuple(response_logprobs(model, example, TAU_SAMPLE).tolist()),
                replica=i % 2,
            )
            for i, example in enumerate(random_examples(model.config.vocab_size))
        ]


def perturbed(examples: list[Example], position: int, by: float) -> list[Example]:
    """The last token of one example off by `by`."""
    example = examples[position]
    assert example.rollout_logprobs is not None
    logprobs = (*example.rollout_logprobs[:-1], example.rollout_logprobs[-1] + by)
    return [
        *examples[:position], replace(example, rollout_logprobs=logprobs), *examples[position + 1 :]
    ]  # fmt: skip


def _score(rank: int, folder: Path, batches: dict[str, list[Example]]) -> dict[str, UpdateResult]:
    actor = make_actor(folder)
    results = {name: actor.score(b, tau_sample=TAU_SAMPLE) for name, b in batches.items()}
    results["update"] = actor.update(batches["same"], tau_sample=TAU_SAMPLE, lr=TRAIN.lr)
    results["after"] = actor.score(batches["same"], tau_sample=TAU_SAMPLE)
    if rank == 0:
        actor.parameters()["decoder.final_layernorm.weight"][0] = torch.nan
    results["nan"] = actor.score(batches["same"], tau_sample=TAU_SAMPLE)
    return results


@pytest.fixture(scope="module")
def same(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Example]]:
    folder = save_random_model(tmp_path_factory.mktemp("scored"), **MODELS["qwen2_tied"])
    return folder, sampled_examples(folder)


@pytest.fixture(scope="module")
def scored(same: tuple[Path, list[Example]]) -> dict[str, UpdateResult]:
    folder, examples = same
    batches = {
        "same": examples,
        "trained, replica 0": perturbed(examples, 2, 0.25),
        "untrained, replica 1": perturbed(examples, 3, -0.5),
        "again": examples,
    }
    by_rank = run_ranks(_score, TP, folder=folder, batches=batches)
    agreements = [{name: r.agreement for name, r in results.items()} for results in by_rank]
    assert all(part == agreements[0] for part in agreements), "every rank reports the same"
    return by_rank[0]


@pytest.mark.parametrize("name", ["same", "update"])
def test_actor_agrees_with_transformers_at_the_sampling_temperature(
    scored: dict[str, UpdateResult], name: str
) -> None:
    agreement = scored[name].agreement
    assert agreement is not None
    assert len(agreement.max_by_replica) == TP
    assert 0 < agreement.mean <= agreement.max <= 1e-4


@pytest.mark.parametrize(
    ("name", "replica", "by"), [("trained, replica 0", 0, 0.25), ("untrained, replica 1", 1, 0.5)]
)
def test_one_wrong_logprob_is_its_replicas_maximum(
    same: tuple[Path, list[Example]],
    scored: dict[str, UpdateResult],
    name: str,
    replica: int,
    by: float,
) -> None:
    """Whether or not its response is trained on; the other replica stays clean."""
    agreement = scored[name].agreement
    assert agreement is not None
    assert agreement.max_by_replica[replica] == agreement.max == pytest.approx(by, abs=1e-4)
    assert agreement.max_by_replica[1 - replica] <= 1e-4
    num_tokens = sum(len(example.response_token_ids) for example in same[1])
    assert agreement.mean == pytest.approx(by / num_tokens, abs=1e-4)


def test_a_changed_or_broken_actor_disagrees(scored: dict[str, UpdateResult]) -> None:
    after, broken = scored["after"].agreement, scored["nan"].agreement
    assert after is not None
    assert broken is not None
    assert after.max > 1e-3
    assert broken.max_by_replica == (float("inf"), float("inf"))


def test_scoring_reports_what_an_update_reports_and_changes_nothing(
    same: tuple[Path, list[Example]], scored: dict[str, UpdateResult]
) -> None:
    assert scored["same"] == scored["again"]
    assert scored["same"] == replace(scored["update"], grad_norm=0.0)
    num_trained = sum(len(e.response_token_ids) for e in same[1] if e.trained)
    assert scored["same"].num_tokens == num_trained
