"""How long a step may take, under the assumptions of plan/assumptions.py."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass

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
    SUM_S,
    Gpu,
)
from osft_mcore.train.flops import training_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """One step: a rollout batch, its updates, a push."""

    rollout: float
    forward_backward: float
    layers: float
    """Sums over tensor-parallel ranks in layers, and messages between pipeline stages."""
    copies: float
    """Over ranks with the same weights: summing gradients, as if nothing hid it, and gathering the
    updated weights."""
    optimizer: float
    """Its steps, and what train.offload moves for them."""
    push: float

    @property
    def total(self) -> float:
        """One after the other."""
        return float(sum(astuple(self)))


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

    Every decode step reads the weights, every token the keys and values before it, and every layer
    sums twice over rollout.tp; prefill hides that behind its products. Slots are filled again as
    answers end; the last to end is a longest one.
    """
    flops = 2.0 * shape.num_parameters / rollout.tp
    concurrent = max(1, min(concurrent, num_sequences))
    tokens = num_sequences * lengths.response
    steps = max(tokens / concurrent - lengths.response, 0.0) + lengths.longest_response
    bandwidth = gpu.hbm_gb_s * 1e9 * HBM_SHARE
    compute = gpu.peak_tflops * 1e12 * MFU
    cache = tokens * (lengths.prompt + lengths.response / 2) * kv_bytes_per_token
    launch = LAUNCH_S_PER_LAYER if rollout.enforce_eager else GRAPH_S_PER_LAYER
    sums = 0.0
    if rollout.tp > 1:
        # A ring moves 2 (n - 1) / n of what it sums, here bf16.
        moved = 4.0 * (rollout.tp - 1) / rollout.tp * shape.hidden / bandwidth_of(rollout.tp)
        sums = 2 * shape.num_layers * (steps * SUM_S + tokens * moved)
    # Kernels are launched while those before them compute.
    decode = max(
        max((steps * weight_bytes + cache) / bandwidth, tokens * flops / compute) + sums,
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
) -> float:
    """Of all updates of a step on sequences of these lengths."""
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
    return flops / (gpu.peak_tflops * 1e12 * MFU)


def layer_seconds(
    shape: ModelShape,
    topology: Topology,
    *,
    positions: float,
    itemsize: int,
    sequence_parallel: bool,
    recompute: Recompute,
    with_reference: bool,
) -> float:
    """Of `positions` in all, what ranks of one model tell each other of their hidden states.

    A layer sums them over tp after attention and after the MLP, forward and backward, and again
    where it is computed again. A stage sends those of each chunk on, and their gradients back.
    """
    tp, passes = topology.tp, 1 if with_reference else 0
    hidden = positions / topology.copies * shape.hidden * itemsize
    sums = {"none": 4, "selective": 5, "full": 6}[recompute] + 2 * passes
    summed = sums * shape.num_layers / topology.pp * 2 * hidden * (tp - 1) / tp
    sent = 0.0
    if topology.pp > 1:
        sent = (2 + passes) * topology.vpp * hidden / (tp if sequence_parallel else 1)
    return summed / bandwidth_of(tp) + sent / bandwidth_of(topology.world_size)


def pipeline_factor(topology: Topology, micro_batches: float) -> float:
    """By how much waiting lengthens an update of so many micro-batches a rank.

    A pipeline of pp stages fills and empties in (pp - 1) / vpp of them.
    """
    return 1 + (topology.pp - 1) / topology.vpp / max(micro_batches, 1.0)


def copies_seconds(
    gradient_bytes: int, weight_bytes: int, topology: Topology, *, sharded: bool
) -> float:
    """Of one update: rings over the ranks that hold the same weights.

    `sharded`: each gets its part of the gradients, and the others' updated weights.
    """
    moved = gradient_bytes + (weight_bytes if sharded else gradient_bytes)
    return moved * (topology.copies - 1) / topology.copies / bandwidth_of(topology.world_size)


def optimizer_seconds(gpu: Gpu, *, touched: int, moved: int) -> float:
    """Of one update: `touched` bytes are read and written, `moved` ones come from the host and go.

    Both of one rank.
    """
    return 2 * touched / (gpu.hbm_gb_s * 1e9 * HBM_SHARE) + 2 * moved / (HOST_GB_S * 1e9)


def bandwidth_of(num_ranks: int) -> float:
    """Bytes a second between two of so many consecutive ranks, which may be on different nodes."""
    return (NODE_GB_S if num_ranks <= GPUS_PER_NODE else NETWORK_GB_S) * 1e9
