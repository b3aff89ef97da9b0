"""Sequences that share a row share nothing else: each token's log-probability is its own."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch, collate
from osft_mcore.actor.reference import Reference
from osft_mcore.actor.splitting import Rows, rows_of
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology, topology_of
from osft_mcore.records import Example
from osft_mcore.train.start import build_actor

VOCAB = 67
# The two of 9 are neighbours; all together are odd, so that two ranks pad them.
LENGTHS = (14, 9, 9, 1, 6)
PROMPT = 3


def example(length: int, seed: int) -> Example:
    rng = random.Random(seed)
    ids = tuple(rng.randrange(VOCAB) for _ in range(PROMPT + length))
    return Example(prompt_token_ids=ids[:PROMPT], response_token_ids=ids[PROMPT:])


class LogProbs(NamedTuple):
    """By sequence and response token."""

    padded: tuple[Tensor, ...]
    packed: tuple[Tensor, ...]
    one_changed: list[tuple[Tensor, ...]]
    """Packed with other tokens in sequence i."""


def log_probs(_rank: int, folder: Path, tp: int) -> LogProbs:
    context = join_groups(Topology(tp=tp, pp=1, dp=1), device=torch.device("cpu"))
    reference = Reference(
        read_model_shape(folder),
        context,
        source=ModelConfig(path=str(folder), dtype="fp32"),
        parallel=ParallelConfig(tp=tp, sequence_parallel=tp > 1),
        seed=1,
    )
    before = [example(length, seed) for seed, length in enumerate(LENGTHS)]

    def batch(examples: list[Example], *, packed: bool) -> MicroBatch:
        return collate(examples, [1.0] * len(examples), Rows(packed=packed, row_multiple=tp))

    batches = [batch(before, packed=False), batch(before, packed=True)]
    for place, length in enumerate(LENGTHS):
        changed = [*before[:place], example(length, 99), *before[place + 1 :]]
        batches.append(batch(changed, packed=True))
    found = [
        scored.reference_logprobs_T.split(LENGTHS) for scored in reference.score(batches, tau=0.7)
    ]
    return LogProbs(padded=found[0], packed=found[1], one_changed=found[2:])


@pytest.mark.parametrize("tp", [1, 2])
def test_packed_sequences_do_not_see_each_other(tmp_path: Path, tp: int) -> None:
    folder = save_random_model(tmp_path / "model", "qwen3", vocab=VOCAB)
    found: LogProbs
    for found in run_ranks(log_probs, tp, folder=folder, tp=tp):
        for padded_T, packed_T in zip(found.padded, found.packed, strict=True):
            assert torch.allclose(packed_T, padded_T, rtol=0, atol=1e-6)
        for place, after in enumerate(found.one_changed):
            for number, (then_T, now_T) in enumerate(zip(found.packed, after, strict=True)):
                assert torch.equal(then_T, now_T) == (number != place), f"{place} -> {number}"


def computed(_rank: int, folder: Path, max_tokens: int | None) -> tuple[list[list[int]], float]:
    """Shapes of the tokens of the forward passes of an update, and what it calls padding."""
    context = join_groups(Topology(tp=1, pp=1, dp=1), device=torch.device("cpu"))
    config = RunConfig(
        model=ModelConfig(path=str(folder), dtype="fp32"),
        train=TrainConfig(micro_batch_size=5, max_tokens_per_micro_batch=max_tokens),
    )
    actor = build_actor(config, context)
    shapes: list[list[int]] = []

    def note(_model: Any, given: tuple[Any, ...], _by_name: dict[str, Any]) -> None:
        shapes.append(list(given[0].shape))

    actor.chunks[0].register_forward_pre_hook(note, with_kwargs=True)
    batch = [example(length, seed) for seed, length in enumerate(LENGTHS)]
    return shapes, actor.update(batch, tau_sample=1.0, lr=0.0).padding_share


def test_a_budget_leaves_no_padding(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "model", "qwen3", vocab=VOCAB)
    (found,) = run_ranks(computed, 1, folder=folder, max_tokens=30)
    # Lengths with the prompts: 17, 12, 12, 4, 9.
    assert found == ([[1, 26], [1, 28]], 0.0)
    ((shapes, share),) = run_ranks(computed, 1, folder=folder, max_tokens=None)
    assert shapes == [[5, 17]]
    assert share == pytest.approx(1 - 54 / 85)


LONG = 512


def kept_bytes(_rank: int, folder: Path, cp: int) -> int:
    """What the forward pass of one long sequence keeps for the backward pass, on this rank."""
    parallel = ParallelConfig(cp=cp)
    context = join_groups(topology_of(parallel, rollout_tp=1), device=torch.device("cpu"))
    actor = build_actor(
        RunConfig(model=ModelConfig(path=str(folder), dtype="fp32"), parallel=parallel), context
    )
    rows = rows_of(parallel, packed=True)
    batch = collate([example(LONG - PROMPT, 1)], [1.0], rows)
    share = batch.share(cp=cp, cp_rank=context.coordinates.cp_rank)
    weights = {x.untyped_storage().data_ptr() for x in actor.chunks[0].parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with megatron_device(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        share.forward(actor.chunks[0])
    return sum(kept.values())


def test_a_cut_sequence_keeps_its_share_of_memory(tmp_path: Path) -> None:
    """No mask and no gathered keys either: these would grow with the square of the length."""
    folder = save_random_model(tmp_path / "model", "qwen3", vocab=VOCAB)
    (whole,) = run_ranks(kept_bytes, 1, folder=folder, cp=1)
    for share in run_ranks(kept_bytes, 2, folder=folder, cp=2):
        assert 0.4 <= share / whole <= 0.55
