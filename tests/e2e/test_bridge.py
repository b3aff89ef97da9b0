"""Pushed weights are the exported weights: in the pushed engine, in stock vLLM, in transformers."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from engines_vllm import (
    BLOCK,
    examples_of,
    join,
    largest,
    largest_difference,
    random_prompts,
    run_config,
    sampling,
    start_engine,
    stock_answers,
)
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.export import export_hf
from osft_mcore.config.check import check
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import SyncConfig, TrainConfig
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Response
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor
from osft_mcore.weights.alias import Mode

QWEN2_TIED: dict[str, Any] = {"kind": "qwen2", "tied": True, "vocab": 67}
QWEN2_SHARED_KV: dict[str, Any] = {"kind": "qwen2", "tied": True, "vocab": 301, "kv_heads": 1}
QWEN3: dict[str, Any] = {"kind": "qwen3", "tied": False, "vocab": 129}
LLAMA: dict[str, Any] = {"kind": "llama", "tied": False, "vocab": 255}
MISTRAL: dict[str, Any] = {"kind": "mistral", "tied": False, "vocab": 190, "sliding_window": None}
# Every family but Mistral (Llama's code there) meets rollout.tp 2; every vocabulary is
# padded on both sides, differently.
COMBINATIONS = {
    "tp1 dp2 -> 2": (Topology(tp=1, pp=1, dp=2, rollout_tp=2), QWEN2_TIED),
    "tp2 -> 1": (Topology(tp=2, pp=1, dp=1, rollout_tp=1), QWEN3),
    "tp2 -> 2": (Topology(tp=2, pp=1, dp=1, rollout_tp=2), LLAMA),
    # One key/value head: both rollout ranks hold it.
    "pp2 -> 2": (Topology(tp=1, pp=2, dp=1, rollout_tp=2), QWEN2_SHARED_KV),
    "tp2 pp2 -> 1": (Topology(tp=2, pp=2, dp=1, rollout_tp=1), MISTRAL),
    "tp2 pp2 -> 2": (Topology(tp=2, pp=2, dp=1, rollout_tp=2), QWEN3),
}
MODES: dict[str, Mode] = {"tp2 -> 1": "copy", "pp2 -> 2": "reload", "tp2 pp2 -> 1": "reload"}
"""The other combinations take `auto`."""
NUM_PUSHES = 2
NUM_PROMPTS = 9
"""Of each data-parallel rank. Odd: replicas get different numbers of them."""
ASKED = (sampling(1.0), sampling(0.6))
TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Push:
    """What the engine answered after one push, by ASKED, and what the actor made of it."""

    responses: list[list[Response]]
    actor_difference: float
    """max |rollout - actor| log-probability, as the gate of the next update sees it."""


def push_and_sample(
    _rank: int, folder: Path, out: Path, topology: Topology, mode: Mode
) -> list[Push]:
    """Update, push, export, sample; twice. The export of push i is `out`/i."""
    context = join(topology)
    num_prompts = NUM_PROMPTS * topology.dp
    train = TrainConfig(
        prompts_per_step=num_prompts, prompts_per_update=num_prompts, micro_batch_size=3
    )
    sync_config = SyncConfig(mode=mode, verify="full")
    config = run_config(folder, topology, train=train, sync=sync_config)
    check(config, world_size=topology.world_size, phase="train", device="cpu", need_files=False)
    shape = read_model_shape(folder)
    actor, engine = build_actor(config, context), start_engine(config, context)
    sync = build_sync(config, actor, engine)
    sync.push()
    prompts = random_prompts(num_prompts, vocab=shape.vocab, prefix=BLOCK + 12)
    trained_on = engine.generate(prompts, ASKED[0])
    pushes = []
    for push in range(NUM_PUSHES):
        actor.update(examples_of(trained_on), tau_sample=1.0, lr=0.02)
        sync.push()
        export_hf(actor, out / str(push), max_shard_bytes=2**30, bucket_bytes=2**20)
        responses = [engine.generate(prompts, how) for how in ASKED]
        trained_on = responses[0]
        agreement = actor.score(examples_of(trained_on), tau_sample=1.0).agreement
        assert agreement is not None
        pushes.append(Push(responses=responses, actor_difference=agreement.max))
    return pushes


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_pushed_weights_are_the_exported_ones(combination: str, tmp_path: Path) -> None:
    topology, model = COMBINATIONS[combination]
    folder = save_random_model(tmp_path / "start", hidden=128, **model)
    by_rank = run_ranks(
        push_and_sample,
        topology.world_size,
        folder=folder,
        out=tmp_path,
        topology=topology,
        mode=MODES.get(combination, "auto"),
    )
    assert all(pushes == by_rank[0] for pushes in by_rank), "ranks saw different answers"

    differences = {}
    for push, pushed in enumerate(by_rank[0]):
        assert {r.weight_version for answers in pushed.responses for r in answers} == {push + 2}
        differences[f"push {push} actor"] = pushed.actor_difference
        exported = tmp_path / str(push)
        prompts = [response.prompt for response in pushed.responses[0]]
        [stock] = run_ranks(stock_answers, 1, folder=exported, prompts=prompts, asked=ASKED)
        for how, responses, expected in zip(ASKED, pushed.responses, stock, strict=True):
            name = f"push {push} tau {how.temperature}"
            assert [list(r.token_ids) for r in responses] == [ids for ids, _ in expected], name
            differences[f"{name} stock vLLM"] = largest(
                abs(mine - theirs)
                for response, (_, logprobs) in zip(responses, expected, strict=True)
                for mine, theirs in zip(response.token_logprobs, logprobs, strict=True)
            )
            differences[f"{name} transformers"] = largest_difference(exported, responses, how)
    # Not max(): it passes over a NaN that does not come first.
    assert all(difference <= TOLERANCE for difference in differences.values()), differences
    _assert_updates_show(by_rank[0], [folder, tmp_path / "0", tmp_path / "1"])


def _assert_updates_show(pushes: list[Push], folders: list[Path]) -> None:
    """Weights that are one update old would be far outside the tolerance."""
    for pushed, stale in zip(pushes, folders, strict=False):
        assert largest_difference(stale, pushed.responses[0], ASKED[0]) > 100 * TOLERANCE
