"""How vLLM lays out a model over its tensor-parallel ranks."""

from collections.abc import Mapping

from osft_mcore.config.divide import VOCAB_PADDING
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import vllm_layouts


def engine_layouts(shape: ModelShape, topology: Topology) -> dict[int, Mapping[str, Layout]]:
    """Layouts of every rank's engine parameters, by global rank and vLLM name."""
    tp = topology.rollout_tp
    by_tp_rank = [shard_layouts(shape, tp=tp, tp_rank=tp_rank) for tp_rank in range(tp)]
    return {place.rank: by_tp_rank[place.rollout_tp_rank] for place in topology.all_coordinates()}


def shard_layouts(shape: ModelShape, *, tp: int, tp_rank: int) -> Mapping[str, Layout]:
    """Layouts of one tensor-parallel rank, by vLLM name."""
    padded = -(-shape.vocab // VOCAB_PADDING) * VOCAB_PADDING
    return vllm_layouts(shape, tp=tp, tp_rank=tp_rank, vocab_padded=padded)
