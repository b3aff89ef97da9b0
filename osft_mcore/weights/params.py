"""The dense decoder as one table: every parameter under its names, and how each side lays it out.

Families differ only in switches of ModelShape; nothing here asks for the family.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.parallel.topology import chunk_layers
from osft_mcore.weights.layout import Interval, Layout, cut, padded, whole

Split = Literal["none", "columns", "qkv", "gate_up", "vocab"]
"""How tensor parallelism cuts a parameter.

none: every rank holds all of it. columns: dim 1 in equal parts (row-parallel linear).
qkv: fused attention input, the one place where Megatron-Core and vLLM order rows differently.
gate_up: this rank's rows of gate, then of up. vocab: padded, then dim 0 in equal parts.
"""

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One parameter: the Hugging Face tensors that it fuses, and its names on the other sides."""

    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape, in fusion order."""
    megatron: str
    """Name in the local spec."""
    transformer_engine: str
    """Name in the Transformer Engine spec."""
    vllm: str
    split: Split

    @property
    def dim(self) -> int:
        """The dim that every side cuts."""
        return 1 if self.split == "columns" else 0


def hf_tensors(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Hugging Face checkpoint of this model.

    A tied model has no lm_head.weight.
    """
    return {
        name: tensor_shape
        for parameter in _all_parameters(shape)
        for name, tensor_shape in parameter.tensors
    }


def hf_layouts(shape: ModelShape) -> dict[str, Layout]:
    """Every Hugging Face tensor as itself, whole: the endpoint of loading and exporting."""
    return {
        name: Layout(
            shape=tensor_shape,
            dim=parameter.dim,
            intervals=whole(name, tensor_shape[parameter.dim]),
        )
        for parameter in _all_parameters(shape)
        for name, tensor_shape in parameter.tensors
    }


def megatron_layouts(
    shape: ModelShape,
    *,
    tp: int,
    tp_rank: int,
    pp: int,
    pp_rank: int,
    vocab_padded: int,
    transformer_engine: bool,
    vpp: int = 1,
) -> dict[str, Layout]:
    """Layout of every parameter of one Megatron-Core stage, over all its model chunks, by name.

    Layers are numbered from 0 in each chunk. A tied model on several stages has a copy of the
    embedding as the output layer. Raises WeightError where the model does not divide.
    """
    if pp * vpp > shape.num_layers:
        raise WeightError(
            f"parallel.pp * vpp = {pp} * {vpp} = {pp * vpp} model chunks, but the model has "
            f"{shape.num_layers} layers"
        )
    first, last = (0, 0), (pp - 1, vpp - 1)
    chunks = chunk_layers(shape.num_layers, pp=pp, vpp=vpp, pp_rank=pp_rank)
    layouts = {}
    for chunk, layers in enumerate(chunks):
        parameters = [_embedding(shape)] if (pp_rank, chunk) == first else []
        for local, layer in enumerate(layers):
            parameters += _layer(shape, hf_layer=layer, megatron_layer=local)
        if (pp_rank, chunk) == last:
            parameters.append(_final_norm(shape))
            if not shape.tied or pp > 1:
                parameters.append(_output(shape))
        for p in parameters:
            name = p.transformer_engine if transformer_engine else p.megatron
            layouts[chunk_prefix(chunk, vpp) + name] = _layout(
                p,
                tp=tp,
                tp_rank=tp_rank,
                vocab_padded=vocab_padded,
                qkv=cut(_interleaved_qkv(p, shape), tp_rank, tp) if p.split == "qkv" else (),
            )
    return layouts


def chunk_prefix(chunk: int, vpp: int) -> str:
    """What tells the parameters of a stage's model chunks apart; nothing where there is one."""
    return f"chunks.{chunk}." if vpp > 1 else ""


def vllm_layouts(
    shape: ModelShape, *, tp: int, tp_rank: int, vocab_padded: int
) -> dict[str, Layout]:
    """Layout of every parameter of one vLLM tensor-parallel rank, by vLLM's name.

    Raises WeightError where the model does not divide.
    """
    return {
        p.vllm: _layout(
            p,
            tp=tp,
            tp_rank=tp_rank,
            vocab_padded=vocab_padded,
            qkv=_separate_qkv(p, shape, tp, tp_rank) if p.split == "qkv" else (),
        )
        for p in _all_parameters(shape)
    }


def _layout(
    p: Parameter, *, tp: int, tp_rank: int, vocab_padded: int, qkv: tuple[Interval, ...]
) -> Layout:
    name, tensor_shape = p.tensors[0]
    num_rows = tensor_shape[p.dim]
    match p.split:
        case "none":
            intervals = whole(name, num_rows)
        case "columns":
            intervals = cut(whole(name, num_rows), tp_rank, tp)
        case "vocab":
            intervals = cut(padded(name, num_rows, vocab_padded), tp_rank, tp)
        case "gate_up":
            gate, up = (cut(whole(tensor, size[0]), tp_rank, tp) for tensor, size in p.tensors)
            intervals = gate + up
        case "qkv":
            intervals = qkv
    length = sum(interval.length for interval in intervals)
    local_shape = (*tensor_shape[: p.dim], length, *tensor_shape[p.dim + 1 :])
    return Layout(shape=local_shape, dim=p.dim, intervals=intervals)


def _interleaved_qkv(p: Parameter, shape: ModelShape) -> tuple[Interval, ...]:
    """Megatron-Core's order over all ranks: per key/value group its query heads, key, value.

    Ranks take equal parts of this run, through the groups if there are fewer than ranks
    (megatron/core/transformer/attention.py, get_query_key_value_tensors).
    """
    groups = shape.num_kv_heads
    return tuple(
        interval
        for group in range(groups)
        for name, tensor_shape in p.tensors
        for interval in cut(whole(name, tensor_shape[0]), group, groups)
    )


def _separate_qkv(p: Parameter, shape: ModelShape, tp: int, tp_rank: int) -> tuple[Interval, ...]:
    """vLLM's order: this rank's rows of q, of k, of v.

    With more ranks than key/value heads, each head is held by tp / heads neighbouring ranks
    (vllm/model_executor/layers/linear.py, QKVParallelLinear).
    """
    kv_heads = shape.num_kv_heads
    if max(tp, kv_heads) % min(tp, kv_heads):
        raise WeightError(
            f"vLLM cannot share {kv_heads} key/value heads among {tp} ranks: one number must "
            "divide the other; change rollout.tp"
        )
    kv_parts = min(tp, kv_heads)
    kv_part = tp_rank * kv_parts // tp
    (query, query_shape), *key_value = p.tensors
    intervals = cut(whole(query, query_shape[0]), tp_rank, tp)
    for name, tensor_shape in key_value:
        intervals += cut(whole(name, tensor_shape[0]), kv_part, kv_parts)
    return intervals


def _all_parameters(shape: ModelShape) -> Iterator[Parameter]:
    yield _embedding(shape)
    for layer in range(shape.num_layers):
        yield from _layer(shape, hf_layer=layer, megatron_layer=layer)
    yield _final_norm(shape)
    if not shape.tied:
        yield _output(shape)


def _embedding(shape: ModelShape) -> Parameter:
    return Parameter(
        tensors=((EMBEDDING, (shape.vocab, shape.hidden)),),
        megatron="embedding.word_embeddings.weight",
        transformer_engine="embedding.word_embeddings.weight",
        vllm=EMBEDDING,
        split="vocab",
    )


def _final_norm(shape: ModelShape) -> Parameter:
    return Parameter(
        tensors=(("model.norm.weight", (shape.hidden,)),),
        megatron="decoder.final_layernorm.weight",
        transformer_engine="decoder.final_layernorm.weight",
        vllm="model.norm.weight",
        split="none",
    )


def _output(shape: ModelShape) -> Parameter:
    return Parameter(
        tensors=((EMBEDDING if shape.tied else OUTPUT, (shape.vocab, shape.hidden)),),
        megatron="output_layer.weight",
        transformer_engine="output_layer.weight",
        vllm=OUTPUT,
        split="vocab",
    )


def _layer(shape: ModelShape, *, hf_layer: int, megatron_layer: int) -> list[Parameter]:
    """The parameters of one layer, in Megatron-Core's order."""
    query, key_value = (n * shape.head_dim for n in (shape.num_heads, shape.num_kv_heads))
    norm, head_norm = (shape.hidden,), (shape.head_dim,)

    def row(
        tensors: dict[str, tuple[int, ...]],
        megatron: str,
        vllm: str,
        split: Split,
        transformer_engine: str | None = None,
    ) -> Parameter:
        return Parameter(
            tensors=tuple((f"model.layers.{hf_layer}.{k}", v) for k, v in tensors.items()),
            megatron=f"decoder.layers.{megatron_layer}.{megatron}",
            transformer_engine=f"decoder.layers.{megatron_layer}.{transformer_engine or megatron}",
            vllm=f"model.layers.{hf_layer}.{vllm}",
            split=split,
        )

    def qkv(kind: str, *columns: int) -> Parameter:
        sizes = {"q": query, "k": key_value, "v": key_value}
        tensors = {f"self_attn.{n}_proj.{kind}": (size, *columns) for n, size in sizes.items()}
        fused, vllm = f"self_attention.linear_qkv.{kind}", f"self_attn.qkv_proj.{kind}"
        return row(tensors, fused, vllm, "qkv")

    # Hugging Face tensors and shapes; Megatron-Core name; vLLM name; split; Transformer Engine
    # name where it fuses the norm into the linear that follows.
    # fmt: off
    return [
        row({"input_layernorm.weight": norm}, "input_layernorm.weight", "input_layernorm.weight",
            "none", "self_attention.linear_qkv.layer_norm_weight"),
        qkv("weight", shape.hidden),
        *([qkv("bias")] if shape.qkv_bias else []),
        *([row({f"self_attn.{n}_norm.weight": head_norm},
               f"self_attention.{n}_layernorm.weight", f"self_attn.{n}_norm.weight", "none")
           for n in "qk"] if shape.qk_norm else []),
        row({"self_attn.o_proj.weight": (shape.hidden, query)},
            "self_attention.linear_proj.weight", "self_attn.o_proj.weight", "columns"),
        row({"post_attention_layernorm.weight": norm}, "pre_mlp_layernorm.weight",
            "post_attention_layernorm.weight", "none", "mlp.linear_fc1.layer_norm_weight"),
        row({f"mlp.{n}_proj.weight": (shape.ffn, shape.hidden) for n in ("gate", "up")},
            "mlp.linear_fc1.weight", "mlp.gate_up_proj.weight", "gate_up"),
        row({"mlp.down_proj.weight": (shape.hidden, shape.ffn)},
            "mlp.linear_fc2.weight", "mlp.down_proj.weight", "columns"),
    ]
    # fmt: on
