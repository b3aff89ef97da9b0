"""What a plan says an update needs, against what it takes: its tensors, and the whole process."""

import ctypes
import gc
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest
import torch
from live_memory import LiveMemory
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.actor import Actor
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import (
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import topology_of
from osft_mcore.plan.actor_memory import (
    ActorMemory,
    actor_memory,
    largest_micro_batch,
    layers_of,
)
from osft_mcore.plan.disk import disk
from osft_mcore.plan.stages import stages
from osft_mcore.records import Example
from osft_mcore.rollout.vllm_cpu import return_freed_memory
from osft_mcore.train.start import build_actor

PROMPT, RESPONSE, SEQUENCES, LR = 20, 180, 4, 1e-4
MODELS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "tied": True, "vocab": 9000, "layers": 4, "hidden": 384, "heads": 6, "kv_heads": 2,
        "head_dim": 64, "ffn": 1536,
    },
    "qwen3": {
        "tied": False, "vocab": 3001, "layers": 5, "hidden": 256, "heads": 8, "kv_heads": 4,
        "head_dim": 64, "ffn": 1280,
    },
    "llama": {
        "tied": False, "vocab": 16000, "layers": 3, "hidden": 320, "heads": 5, "kv_heads": 5,
        "head_dim": 64, "ffn": 1024,
    },
    "qwen2 of one key": {
        "tied": False, "vocab": 5000, "layers": 4, "hidden": 256, "heads": 8, "kv_heads": 1,
        "head_dim": 64, "ffn": 768,
    },
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    kind: str
    dtype: Literal["bf16", "fp32"] = "fp32"
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=lambda: TrainConfig(micro_batch_size=2))


CASES = {
    "qwen2": Case(kind="qwen2"),
    "qwen2, pp2": Case(kind="qwen2", parallel=ParallelConfig(pp=2)),
    "qwen3, bf16": Case(kind="qwen3", dtype="bf16"),
    "qwen3, tp2 and sequences": Case(
        kind="qwen3", parallel=ParallelConfig(tp=2, sequence_parallel=True)
    ),
    "qwen3, layers again": Case(
        kind="qwen3", train=TrainConfig(micro_batch_size=4, recompute="full")
    ),
    "llama, loss again": Case(
        kind="llama", train=TrainConfig(micro_batch_size=2, recompute_loss=True)
    ),
    "llama, bf16, dp2, MLP again": Case(
        kind="llama",
        dtype="bf16",
        parallel=ParallelConfig(dp=2),
        train=TrainConfig(micro_batch_size=2, recompute="selective"),
    ),
    "qwen3, cp2": Case(kind="qwen3", parallel=ParallelConfig(cp=2)),
    "qwen3, packed": Case(
        kind="qwen3",
        # Two sequences fit, as in the others.
        train=TrainConfig(micro_batch_size=2, max_tokens_per_micro_batch=2 * (PROMPT + RESPONSE)),
    ),
    "qwen2 of one key, tp2": Case(kind="qwen2 of one key", parallel=ParallelConfig(tp=2)),
}


class Measured(NamedTuple):
    """Of one rank, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    tensors: int
    """The most that an update made, beside those."""
    process: int
    """The most that the process had, above what it had before the actor."""
    saved: int
    """What this rank writes into a checkpoint."""


def config_of(case: Case, folder: Path) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(folder), dtype=case.dtype, init="random"),
        parallel=case.parallel,
        train=case.train,
    )


def examples(vocab: int) -> list[Example]:
    return [
        Example(
            prompt_token_ids=tuple((number + at) % vocab for at in range(PROMPT)),
            response_token_ids=tuple((7 * number + 3 * at) % vocab for at in range(RESPONSE)),
        )
        for number in range(SEQUENCES)
    ]


def memory_of_process(field: Literal["VmRSS", "VmHWM"]) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def return_blocks_at_once() -> None:
    """What torch frees goes back to the system, and is not kept in pieces for the next tensor.

    glibc raises its limit for this to 32 MiB by itself. Then a process held 8% to 25% more than its
    tensors with these models, most of it freed.
    """
    mmap_threshold = -3
    assert ctypes.CDLL(None).mallopt(mmap_threshold, 2**17)


def measure(_rank: int, warm_up: Path, folder: Path, case: Case) -> Measured:
    topology = topology_of(case.parallel, rollout_tp=1)
    return_blocks_at_once()
    context = join_groups(topology, device=torch.device("cpu"))
    # Libraries and groups that an update opens.
    update(config_of(case, warm_up), context)
    gc.collect()
    return_freed_memory()
    before = memory_of_process("VmRSS")
    actor = update(config_of(case, folder), context)
    # From now on the peak is that of an update alone.
    Path("/proc/self/clear_refs").write_text("5")
    batch = examples(actor.shape.vocab)
    actor.update(batch, tau_sample=0.6, lr=LR)
    process = memory_of_process("VmHWM") - before
    with LiveMemory() as made:
        actor.update(batch, tau_sample=0.6, lr=LR)
    weights, optimizer = {}, {}
    state = actor.training_state()
    for part in state:
        storage = part.tensor.untyped_storage()
        (weights if part.kind == "weight" else optimizer)[storage._cdata] = storage.nbytes()
    buffers = [buffer for chunk in actor.wrapped for buffer in chunk.buffers]
    return Measured(
        weights=sum(weights.values()),
        gradients=sum(buffer.grad_data.nbytes for buffer in buffers),
        optimizer=sum(size for at, size in optimizer.items() if at not in weights),
        tensors=made.peak,
        process=process,
        saved=sum(part.tensor.nbytes for part in state if part.owned),
    )


def update(config: RunConfig, context: ParallelContext) -> Actor:
    actor = build_actor(config, context)
    actor.update(examples(actor.shape.vocab), tau_sample=0.6, lr=LR)
    return actor


def planned(case: Case, folder: Path) -> list[ActorMemory]:
    """By rank."""
    shape, parallel, train = read_model_shape(folder), case.parallel, case.train
    topology = topology_of(parallel, rollout_tp=1)
    itemsize = 2 if case.dtype == "bf16" else 4
    lengths = RolloutConfig(max_prompt_tokens=PROMPT, max_response_tokens=RESPONSE)
    by_stage = [
        actor_memory(
            shape,
            stage,
            layers_of(parallel, train, itemsize=itemsize, transformer_engine=False),
            largest_micro_batch(parallel, train, lengths),
            copies=topology.copies,
            num_micro_batches=SEQUENCES // parallel.dp // train.micro_batch_size,
        )
        for stage in stages(shape, topology, vocab_multiple=64)
    ]
    return [by_stage[place.pp_rank] for place in topology.all_coordinates()]


def total(memory: ActorMemory) -> int:
    state = memory.weights + memory.gradients + memory.optimizer
    return state + memory.activations.peak


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    warm_up = {"layers": 2, "hidden": 64, "vocab": 67}
    made = {
        name: save_random_model(root / name, name.split()[0], **sizes)
        for name, sizes in MODELS.items()
    }
    return made | {"warm-up": save_random_model(root / "warm-up", **warm_up)}


@pytest.mark.parametrize("name", CASES)
def test_an_update_takes_what_was_planned(folders: dict[str, Path], name: str) -> None:
    case = CASES[name]
    folder = folders[case.kind]
    found = run_ranks(
        measure,
        case.parallel.world_size,
        warm_up=folders["warm-up"],
        folder=folder,
        case=case,
    )
    for rank, (expected, at) in enumerate(zip(planned(case, folder), found, strict=True)):
        where = f"{name}, rank {rank}: found {at}, planned {expected}"
        assert (at.weights, at.gradients) == (expected.weights, expected.gradients), where
        # Ranks that share a state get equal parts up to the rounding of buffers.
        assert at.optimizer == pytest.approx(expected.optimizer, rel=1e-4), where
        assert at.tensors == pytest.approx(expected.activations.peak, rel=0.05), where
        assert at.process == pytest.approx(total(expected), rel=0.15), where
    shape, topology = read_model_shape(folder), topology_of(case.parallel, rollout_tp=1)
    itemsize = 2 if case.dtype == "bf16" else 4
    held = stages(shape, topology, vocab_multiple=64)
    written = disk(shape, held, CheckpointConfig(), tp=topology.tp, itemsize=itemsize)
    assert sum(at.saved for at in found) == written.checkpoint
