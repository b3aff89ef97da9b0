"""How fast a step was, in tokens and floating-point operations, and the memory that it took."""

import resource
from collections.abc import Mapping, Sequence
from typing import Final

import torch

from osft_mcore.actor.actor import Actor
from osft_mcore.config.schema import ModelConfig
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.train.flops import PEAK_TFLOPS, training_flops

OTHER_PEAKS: Final = ("PCIe", "NVL", "GB200", "GH200")
"""Names of devices that share a name with these, but not the peak."""


def performance_metrics(
    actor: Actor, *, lengths: Sequence[int], seconds: Mapping[str, float], num_sampled: int = 0
) -> dict[str, float]:
    """Of one step; `lengths` of the sequences that it trained on. Collective over the world.

    `seconds` of the phases as metrics name them (time/rollout_s, time/train_s).
    """
    context = actor.context
    peak = peak_tflops(actor.model, context.device)
    flops = training_flops(actor.shape, lengths) / context.topology.world_size
    return {
        **rates(
            lengths,
            num_sampled=num_sampled,
            num_ranks=context.topology.world_size,
            flops=flops,
            seconds=seconds,
            peak_tflops=peak,
        ),
        **peak_memory(context),
    }


def rates(
    lengths: Sequence[int],
    *,
    num_sampled: int,
    num_ranks: int,
    flops: float,
    seconds: Mapping[str, float],
    peak_tflops: float | None,
) -> dict[str, float]:
    """Tokens a second, over all ranks and of one; `flops` are of one. No phase, no rate of it."""
    found: dict[str, float] = {}
    if rollout_s := seconds.get("time/rollout_s"):
        found["perf/rollout_tokens_per_s"] = num_sampled / rollout_s
        found["perf/rollout_tokens_per_s_per_rank"] = num_sampled / rollout_s / num_ranks
    if train_s := seconds.get("time/train_s"):
        tflops = flops / train_s / 1e12
        found["perf/train_tokens_per_s"] = sum(lengths) / train_s
        found["perf/train_tokens_per_s_per_rank"] = sum(lengths) / train_s / num_ranks
        found["perf/train_tflops_per_rank"] = tflops
        if peak_tflops is not None:
            found["perf/mfu"] = tflops / peak_tflops
    return found


def peak_tflops(model: ModelConfig, device: torch.device) -> float | None:
    """What the device could do at most; None where it is not known, or the model is fp32."""
    if device.type != "cuda" or model.dtype != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    if any(part in name for part in OTHER_PEAKS):
        return None
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def peak_memory(context: ParallelContext) -> dict[str, float]:
    """GiB that the neediest rank has held at most since its start. Collective over the world."""
    own = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20]
    if context.device.type == "cuda":
        own.append(torch.cuda.max_memory_allocated(context.device) / 2**30)
    names = ("perf/peak_host_memory_gib", "perf/peak_gpu_memory_gib")
    worst = map(max, zip(*all_gather_json(own, context), strict=True))
    return dict(zip(names, worst, strict=False))
