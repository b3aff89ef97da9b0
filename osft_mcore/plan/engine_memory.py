"""What the rollout engine takes on one GPU, of its share rollout.gpu_memory_utilization."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import RolloutConfig
from osft_mcore.plan.activations import FP32
from osft_mcore.plan.assumptions import CUDA_GRAPHS_GIB, ENGINE_OVERHEAD_GIB, GIB, Gpu
from osft_mcore.weights.layout import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineMemory:
    """Of one rank, in bytes."""

    weights: int
    """When it starts; afterwards without what it shares with the actor."""
    activations: int
    overhead: int
    kv_cache: int
    """What is left of its share; below 0 it cannot start."""
    graphs: int
    """Beside its share."""
    kv_bytes_per_token: int
    full_sequences: int
    """Of the greatest length, that the KV cache holds at once."""

    @property
    def share(self) -> int:
        """All that vLLM takes for itself when it starts."""
        return self.weights + self.activations + self.overhead + self.kv_cache


def engine_memory(
    shape: ModelShape,
    layouts: Mapping[str, Layout],
    rollout: RolloutConfig,
    gpu: Gpu,
    *,
    itemsize: int,
) -> EngineMemory:
    """Of a rank that holds `layouts`. vLLM profiles itself before anything is shared."""
    weights = sum(prod(layout.shape) for layout in layouts.values()) * itemsize
    used = _activations(shape, rollout, gpu, itemsize)
    overhead = int(ENGINE_OVERHEAD_GIB * GIB)
    share = int(rollout.gpu_memory_utilization * gpu.memory)
    kv_cache = share - weights - used - overhead
    heads = max(1, shape.num_kv_heads // rollout.tp)
    per_token = 2 * shape.num_layers * heads * shape.head_dim * itemsize
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    return EngineMemory(
        weights=weights,
        activations=used,
        overhead=overhead,
        kv_cache=kv_cache,
        graphs=0 if rollout.enforce_eager else int(CUDA_GRAPHS_GIB * GIB),
        kv_bytes_per_token=per_token,
        full_sequences=max(0, kv_cache // (per_token * longest)),
    )


def _activations(shape: ModelShape, rollout: RolloutConfig, gpu: Gpu, itemsize: int) -> int:
    """The larger of one prefill and of sampling, as vLLM's profile run does both.

    A layer at a time: hidden states and residual, gate and up, their product. Sampling: the logits
    of all sequences over the whole vocabulary, in fp32 with two more of it for log-probabilities.
    """
    prefill = gpu.batched_tokens * (2 * shape.hidden + 3 * shape.ffn // rollout.tp) * itemsize
    sampling = rollout.max_num_seqs * shape.vocab * (itemsize + 3 * FP32)
    return max(prefill, sampling)
