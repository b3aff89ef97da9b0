"""How Megatron-Core lays out a model over its ranks."""

from collections.abc import Mapping, Sequence

from torch import nn

from osft_mcore.config.model_shape import ModelShape, padded_vocab
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import chunk_prefix, megatron_layouts


def actor_layouts(
    shape: ModelShape, topology: Topology, *, vocab_multiple: int, transformer_engine: bool
) -> dict[int, Mapping[str, Layout]]:
    """Layouts of every rank's actor parameters, by global rank and Megatron name.

    Data-parallel copies share one value. Raises WeightError where the model does not divide.
    """
    by_stage = {
        (pp_rank, tp_rank): megatron_layouts(
            shape,
            tp=topology.tp,
            tp_rank=tp_rank,
            pp=topology.pp,
            pp_rank=pp_rank,
            vpp=topology.vpp,
            vocab_padded=padded_vocab(shape.vocab, multiple=vocab_multiple, tp=topology.tp),
            transformer_engine=transformer_engine,
        )
        for pp_rank in range(topology.pp)
        for tp_rank in range(topology.tp)
    }
    return {
        place.rank: by_stage[place.pp_rank, place.tp_rank] for place in topology.all_coordinates()
    }


def named_parameters(chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
    """The parameters of a rank's model chunks, by the names of its layouts."""
    return {
        chunk_prefix(number, len(chunks)) + name: parameter
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }
