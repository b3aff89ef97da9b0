"""Which tensor of a torch_dist checkpoint is which parameter of the model.

Its tensors are those of one rank that has the whole model, under the names of the Transformer
Engine spec, which Megatron-Core gives to the local spec too. By default all layers are one tensor
with a first axis for the layer; `non_homogeneous_layers` keeps them apart, and
`singleton_local_shards` also the two halves of linear_fc1.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

from osft_mcore.checkpoint.torch_dist_metadata import Stored
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import chunk_layers
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import megatron_layouts

IGNORED: Final = re.compile(r"(chained_[0-9]+\.|optimizer\.)")
"""Keys of tensors that are not the model's start like this."""
PREFIXES: Final = ("", "module.", "model.")
"""What the model's keys start with: nothing in Megatron-LM, a wrapper's name in NeMo."""

_EMBEDDING: Final = "embedding.word_embeddings.weight"
_LAYER: Final = re.compile(r"(decoder\.layers\.)([0-9]+)\.(.+)")
_FUSED_MLP: Final = "mlp.linear_fc1.weight"
_MODEL: Final = re.compile(r"(decoder|embedding|output_layer)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """Where a parameter is: a tensor of the checkpoint, or one layer of it."""

    key: str
    layer: int | None
    """Along the tensor's first axis, which the layout leaves out."""
    layout: Layout


def stacked(name: str) -> tuple[str, int | None]:
    """Key and layer of a parameter where all layers are one tensor."""
    match = _LAYER.fullmatch(name)
    return (match[1] + match[3], int(match[2])) if match else (name, None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """The part of a tensor of the checkpoint that one shard writes."""

    key: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    offsets: tuple[int, ...]
    """Of the part in the tensor."""
    layout: Layout
    """Of the part, without the axis of the layers."""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The part's shape, with the axis of the layers."""
        return (1,) * (len(self.shape) - len(self.layout.shape)) + self.layout.shape


def boxes_of_shard(
    shape: ModelShape, *, tp: int, tp_rank: int, pp: int, pp_rank: int, vocab_padded: int
) -> dict[str, Box]:
    """What one (tp, pp) shard writes, by parameter; all layers of the model are one tensor.

    What all tensor-parallel ranks hold is written by the first. Raises WeightError where the model
    does not divide.
    """
    if pp > shape.num_layers:
        raise WeightError(f"pp is {pp}, but the model has {shape.num_layers} layers")
    whole, part = (
        _layouts(shape, tp=parts, tp_rank=rank, vocab_padded=vocab_padded)
        for parts, rank in ((1, 0), (tp, tp_rank))
    )
    (layers,) = chunk_layers(shape.num_layers, pp=pp, vpp=1, pp_rank=pp_rank)
    boxes = {}
    for name, layout in part.items():
        key, layer = stacked(name)
        is_here = pp_rank == _stage(name, pp) if layer is None else layer in layers
        is_copy = tp_rank > 0 and layout.shape == whole[name].shape
        if not is_here or is_copy:
            continue
        stack, at = ((), ()) if layer is None else ((shape.num_layers,), (layer,))
        parts = _halves(layout) if key.endswith(_FUSED_MLP) else {"": layout}
        for number, (suffix, piece) in enumerate(parts.items()):
            offsets = [0] * len(piece.shape)
            offsets[piece.dim] = (number * tp + tp_rank) * piece.shape[piece.dim]
            boxes[name + suffix] = Box(
                key=key,
                shape=(*stack, *whole[name].shape),
                offsets=(*at, *offsets),
                layout=piece,
            )
    return boxes


def state_keys(shape: ModelShape, *, transformer_engine: bool) -> list[str]:
    """Keys of the states, all empty, that the modules of a model ask a checkpoint for."""
    modules = ["self_attention.linear_proj", "self_attention.linear_qkv"]
    modules += ["mlp.linear_fc1", "mlp.linear_fc2"]
    if transformer_engine:
        modules.append("self_attention.core_attention")
        if shape.qk_norm:
            modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{shape.num_layers}"
        for layer in range(shape.num_layers)
        for module in modules
    ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"] if transformer_engine else keys


def find_homes(stored: Stored, shape: ModelShape) -> tuple[dict[str, Home], list[str]]:
    """Where each parameter of the whole model is, by name, and what is wrong with the checkpoint.

    That is: parameters that are missing or of another shape, and keys of the model that no
    parameter has. The vocabulary may be padded to any size.
    """
    prefix = next((p for p in PREFIXES if p + _EMBEDDING in stored.tensors), "")
    homes: dict[str, Home] = {}
    problems: dict[str, None] = {}
    for names, layout in _parameters(shape, vocab_padded=_vocab_padded(stored, prefix, shape)):
        found = next((at for at in _candidates(names, layout) if _all_in(stored, prefix, at)), None)
        if found is None:
            problems[f"{_generic(names[0])} is missing"] = None
            continue
        for name, home in found.items():
            homes[name] = replace(home, key=prefix + home.key)
            stack = () if home.layer is None else (shape.num_layers,)
            size, expected = stored.tensors[prefix + home.key].shape, (*stack, *home.layout.shape)
            if size != expected:
                problems[f"{prefix + home.key} has shape {size}, expected {expected}"] = None
    used = {home.key for home in homes.values()}
    for key in sorted({*stored.tensors} - used | _foreign_objects(stored, prefix)):
        problems[f"{key!r} is unexpected in a model of type {shape.model_type}"] = None
    return homes, list(problems)


def _parameters(
    shape: ModelShape, *, vocab_padded: int
) -> Iterator[tuple[tuple[str, str], Layout]]:
    """Every parameter of the whole model, with its names in both specs."""
    by_engine, by_local = (
        _layouts(
            shape,
            tp=1,
            tp_rank=0,
            vocab_padded=vocab_padded,
            transformer_engine=transformer_engine,
        )
        for transformer_engine in (True, False)
    )
    for (name, layout), local_name in zip(by_engine.items(), by_local, strict=True):
        yield (name, local_name), layout


def _vocab_padded(stored: Stored, prefix: str, shape: ModelShape) -> int:
    embedding = stored.tensors.get(prefix + _EMBEDDING)
    rows = embedding.shape[0] if embedding is not None and embedding.shape else 0
    return max(rows, shape.vocab)


def _candidates(names: tuple[str, str], layout: Layout) -> Iterator[Mapping[str, Home]]:
    """The ways in which a parameter may be stored, each as parameters and their homes."""
    for name in dict.fromkeys(names):
        stacked_key, layer = stacked(name)
        for key, at in dict.fromkeys([(name, None), (stacked_key, layer)]):
            yield {name: Home(key=key, layer=at, layout=layout)}
            if key.endswith(_FUSED_MLP):
                yield {
                    name + suffix: Home(key=key + suffix, layer=at, layout=half)
                    for suffix, half in _halves(layout).items()
                }


def _halves(layout: Layout) -> dict[str, Layout]:
    """Gate and up of a linear_fc1, by Megatron-Core's suffix for each."""
    gate, up = (
        Layout(shape=(at.length, *layout.shape[1:]), dim=0, intervals=(at,))
        for at in layout.intervals
    )
    return {"_w": gate, "_v": up}


def _layouts(
    shape: ModelShape,
    *,
    tp: int,
    tp_rank: int,
    vocab_padded: int,
    transformer_engine: bool = True,
) -> dict[str, Layout]:
    """Of every parameter, on one tensor-parallel rank without pipeline stages."""
    return megatron_layouts(
        shape,
        tp=tp,
        tp_rank=tp_rank,
        pp=1,
        pp_rank=0,
        vocab_padded=vocab_padded,
        transformer_engine=transformer_engine,
    )


def _stage(name: str, pp: int) -> int:
    """The stage of a parameter that is in no layer."""
    return 0 if name == _EMBEDDING else pp - 1


def _all_in(stored: Stored, prefix: str, homes: Mapping[str, Home]) -> bool:
    return all(prefix + home.key in stored.tensors for home in homes.values())


def _generic(name: str) -> str:
    """A parameter by its layers' common key: one message for all of them."""
    return stacked(name)[0]


def _foreign_objects(stored: Stored, prefix: str) -> set[str]:
    """Objects of the model that are not Transformer Engine's state of a layer."""
    return {
        key
        for key in stored.objects
        if key.startswith(prefix)
        and _MODEL.match(key.removeprefix(prefix))
        and "._extra_state" not in key
    }
