"""The actor's look at the answers of an evaluation: right in every layout, and at no cost."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from models import reference_logits, save_random_model
from ranks import run_ranks
from safetensors.torch import load_file
from token_examples import token_examples
from torch_engine import TorchEngine, build_torch_engine
from toy_run import read_lines, toy_config, write_start

from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from osft_mcore.evaluation.evaluator import EVALUATION_SEED_OFFSET
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology, topology_of
from osft_mcore.records import Example, Prompt, Response, Sampling
from osft_mcore.train.osft import run_osft
from osft_mcore.train.score_files import result_file
from osft_mcore.train.start import build_actor

VOCAB = 67
TAU = 0.7
# As many as no layout divides by.
EXAMPLES = token_examples(7, VOCAB)
Case = tuple[dict[str, Any], dict[str, Any]]
"""Of the options `parallel` and `train`."""
CASES: dict[int, list[Case]] = {
    1: [
        ({}, {"micro_batch_size": 1}),
        ({}, {"micro_batch_size": 4}),
        ({}, {"max_tokens_per_micro_batch": 24}),
        ({}, {"micro_batch_size": 4, "recompute": "full", "offload": "all"}),
    ],
    2: [
        ({"tp": 2}, {"micro_batch_size": 2}),
        ({"tp": 2, "sequence_parallel": True}, {"micro_batch_size": 4}),
        ({"pp": 2}, {"micro_batch_size": 3}),
        ({"pp": 2, "vpp": 2}, {"micro_batch_size": 3}),
        ({"cp": 2}, {"max_tokens_per_micro_batch": 32}),
        ({"dp": 2}, {"micro_batch_size": 2}),
        ({"dp": 2}, {"max_tokens_per_micro_batch": 24}),
    ],
    4: [({"tp": 2, "pp": 2}, {"micro_batch_size": 2}), ({"dp": 4}, {"micro_batch_size": 4})],
}


def probes(_rank: int, folder: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    found = []
    for parallel, train in cases:
        sizes = ParallelConfig(**parallel)
        context = join_groups(topology_of(sizes, rollout_tp=1), device=torch.device("cpu"))
        config = RunConfig(
            model=ModelConfig(path=str(folder), dtype="fp32"),
            parallel=sizes,
            train=TrainConfig(**train),
        )
        actor = build_actor(config, context)
        actor.rest()
        found.append(dataclasses.asdict(actor.probe(EXAMPLES, tau=TAU)))
        parallel_state.destroy_model_parallel()
    return found


def by_transformers(folder: Path, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability and entropy of every response token, one sequence at a time."""
    logprobs, entropies = [], []
    for example in examples:
        ids = torch.tensor([[*example.prompt_token_ids, *example.response_token_ids]])
        logits_SV = reference_logits(folder, ids)[0].double() / TAU
        all_SV = logits_SV[len(example.prompt_token_ids) - 1 : -1].log_softmax(-1)
        logprobs.append(all_SV.gather(1, torch.tensor(example.response_token_ids)[:, None])[:, 0])
        entropies.append(-(all_SV.exp() * all_SV).sum(-1))
    return torch.cat(logprobs), torch.cat(entropies)


def test_figures_are_those_of_the_response_tokens_in_every_layout(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model", vocab=VOCAB, layers=4)
    num_tokens = sum(len(example.response_token_ids) for example in EXAMPLES)
    expected: dict[str, Any] = {
        name: {
            "mean": float(values.mean()),
            "std": float(values.std(correction=0)),
            "max": float(values.max()),
            "min": float(values.min()),
        }
        for name, values in zip(
            ("logprob", "entropy"), by_transformers(folder, EXAMPLES), strict=True
        )
    }
    for size, cases in CASES.items():
        by_rank = run_ranks(probes, size, folder=folder, cases=cases)
        assert all(found == by_rank[0] for found in by_rank), "every rank reports the same"
        for case, found in zip(cases, by_rank[0], strict=True):
            assert found.pop("num_tokens") == num_tokens, case
            for name, figures in expected.items():
                assert found[name] == pytest.approx(figures, abs=1e-6), (case, name)


NUM_PROBED = 5


class Recorder(TorchEngine):
    """Keeps what it sampled for evaluations."""

    asked: list[tuple[Sampling, list[Response]]]

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        responses = super().generate(prompts, sampling)
        if sampling.seed >= EVALUATION_SEED_OFFSET:
            self.asked.append((sampling, responses))
        return responses


def osft(_rank: int, start: Any, out: Path, topology: Topology, probe: int) -> Any:
    """A short run; what its engine said of the answers to the first problems."""
    context = join_groups(topology, device=torch.device("cpu"))
    config = toy_config(start, out, topology)
    config = replace(
        config,
        train=replace(config.train, steps=4, offload="all"),
        # A portion has the samples of three problems.
        evaluation=replace(
            config.evaluation, every=2, probe=probe, num_samples=2, portion=6, max_problems=8
        ),
    )
    engines: list[Recorder] = []

    def build(config: RunConfig, context: ParallelContext, tokenizer: Any) -> Recorder:
        plain = build_torch_engine(config, context, tokenizer)
        plain.__class__, plain.asked = Recorder, []
        engines.append(plain)
        return plain

    run_osft(config, context, Console(enabled=False), build)
    said: dict[tuple[int, float], list[tuple[float, ...]]] = {}
    for sampling, responses in engines[0].asked:
        first = [r.token_logprobs for r in responses if r.sample_index == 0]
        said.setdefault((sampling.step, sampling.temperature), []).extend(first)
    return said


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_start(tmp_path_factory.mktemp("start"))


def test_a_run_probes_every_evaluation_and_learns_the_same(start: Any, tmp_path: Path) -> None:
    """With the engine's own log-probabilities beside, and to the bit."""
    topology = Topology(tp=2, pp=1, dp=1)
    outs = {probe: tmp_path / str(probe) for probe in (NUM_PROBED, 0)}
    said, _ = (
        run_ranks(osft, 2, start=start, out=out, topology=topology, probe=probe)[0]
        for probe, out in outs.items()
    )
    lines, without = (read_lines(out / "evaluations.jsonl") for out in outs.values())
    assert [(line["step"], line["eval/temperature"]) for line in lines] == list(said)
    assert len(said) == 4
    for line, plain, logprobs in zip(lines, without, said.values(), strict=True):
        probe = {name: value for name, value in line.items() if "/probe_" in name}
        assert len(probe) == 9
        assert {**plain, **probe} == line
        figure = {name.split("/probe_")[1]: value for name, value in probe.items()}
        assert 0 < figure["entropy_min"] < figure["entropy_mean"] < figure["entropy_max"]
        assert figure["perplexity"] == pytest.approx(math.exp(-figure["logprob_mean"]))
        step, temperature = line["step"], line["eval/temperature"]
        kept = json.loads((outs[NUM_PROBED] / result_file(step, temperature)).read_text())
        kept = kept["benchmarks"]["arithmetic"]["probe"]
        tokens = [token for answer in logprobs[:NUM_PROBED] for token in answer]
        assert kept == figure | {"num_tokens": len(tokens)}
        if temperature == 0:
            # The engine tells nothing of greedy answers; the actor looks at temperature 1.
            assert figure["logprob_std"] > 0
            continue
        assert figure["logprob_mean"] == pytest.approx(sum(tokens) / len(tokens), abs=1e-6)
        assert figure["logprob_min"] == pytest.approx(min(tokens), abs=1e-5)
        assert figure["logprob_max"] == pytest.approx(max(tokens), abs=1e-5)
    with_probe, plain = (load_file(out / "hf" / "model.safetensors") for out in outs.values())
    assert with_probe.keys() == plain.keys()
    assert all(torch.equal(with_probe[name], plain[name]) for name in plain)
