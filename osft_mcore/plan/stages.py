"""What one pipeline stage of the actor holds, in elements of one rank."""

from dataclasses import dataclass
from math import prod

from osft_mcore.config.model_shape import ModelShape, padded_vocab
from osft_mcore.parallel.topology import Topology, chunk_layers
from osft_mcore.weights.params import megatron_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One rank's share; all tensor-parallel ranks of a stage have the same sizes."""

    pp_rank: int
    chunks: tuple[int, ...]
    """Layers of every model chunk."""
    parameters: int
    largest: int
    """Of its parameters."""
    embedding: int
    """The input embedding's shard; 0 where it is not."""
    output: int
    """The output weight's shard, the tied embedding where it is that; 0 where no loss is."""
    layer_weight: int
    """The largest weight within a layer."""
    num_stages: int

    @property
    def is_first(self) -> bool:
        """It has the embedding."""
        return self.pp_rank == 0

    @property
    def is_last(self) -> bool:
        """It has the loss."""
        return self.pp_rank == self.num_stages - 1


def stages(shape: ModelShape, topology: Topology, *, vocab_multiple: int) -> tuple[Stage, ...]:
    """Every stage of the actor, in order. Raises WeightError where the model does not divide."""
    vocab = padded_vocab(shape.vocab, multiple=vocab_multiple, tp=topology.tp)
    return tuple(
        _stage(shape, topology, pp_rank=pp_rank, vocab=vocab) for pp_rank in range(topology.pp)
    )


def _stage(shape: ModelShape, topology: Topology, *, pp_rank: int, vocab: int) -> Stage:
    pp, vpp = topology.pp, topology.vpp
    layouts = megatron_layouts(
        shape,
        tp=topology.tp,
        tp_rank=0,
        pp=pp,
        pp_rank=pp_rank,
        vpp=vpp,
        vocab_padded=vocab,
        # Names alone depend on it.
        transformer_engine=False,
    )
    sizes = {name: prod(layout.shape) for name, layout in layouts.items()}
    vocab_shard = vocab // topology.tp * shape.hidden
    layers = chunk_layers(shape.num_layers, pp=pp, vpp=vpp, pp_rank=pp_rank)
    return Stage(
        pp_rank=pp_rank,
        chunks=tuple(len(part) for part in layers),
        parameters=sum(sizes.values()),
        largest=max(sizes.values()),
        embedding=vocab_shard if pp_rank == 0 else 0,
        output=vocab_shard if pp_rank == pp - 1 else 0,
        layer_weight=max(size for name, size in sizes.items() if ".layers." in name),
        num_stages=pp,
    )
