"""Times a training loop without saving, with a save that it waits for, and with one it does not."""

import itertools
import json
import random
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import torch

from osft_mcore.actor.actor import Actor
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import (
    AlgorithmConfig,
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    TrainConfig,
)
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import alone
from osft_mcore.records import Example
from osft_mcore.train.checkpoints import Checkpoints

Way = Literal["none", "sync", "async"]
WAYS: Final[tuple[Way, ...]] = ("none", "sync", "async")
SEQUENCES: Final = 2
RESAMPLES: Final = 2000
VOCAB: Final = 24000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Seconds; of each part of a loop the median over rounds."""

    params: int
    checkpoint_bytes: int
    dtype: str
    num_tokens: int
    """Of an update."""
    step_s: float
    """One optimizer update, without any saving."""
    sync_s: float
    """What the loop loses to a save that it waits for."""
    async_s: float
    """What it loses to one in the background: waiting, and the cores and memory that this takes."""
    async_call_s: float
    """The part of it that passes inside the call."""
    ratio: float
    """async_s / sync_s."""
    ratio_low: float
    ratio_high: float
    """95% interval of the ratio: rounds drawn anew, with replacement."""


def measure(
    *, layers: int, dtype: Literal["bf16", "fp32"], num_tokens: int, steps: int, rounds: int
) -> Row:
    """Run `rounds` loops of `steps` updates each way, in turns, on one rank of this machine."""
    length = num_tokens // SEQUENCES
    with tempfile.TemporaryDirectory() as folder, alone() as context:
        model = _write_model(Path(folder) / "model", layers, length)
        actor = Actor(
            read_model_shape(model),
            context,
            model=ModelConfig(path=str(model), init="random", dtype=dtype),
            parallel=ParallelConfig(),
            train=TrainConfig(micro_batch_size=SEQUENCES),
            algorithm=AlgorithmConfig(),
            max_response_tokens=length,
            seed=1,
        )
        savers = {
            way: _checkpoints(Path(folder) / way, actor, background=way == "async")
            for way in ("sync", "async")
        }
        # The first updates make Adam's state, the first save what it copies into.
        for number in (1, 2):
            _loop(actor, savers["async"], number, steps, length)
        loops: dict[Way, list[list[float]]] = {way: [] for way in WAYS}
        for number in range(3, 3 + rounds):
            for way in WAYS:
                loops[way].append(_loop(actor, savers.get(way), number, steps, length))
        state = actor.training_state()
        return _row(
            loops,
            dtype=dtype,
            num_tokens=SEQUENCES * length,
            params=sum(held.tensor.numel() for held in state if held.kind == "weight"),
            num_bytes=sum(held.tensor.numel() * held.tensor.element_size() for held in state),
        )


def _row(
    loops: dict[Way, list[list[float]]],
    *,
    dtype: str,
    num_tokens: int,
    params: int,
    num_bytes: int,
) -> Row:
    lost = _lost(loops)
    # The same rounds of every way: what disturbs one of them disturbs its neighbours.
    generator, num_rounds = random.Random(0), len(loops["none"])
    ratios = []
    for _ in range(RESAMPLES):
        drawn = generator.choices(range(num_rounds), k=num_rounds)
        again = _lost({way: [rounds[i] for i in drawn] for way, rounds in loops.items()})
        ratios.append(again["async"] / again["sync"])
    percentiles = statistics.quantiles(ratios, n=40)
    return Row(
        params=params,
        checkpoint_bytes=num_bytes,
        dtype=dtype,
        num_tokens=num_tokens,
        step_s=_median_update(loops),
        sync_s=lost["sync"],
        async_s=lost["async"],
        async_call_s=statistics.median(parts[0] for parts in loops["async"]),
        ratio=lost["async"] / lost["sync"],
        ratio_low=percentiles[0],
        ratio_high=percentiles[-1],
    )


def _lost(loops: dict[Way, list[list[float]]]) -> dict[Way, float]:
    """Seconds that a loop takes longer than its updates alone.

    Of each part of a loop by itself: one slow update spoils a sum, but not a median.
    """
    update = _median_update(loops)
    lost: dict[Way, float] = {}
    for way, rounds in loops.items():
        save, *updates = (statistics.median(parts) for parts in zip(*rounds, strict=True))
        lost[way] = save + sum(updates) - len(updates) * update
    return lost


def _median_update(loops: dict[Way, list[list[float]]]) -> float:
    return statistics.median(part for _, *updates in loops["none"] for part in updates)


def _loop(
    actor: Actor, checkpoints: Checkpoints | None, number: int, steps: int, length: int
) -> list[float]:
    """Seconds of save `number`, or of none, and of each of the `steps` updates after it."""
    moments = [time.monotonic()]
    if checkpoints is not None:
        checkpoints.save(number, {})
    moments.append(time.monotonic())
    for step in range(steps):
        actor.update(_batch(step, length), tau_sample=1.0, lr=1e-6)
        moments.append(time.monotonic())
    if checkpoints is not None:
        checkpoints.settle()
    return [after - before for before, after in itertools.pairwise(moments)]


def _checkpoints(root: Path, actor: Actor, *, background: bool) -> Checkpoints:
    config = CheckpointConfig(async_=background, keep_last=1)
    return Checkpoints(root, config, actor, {}, Console(enabled=False))


def _batch(step: int, length: int) -> list[Example]:
    generator = torch.Generator().manual_seed(step)
    rows = torch.randint(0, VOCAB, (SEQUENCES, length), generator=generator).tolist()
    half = length // 2
    return [
        Example(prompt_token_ids=tuple(row[:half]), response_token_ids=tuple(row[half:]))
        for row in rows
    ]


def _write_model(folder: Path, layers: int, length: int) -> Path:
    """The config of a random Qwen3-like model; 12 layers are 200M parameters."""
    folder.mkdir()
    config = {
        "model_type": "qwen3",
        "vocab_size": VOCAB,
        "hidden_size": 1024,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "intermediate_size": 3072,
        "max_position_embeddings": 2 * length,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
