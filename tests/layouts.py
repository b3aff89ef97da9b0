"""What each rank must hold, written the obvious way: fuse whole tensors, then cut them."""

import torch
from torch import Tensor

from osft_mcore.config.model_shape import FAMILIES, ModelShape
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import hf_tensors

Tensors = dict[str, Tensor]


def model(
    model_type: str = "qwen2", *, kv_heads: int = 4, tied: bool = False, num_layers: int = 3
) -> ModelShape:
    family = FAMILIES[model_type]
    return ModelShape(
        model_type=model_type,
        num_layers=num_layers,
        hidden=24,
        num_heads=24,
        num_kv_heads=kv_heads,
        head_dim=12,
        ffn=48,
        vocab=101,
        tied=tied,
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        max_position=64,
        init_std=0.02,
    )


def random_checkpoint(shape: ModelShape) -> Tensors:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(size, generator=generator) for name, size in hf_tensors(shape).items()
    }


def materialise(layout: Layout, checkpoint: Tensors) -> Tensor:
    pieces = []
    for interval in layout.intervals:
        if interval.tensor is None:
            size = list(layout.shape)
            size[layout.dim] = interval.length
            pieces.append(torch.zeros(size))
        else:
            pieces.append(
                checkpoint[interval.tensor].narrow(layout.dim, interval.start, interval.length)
            )
    return torch.cat(pieces, dim=layout.dim)


def pad_rows(tensor: Tensor, total: int) -> Tensor:
    return torch.cat([tensor, torch.zeros(total - len(tensor), *tensor.shape[1:])])


def dealt_layers(num_layers: int, *, pp: int, vpp: int, pp_rank: int) -> list[tuple[str, int]]:
    """(place, layer) of one stage: parts of the model are dealt to the stages like cards."""
    held = []
    for turn, part in enumerate(torch.arange(num_layers).tensor_split(pp * vpp)):
        chunk, stage = divmod(turn, pp)
        prefix = f"chunks.{chunk}." if vpp > 1 else ""
        if stage == pp_rank:
            held += [(f"{prefix}decoder.layers.{i}.", n) for i, n in enumerate(part.tolist())]
    return held


def megatron_reference(
    shape: ModelShape,
    hf: Tensors,
    *,
    tp: int,
    tp_rank: int,
    pp: int,
    pp_rank: int,
    padded: int,
    vpp: int = 1,
) -> Tensors:
    """Fuse full tensors, then cut them, in the local spec's names."""
    out = {}
    first, last = ("chunks.0.", f"chunks.{vpp - 1}.") if vpp > 1 else ("", "")
    if pp_rank == 0:
        embedding = pad_rows(hf["model.embed_tokens.weight"], padded)
        out[f"{first}embedding.word_embeddings.weight"] = embedding.chunk(tp)[tp_rank]
    for dst, layer in dealt_layers(shape.num_layers, pp=pp, vpp=vpp, pp_rank=pp_rank):
        src = f"model.layers.{layer}."
        for kind in ("weight", "bias") if shape.qkv_bias else ("weight",):
            q, k, v = (hf[f"{src}self_attn.{n}_proj.{kind}"] for n in "qkv")
            groups = [t.unflatten(0, (shape.num_kv_heads, -1)) for t in (q, k, v)]
            fused = torch.cat(groups, dim=1).flatten(0, 1)
            out[f"{dst}self_attention.linear_qkv.{kind}"] = fused.chunk(tp)[tp_rank]
        gate, up = (hf[f"{src}mlp.{n}_proj.weight"].chunk(tp)[tp_rank] for n in ("gate", "up"))
        out[f"{dst}mlp.linear_fc1.weight"] = torch.cat([gate, up])
        out[f"{dst}mlp.linear_fc2.weight"] = hf[f"{src}mlp.down_proj.weight"].chunk(tp, 1)[tp_rank]
        proj = hf[f"{src}self_attn.o_proj.weight"].chunk(tp, 1)[tp_rank]
        out[f"{dst}self_attention.linear_proj.weight"] = proj
        out[f"{dst}input_layernorm.weight"] = hf[f"{src}input_layernorm.weight"]
        out[f"{dst}pre_mlp_layernorm.weight"] = hf[f"{src}post_attention_layernorm.weight"]
        for n in "qk" if shape.qk_norm else "":
            norm = hf[f"{src}self_attn.{n}_norm.weight"]
            out[f"{dst}self_attention.{n}_layernorm.weight"] = norm
    if pp_rank == pp - 1:
        out[f"{last}decoder.final_layernorm.weight"] = hf["model.norm.weight"]
        if not shape.tied or pp > 1:
            head = hf["model.embed_tokens.weight" if shape.tied else "lm_head.weight"]
            out[f"{last}output_layer.weight"] = pad_rows(head, padded).chunk(tp)[tp_rank]
    return out


def vllm_reference(
    shape: ModelShape, hf: Tensors, *, tp: int, tp_rank: int, padded: int
) -> Tensors:
    copies_of_kv = max(1, tp // shape.num_kv_heads)
    out = {}
    for name, tensor in hf.items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            out[name] = pad_rows(tensor, padded).chunk(tp)[tp_rank]
        elif name.endswith(("o_proj.weight", "down_proj.weight")):
            out[name] = tensor.chunk(tp, 1)[tp_rank]
        elif "gate_proj" in name:
            fused = [tensor.chunk(tp)[tp_rank], hf[name.replace("gate", "up")].chunk(tp)[tp_rank]]
            out[name.replace("gate_proj", "gate_up_proj")] = torch.cat(fused)
        elif "q_proj" in name:
            parts = [tensor.chunk(tp)[tp_rank]]
            for n in "kv":
                heads = hf[name.replace("q_proj", f"{n}_proj")].unflatten(
                    0, (shape.num_kv_heads, -1)
                )
                replicated = heads.repeat_interleave(copies_of_kv, dim=0)
                parts.append(replicated.chunk(tp)[tp_rank].flatten(0, 1))
            out[name.replace("q_proj", "qkv_proj")] = torch.cat(parts)
        elif "norm" in name:
            out[name] = tensor
    return out


def assert_equal(found: Tensors, expected: Tensors) -> None:
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
