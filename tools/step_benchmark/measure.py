"""Times whole optimizer updates on one batch of sequences whose lengths have a long tail."""

import json
import math
import random
import statistics
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

import torch

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.result import UpdateResult
from osft_mcore.actor.splitting import Rows
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from osft_mcore.parallel.groups import alone
from osft_mcore.records import Example

Way = Literal["budget", "longest of the batch", "longest of its four"]
BASELINES: Final[tuple[Way, ...]] = ("longest of the batch", "longest of its four")
FIXED: Final = 4
VOCAB: Final = 8192
SPREAD: Final = 0.9
"""Standard deviation of the answers' log lengths: the longest tenth holds a third of the tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Ours against micro-batches of four padded to `baseline`; seconds are medians over rounds."""

    baseline: Way
    num_sequences: int
    num_tokens: int
    longest: int
    max_tokens_per_micro_batch: int
    padding_share: float
    baseline_padding_share: float
    seconds: float
    baseline_seconds: float
    speedup: float
    """baseline_seconds / seconds."""
    loss_difference: float
    """Relative; the two computed the same."""


def lengths(num: int, *, median: int, longest: int, seed: int) -> list[int]:
    """Tokens of the answers: log-normal, cut off at `longest`, which the first one has."""
    generator = random.Random(seed)
    drawn = [int(median * generator.lognormvariate(0, SPREAD)) for _ in range(num - 1)]
    return [longest, *(max(1, min(longest, length)) for length in drawn)]


def measure(
    *, num_sequences: int, median: int, longest: int, prompt: int, budget: int, rounds: int
) -> list[Row]:
    """`rounds` updates each way, in turns, of a random model on one rank of this machine."""
    answers = lengths(num_sequences, median=median, longest=longest, seed=1)
    batch = _examples(answers, prompt)
    total = sum(example.num_tokens for example in batch)
    ways: tuple[Way, ...] = ("budget", *BASELINES)
    with tempfile.TemporaryDirectory() as folder, alone() as context:
        model = _write_model(Path(folder) / "model", prompt + longest)
        actor = Actor(
            read_model_shape(model),
            context,
            model=ModelConfig(path=str(model), init="random", dtype="fp32"),
            parallel=ParallelConfig(),
            train=TrainConfig(micro_batch_size=FIXED),
            algorithm=AlgorithmConfig(),
            max_response_tokens=longest,
            seed=1,
        )
        # A learning rate of 0: every way computes on the same weights.
        updates = {way: _update(actor, batch, way, budget)[1] for way in ways}
        seconds: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way in ways:
                seconds[way].append(_update(actor, batch, way, budget)[0])
    ours, median_s = updates["budget"], {way: statistics.median(seconds[way]) for way in ways}
    return [
        Row(
            baseline=way,
            num_sequences=num_sequences,
            num_tokens=total,
            longest=prompt + longest,
            max_tokens_per_micro_batch=budget,
            padding_share=ours.padding_share,
            baseline_padding_share=updates[way].padding_share,
            seconds=median_s["budget"],
            baseline_seconds=median_s[way],
            speedup=median_s[way] / median_s["budget"],
            loss_difference=abs(updates[way].loss / ours.loss - 1),
        )
        for way in BASELINES
    ]


def _update(
    actor: Actor, batch: list[Example], way: Way, budget: int
) -> tuple[float, UpdateResult]:
    max_tokens = budget if way == "budget" else None
    actor.train = replace(actor.train, max_tokens_per_micro_batch=max_tokens)
    whole = max(example.num_tokens for example in batch)
    actor.rows = Rows(
        packed=max_tokens is not None,
        row_multiple=whole if way == "longest of the batch" else 1,
    )
    started = time.monotonic()
    result = actor.update(batch, tau_sample=1.0, lr=0.0)
    assert math.isfinite(result.loss), "the loss of a random model is finite"
    return time.monotonic() - started, result


def _examples(answers: list[int], prompt: int) -> list[Example]:
    generator = torch.Generator().manual_seed(2)

    def ids(num: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB, (num,), generator=generator).tolist())

    return [
        Example(prompt_token_ids=ids(prompt), response_token_ids=ids(length)) for length in answers
    ]


def _write_model(folder: Path, positions: int) -> Path:
    """The config of a random Qwen3-like model of 9M parameters."""
    folder.mkdir()
    config = {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 768,
        "max_position_embeddings": positions,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
