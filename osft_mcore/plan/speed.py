"""How long a step may take, under the assumptions of plan/assumptions.py."""

from collections.abc import Sequence
from dataclasses import dataclass

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import Recompute, RolloutConfig
from osft_mcore.parallel.topology import Topology
from osft_mcore.plan.assumptions import (
    GPUS_PER_NODE,
    GRAPH_S_PER_LAYER,
    HBM_SHARE,
    HOST_GB_S,
    LAUNCH_S_PER_LAYER,
    MFU,
    NETWORK_GB_S,
    NODE_GB_S,
    Gpu,
)
from osft_mcore.train.flops import training_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """One step: a rollout batch, its updates, a push."""

    rollout: float
    forward_backward: float
    gradients: float
    """Summing them over data-parallel ranks, as if nothing hid it."""
    optimizer: float
    """Its steps, and what train.offload moves for them."""
    push: float

    @property
    def total(self) -> float:
        """One after the other."""
        return self.rollout + self.forward_backward + self.gradients + self.optimizer + self.push


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of a sequence."""

    prompt: float
    response: float
    """Means."""
    longest_response: int


def rollout_seconds(
    shape: ModelShape,
    rollout: RolloutConfig,
    gpu: Gpu,
    lengths: Lengths,
    *,
    num_sequences: int,
    concurrent: int,
    weight_bytes: int,
    kv_bytes_per_token: int,
) -> float:
    """Of one replica with `num_sequences` answers to sample, `concurrent` at once.

    Every decode step reads the weights, every token the keys and values before it. Slots are
    filled again as answers end; the last to end is a longest one.
    """
    flops = 2.0 * shape.num_parameters / rollout.tp
    concurrent = max(1, min(concurrent, num_sequences))
    tokens = num_sequences * lengths.response
    steps = max(tokens / concurrent - lengths.response, 0.0) + lengths.longest_response
    bandwidth = gpu.hbm_gb_s * 1e9 * HBM_SHARE
    compute = gpu.peak_tflops * 1e12 * MFU
    cache = tokens * (lengths.prompt + lengths.response / 2) * kv_bytes_per_token
    launch = LAUNCH_S_PER_LAYER if rollout.enforce_eager else GRAPH_S_PER_LAYER
    decode = max(
        (steps * weight_bytes + cache) / bandwidth,
        tokens * flops / compute,
        steps * launch * shape.num_layers,
    )
    return num_sequences * lengths.prompt * flops / compute + decode


def forward_backward_seconds(
    shape: ModelShape,
    gpu: Gpu,
    topology: Topology,
    sequences: Sequence[float],
    *,
    positions_per_token: float,
    recompute: Recompute,
    recompute_loss: bool,
    with_reference: bool,
    micro_batches: float,
) -> float:
    """Of all updates of a step on sequences of these lengths.

    `micro_batches` of a rank and update: a pipeline of pp stages fills and empties in
    (pp - 1) / vpp of them.
    """
    needed = training_flops(shape, [round(length) for length in sequences])
    tokens = sum(sequences)
    again = {
        "none": 0.0,
        "selective": 2.0 * tokens * 3 * shape.ffn * shape.hidden * shape.num_layers,
        "full": needed / 3,
    }[recompute]
    if recompute_loss:
        again += 2.0 * tokens * shape.vocab * shape.hidden
    if with_reference:
        again += needed / 3
    flops = (needed + again) * positions_per_token / topology.world_size
    bubble = (topology.pp - 1) / topology.vpp / max(micro_batches, 1.0)
    return flops / (gpu.peak_tflops * 1e12 * MFU) * (1 + bubble)


def reduce_seconds(gradient_bytes: int, topology: Topology) -> float:
    """Of one update: a ring over the ranks that hold the same weights."""
    copies = topology.copies
    return 2 * gradient_bytes * (copies - 1) / copies / bandwidth_of(topology)


def optimizer_seconds(gpu: Gpu, *, touched: int, moved: int) -> float:
    """Of one update: `touched` bytes are read and written, `moved` ones come from the host and go.

    Both of one rank.
    """
    return 2 * touched / (gpu.hbm_gb_s * 1e9 * HBM_SHARE) + 2 * moved / (HOST_GB_S * 1e9)


def bandwidth_of(topology: Topology) -> float:
    """Bytes a second between two ranks that may be on different nodes."""
    within = topology.world_size <= GPUS_PER_NODE
    return (NODE_GB_S if within else NETWORK_GB_S) * 1e9
