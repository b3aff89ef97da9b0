"""The table of parameters against Hugging Face, and against references written the obvious way."""

import dataclasses
import itertools
import re

import pytest
import torch
from layouts import (
    assert_equal,
    materialise,
    megatron_reference,
    model,
    random_checkpoint,
    vllm_reference,
)
from transformers import AutoConfig, AutoModelForCausalLM

from osft_mcore.config.model_shape import FAMILIES
from osft_mcore.errors import WeightError
from osft_mcore.weights.params import hf_layouts, hf_tensors, megatron_layouts, vllm_layouts
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.sides import check_sides

TP_SIZES = (1, 2, 3, 4, 6, 8)
KV_HEADS = (1, 2, 3, 4, 8, 24)


def divides(kv_heads: int, tp: int) -> bool:
    return max(kv_heads, tp) % min(kv_heads, tp) == 0


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_hf_tensors_are_those_of_transformers(model_type: str, tied: bool) -> None:
    shape = model(model_type, tied=tied)
    config = AutoConfig.for_model(
        model_type,
        num_hidden_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn,
        vocab_size=shape.vocab,
        tie_word_embeddings=tied,
    )
    with torch.device("meta"):
        reference = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(param.shape) for name, param in reference.named_parameters()}
    assert hf_tensors(shape) == expected
    num_parameters = sum(param.numel() for param in reference.parameters())
    assert shape.num_parameters == num_parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
@pytest.mark.parametrize(
    ("num_layers", "pp", "vpp"), [(3, 1, 1), (3, 2, 1), (3, 3, 1), (5, 2, 2), (6, 2, 3)]
)
def test_megatron_layouts_hold_what_fusing_then_cutting_gives(
    num_layers: int, pp: int, vpp: int, model_type: str, tied: bool
) -> None:
    for kv_heads, tp in itertools.product(KV_HEADS, TP_SIZES):
        if not divides(kv_heads, tp):
            continue
        shape = model(model_type, kv_heads=kv_heads, tied=tied, num_layers=num_layers)
        checkpoint = random_checkpoint(shape)
        padded = 128 * tp
        for pp_rank, tp_rank in itertools.product(range(pp), range(tp)):
            where = {"tp": tp, "tp_rank": tp_rank, "pp": pp, "pp_rank": pp_rank, "vpp": vpp}
            layouts = megatron_layouts(
                shape, **where, vocab_padded=padded, transformer_engine=False
            )
            expected = megatron_reference(shape, checkpoint, **where, padded=padded)
            assert_equal({n: materialise(at, checkpoint) for n, at in layouts.items()}, expected)
            assert all(tuple(expected[n].shape) == at.shape for n, at in layouts.items())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_vllm_layouts_hold_what_fusing_and_replicating_gives(model_type: str, tied: bool) -> None:
    for kv_heads, tp in itertools.product(KV_HEADS, TP_SIZES):
        if not divides(kv_heads, tp):
            continue
        shape = model(model_type, kv_heads=kv_heads, tied=tied)
        checkpoint = random_checkpoint(shape)
        padded = 144 if tp in (3, 6) else 128
        for tp_rank in range(tp):
            layouts = vllm_layouts(shape, tp=tp, tp_rank=tp_rank, vocab_padded=padded)
            expected = vllm_reference(shape, checkpoint, tp=tp, tp_rank=tp_rank, padded=padded)
            assert_equal({n: materialise(at, checkpoint) for n, at in layouts.items()}, expected)


def test_every_actor_layout_reaches_every_rollout_layout() -> None:
    num_pairs = 0
    for kv_heads, actor_tp, tp in itertools.product(KV_HEADS, TP_SIZES, (1, 2, 4, 8)):
        if not divides(kv_heads, actor_tp) or not divides(kv_heads, tp):
            continue
        pp, vpp = ((1, 1), (2, 1), (2, 2))[num_pairs % 3]
        num_layers = max(3, pp * vpp)
        shape = model("qwen2", kv_heads=kv_heads, tied=actor_tp % 2 == 0, num_layers=num_layers)
        checkpoint = random_checkpoint(shape)
        where = [
            {"tp": actor_tp, "tp_rank": tp_rank, "pp": pp, "pp_rank": pp_rank, "vpp": vpp}
            for pp_rank, tp_rank in itertools.product(range(pp), range(actor_tp))
        ]
        padded = 128 * actor_tp
        sources = {
            rank: megatron_layouts(shape, **at, vocab_padded=padded, transformer_engine=False)
            for rank, at in enumerate(where)
        }
        params = [megatron_reference(shape, checkpoint, **at, padded=padded) for at in where]
        targets = {
            rank: vllm_layouts(shape, tp=tp, tp_rank=rank, vocab_padded=128) for rank in range(tp)
        }
        plan = make_plan(sources, targets)
        check_sides(sources, targets)
        found = [
            {name: torch.full(at.shape, torch.nan) for name, at in targets[rank].items()}
            for rank in range(tp)
        ]
        for copy in plan.copies:
            rows = params[copy.src_rank][copy.src_param].narrow(
                copy.dim, copy.src_start, copy.length
            )
            target = found[copy.dst_rank][copy.dst_param]
            target.narrow(copy.dim, copy.dst_start, copy.length).copy_(rows)
        for padding in plan.paddings:
            target = found[padding.rank][padding.param]
            target.narrow(padding.dim, padding.start, padding.length).zero_()
        for rank in range(tp):
            expected = vllm_reference(shape, checkpoint, tp=tp, tp_rank=rank, padded=128)
            assert_equal(found[rank], expected)
        num_pairs += 1
    assert num_pairs == 103


@pytest.mark.parametrize("tied", [True, False])
def test_each_chunk_holds_its_own_layers_and_the_ends_of_the_model(tied: bool) -> None:
    """Nine layers on two stages of two chunks: three, then two each."""
    shape = model(tied=tied, num_layers=9)
    held: dict[tuple[int, str], set[str]] = {}
    for pp_rank in range(2):
        where = {"tp": 1, "tp_rank": 0, "pp": 2, "pp_rank": pp_rank, "vpp": 2, "vocab_padded": 101}
        for name, layout in megatron_layouts(shape, **where, transformer_engine=False).items():
            chunk = ".".join(name.split(".")[:2])
            owners = {re.sub(r"(layers\.\d+)\..*", r"\1", i.tensor or "") for i in layout.intervals}
            held.setdefault((pp_rank, chunk), set()).update(owners)
    head = "model.embed_tokens.weight" if tied else "lm_head.weight"

    def layers(*numbers: int) -> set[str]:
        return {f"model.layers.{number}" for number in numbers}

    assert held == {
        (0, "chunks.0"): {"model.embed_tokens.weight", *layers(0, 1, 2)},
        (1, "chunks.0"): layers(3, 4),
        (0, "chunks.1"): layers(5, 6),
        (1, "chunks.1"): {"model.norm.weight", head, *layers(7, 8)},
    }


def test_transformer_engine_differs_from_the_local_spec_in_norm_names_only() -> None:
    where = {"tp": 2, "tp_rank": 1, "pp": 1, "pp_rank": 0, "vocab_padded": 256}
    local = megatron_layouts(model("qwen3"), **where, transformer_engine=False)
    fused = megatron_layouts(model("qwen3"), **where, transformer_engine=True)
    assert list(local.values()) == list(fused.values())
    renamed = {a: b for a, b in zip(local, fused, strict=True) if a != b}
    assert renamed == {
        f"decoder.layers.{i}.{a}": f"decoder.layers.{i}.{b}"
        for i in range(3)
        for a, b in (
            ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
            ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
        )
    }


def test_hf_layouts_are_the_tensors_themselves() -> None:
    shape = model("qwen3")
    checkpoint = random_checkpoint(shape)
    layouts = hf_layouts(shape)
    assert_equal({n: materialise(at, checkpoint) for n, at in layouts.items()}, checkpoint)


def test_a_model_that_does_not_divide_is_refused_by_name() -> None:
    shape = dataclasses.replace(model(), num_heads=24, ffn=50)
    at = {"tp_rank": 0, "vocab_padded": 128}
    with pytest.raises(WeightError, match=r"4 equal parts of the 50 rows .*gate_proj"):
        vllm_layouts(shape, tp=4, **at)
    with pytest.raises(WeightError, match="share 4 key/value heads among 6 ranks"):
        vllm_layouts(model(), tp=6, tp_rank=0, vocab_padded=144)
    with pytest.raises(WeightError, match="101 rows, more than the padded size 100"):
        vllm_layouts(model(), tp=1, tp_rank=0, vocab_padded=100)
    for pp, vpp in ((4, 1), (2, 2)):
        with pytest.raises(WeightError, match=f"{pp} \\* {vpp} = 4 model chunks.*has 3 layers"):
            megatron_layouts(
                model(), tp=1, pp=pp, pp_rank=0, vpp=vpp, transformer_engine=False, **at
            )
