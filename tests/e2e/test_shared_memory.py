"""Shared memory between actor and real vLLM: the same results as copies, without their memory."""

import gc
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from engines_vllm import examples_of, join, random_prompts, run_config, sampling, start_engine
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.result import UpdateResult
from osft_mcore.config.check import check
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import SyncConfig, TrainConfig
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Response
from osft_mcore.rollout.vllm_cpu import return_freed_memory
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor
from osft_mcore.weights.sync import PushReport

TP2 = Topology(tp=2, pp=1, dp=1, rollout_tp=2)
VOCAB = 4096
"""Padded by nobody: 4096 = 16 * 128 * tp."""
NUM_STEPS = 2
NUM_PROMPTS = 6


@dataclass(frozen=True, kw_only=True)
class Run:
    """What one rank saw of a short run."""

    responses: list[list[Response]]
    updates: list[UpdateResult]
    reports: list[PushReport]
    weights: dict[str, torch.Tensor]
    """The actor's, at the end."""
    resident: int
    """Bytes that this process took until after the first push; what it was forked with aside."""
    engine_bytes: int
    """Of the engine's parameters."""
    qkv_bytes: int


def resident_bytes() -> int:
    """What is in use; alias mode returns freed memory to the system, so both have to."""
    gc.collect()
    return_freed_memory()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def train(_rank: int, folder: Path, mode: str, dtype: str) -> Run:
    """Push, sample, train; as the loop does."""
    inherited = resident_bytes()
    context = join(TP2)
    options = TrainConfig(
        prompts_per_step=NUM_PROMPTS, prompts_per_update=NUM_PROMPTS, micro_batch_size=3
    )
    config = run_config(folder, TP2, train=options, sync=SyncConfig(mode=mode, verify="full"))  # type: ignore[arg-type]
    config = replace(config, model=replace(config.model, dtype=dtype))
    check(config, world_size=2, phase="train", device="cpu", need_files=False)
    actor, engine = build_actor(config, context), start_engine(config, context)
    sync = build_sync(config, actor, engine)
    reports = [sync.push()]
    resident = resident_bytes() - inherited
    params = engine.begin_update()
    engine.finish_update(sync.version)
    sizes = {name: param.numel() * param.element_size() for name, param in params.items()}
    prompts = random_prompts(NUM_PROMPTS, vocab=VOCAB)
    all_responses, updates = [], []
    for step in range(NUM_STEPS):
        responses = engine.generate(prompts, sampling(0.6, step=step))
        sync.close()
        updates.append(actor.update(examples_of(responses), tau_sample=0.6, lr=1e-3))
        reports.append(sync.push())
        all_responses.append(responses)
    all_responses.append(engine.generate(prompts, sampling(0.0)))
    return Run(
        responses=all_responses,
        updates=updates,
        reports=[replace(report, **NO_SECONDS) for report in reports],
        weights={name: param.clone() for name, param in actor.parameters().items()},
        resident=resident,
        engine_bytes=sum(sizes.values()),
        qkv_bytes=sum(size for name, size in sizes.items() if ".qkv_proj." in name),
    )


NO_SECONDS = dict.fromkeys(("seconds", "pack_s", "transfer_s", "write_s", "verify_s"), 0.0)


@pytest.mark.parametrize(
    ("kv_heads", "dtype"), [(4, "fp32"), (2, "bf16")], ids=["two groups a rank", "one group a rank"]
)
def test_alias_saves_the_shard_and_changes_nothing_else(
    kv_heads: int, dtype: str, tmp_path: Path
) -> None:
    folder = save_random_model(
        tmp_path, "qwen2", vocab=VOCAB, hidden=512, heads=8, head_dim=64, kv_heads=kv_heads,
        layers=6, ffn=1536,
    )  # fmt: skip
    assert read_model_shape(folder).vocab == VOCAB
    copies, aliases = (
        run_ranks(train, 2, folder=folder, mode=mode, dtype=dtype) for mode in ("copy", "alias")
    )
    for copied, aliased in zip(copies, aliases, strict=True):
        assert aliased.responses == copied.responses
        assert aliased.updates == copied.updates
        assert all(torch.equal(aliased.weights[name], w) for name, w in copied.weights.items())
        copies_of_qkv = copied.qkv_bytes if kv_heads == 4 else 0
        for report in aliased.reports:
            assert report.bytes_received == report.bytes_least == 0
            assert report.bytes_local == 2 * copies_of_qkv
            assert report.bytes_aliased == 2 * (copied.engine_bytes - copies_of_qkv)
        assert all(r.bytes_local == 2 * copied.engine_bytes for r in copied.reports)
        saved = copied.resident - aliased.resident
        assert saved >= 0.8 * copied.engine_bytes, saved / copied.engine_bytes
