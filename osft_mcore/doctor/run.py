"""What a run with given options would need of this machine."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.phases import samples, trains
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.doctor.facts import Finding, Machine, fact, gib, note, problem
from osft_mcore.parallel.topology import run_topology
from osft_mcore.plan.assumptions import GIB, GPUS, Gpu
from osft_mcore.plan.disk import Disk, disk
from osft_mcore.plan.run import plan_run
from osft_mcore.plan.stages import stages
from osft_mcore.train.room import lacking_room

ITEMSIZE: Final = {"bf16": 2, "fp32": 4}


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """How the ranks are started, or would be."""

    num_gpus: int
    """That torch can use on this host."""
    num_cores: int
    launched: int | None
    """Ranks on this host that a launcher has started; None: nobody has."""


def rank_findings(config: RunConfig, phase: Phase, start: Start) -> Iterator[Finding]:
    """Whether this host has a place for every rank. Pure."""
    topology = run_topology(config, phase)
    num = topology.world_size
    axes = " ".join(f"{axis}={size}" for axis, size in topology.actor_sizes().items())
    engines = f"; rollout tp={topology.rollout_tp}" if samples(phase) else ""
    yield fact(f"{num} ranks: actor {axes}{engines}")
    here = num if start.launched is None else start.launched
    if start.num_gpus and here > start.num_gpus:
        hosts = math.ceil(num / start.num_gpus)
        yield problem(
            f"parallel: {here} ranks on a host with {start.num_gpus} GPUs, and each needs its own; "
            f"lower parallel.tp, cp, pp or dp, or start osft with torchrun on {hosts} hosts"
        )
    if here > start.num_cores:
        yield note(f"{here} ranks on {start.num_cores} cores: they take turns")


def disk_findings(config: RunConfig, phase: Phase, shape: ModelShape) -> Iterator[Finding]:
    """Whether what the run writes has room in output_dir. Looks at the disk."""
    if not trains(phase):
        return
    needed = disk_of(config, phase, shape)
    root = Path(config.output_dir) / "checkpoints"
    yield fact(f"a checkpoint takes {gib(needed.checkpoint)}, the final model {gib(needed.export)}")
    is_asked_for = config.checkpoint.every > 0
    if is_asked_for and (lacking := lacking_room(root, needed.checkpoint)):
        yield problem(f"output_dir: {lacking}")
    elif is_asked_for and (lacking := lacking_room(root, needed.checkpoints + needed.export)):
        yield note(f"for all that the run keeps at once there is no room: {lacking}")
    elif lacking := lacking_room(root, max(needed.export, needed.checkpoint)):
        yield note(f"for the end of the run there is no room: {lacking}")


def disk_of(config: RunConfig, phase: Phase, shape: ModelShape) -> Disk:
    """Bytes that the run writes."""
    topology = run_topology(config, phase)
    held = stages(shape, topology, vocab_multiple=config.model.vocab_multiple)
    itemsize = ITEMSIZE[config.model.dtype]
    return disk(shape, held, config.checkpoint, tp=topology.tp, itemsize=itemsize)


def shm_findings(
    config: RunConfig, phase: Phase, shape: ModelShape, free: int
) -> Iterator[Finding]:
    """Whether weights that wait for scores fit into memory, if they are to lie there. Pure."""
    waiting = config.evaluation
    if phase != "train" or waiting.mode != "async":
        return
    if not waiting.snapshots.startswith("/dev/shm"):
        return
    needed = waiting.max_waiting * shape.num_parameters * ITEMSIZE[config.model.dtype]
    if needed > free:
        yield note(
            f"evaluation.snapshots: {waiting.max_waiting} sets of weights take {gib(needed)}, but "
            f"/dev/shm has {gib(free)} free; lower evaluation.max_waiting, or some go unscored"
        )


def gpu_findings(
    config: RunConfig, phase: Phase, shape: ModelShape, found: Machine, *, num_ranks: int
) -> Iterator[Finding]:
    """Whether memory is enough: surely not, or by the estimate of a plan. Pure.

    `num_ranks` are on this host.
    """
    gpus = [gpu for gpu in found.gpus if gpu.memory]
    if not gpus or not (trains(phase) or samples(phase)):
        return
    smallest = min(gpus, key=lambda gpu: gpu.memory)
    share = config.rollout.gpu_memory_utilization * smallest.memory
    least_free = min(gpu.free for gpu in gpus)
    if samples(phase) and least_free < share:
        yield problem(
            f"rollout.gpu_memory_utilization: {config.rollout.gpu_memory_utilization:g} of "
            f"{gib(smallest.memory)} is {gib(share)}, but a GPU has {gib(least_free)} free; end "
            "what uses it, or lower the share"
        )
    if phase not in ("train", "sft"):
        return
    plan = plan_run(config, shape, gpu_of(smallest.name, smallest.memory), phase=phase)
    peak = plan.peak
    yield fact(f"a plan's estimate of a GPU's memory: {gib(peak.total)} ({peak.name})")
    certain = peak.weights + peak.gradients + peak.optimizer
    if certain > smallest.memory:
        yield problem(
            f"parallel: weights, gradients and optimizer take {gib(certain)} of a GPU that has "
            f"{gib(smallest.memory)}; raise parallel.tp, pp or dp, or choose train.offload"
        )
    else:
        yield from (note(f"by that estimate it does not fit: {text}") for text in plan.problems)
    if (host := num_ranks * plan.host) > found.memory_available:
        yield note(
            f"copies in host memory (a save, train.offload, a reference) take up to {gib(host)} of "
            f"the {num_ranks} ranks here, but {gib(found.memory_available)} are available; "
            "the kernel may end them"
        )


def gpu_of(name: str, memory: int) -> Gpu:
    """What a plan takes of a GPU: its own memory, the speed of one that is known."""
    known = next((gpu for key, gpu in GPUS.items() if key.upper() in name.upper()), GPUS["h100"])
    return replace(known, gib=memory / GIB)
