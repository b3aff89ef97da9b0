"""Builds this rank's Megatron-Core GPTModel chunks; they return hidden states, not logits."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from osft_mcore.config.model_shape import ModelShape, padded_vocab
from osft_mcore.config.schema import Recompute
from osft_mcore.model.kernels import fuses_weight_gradient, uses_transformer_engine
from osft_mcore.model.local_spec import RmsNorm, local_layer_spec
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.parallel.topology import Topology, chunk_layers, layer_parts


def build_chunks(
    shape: ModelShape,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    vocab_multiple: int,
    recompute: Recompute = "none",
) -> list[nn.Module]:
    """The model chunks of this rank's pipeline stage, weights uninitialised. Every rank must call.

    A chunk maps token ids (the model's first chunk) or hidden states to hidden states; for the
    model's last chunk `output_weight` gives the vocabulary shard that turns them into logits.
    """
    topology = context.topology
    layers = chunk_layers(
        shape.num_layers, pp=topology.pp, vpp=topology.vpp, pp_rank=context.coordinates.pp_rank
    )
    chunks: list[nn.Module] = []
    with megatron_device():
        config = transformer_config(
            shape,
            context,
            dtype=dtype,
            sequence_parallel=sequence_parallel,
            recompute=recompute,
        )
        for chunk, local_layers in enumerate(layers):
            is_last = context.is_last_stage and chunk == topology.vpp - 1
            model = GPTModel(
                config,
                _layer_spec(shape, num_local_layers=len(local_layers)),
                vocab_size=padded_vocab(shape.vocab, multiple=vocab_multiple, tp=topology.tp),
                max_sequence_length=shape.max_position,
                pre_process=context.is_first_stage and chunk == 0,
                post_process=is_last,
                share_embeddings_and_output_weights=shape.tied,
                position_embedding_type="rope",
                rotary_base=shape.rope_theta,
                rope_scaling=shape.rope_scaling is not None,
                rope_scaling_factor=shape.rope_scaling.factor if shape.rope_scaling else 8.0,
                vp_stage=chunk,
            )
            _mark_tensor_parallel(model)
            if is_last:
                # The loss multiplies by the vocabulary in blocks; logits never exist whole.
                model.output_layer.forward = _hidden_states_unchanged
            chunks.append(model.to(context.device))
    return chunks


def output_weight(chunk: nn.Module) -> Tensor:
    """The last chunk's vocabulary shard [V, H]: the output layer's, or the tied embedding's."""
    model: Any = chunk
    while not isinstance(model, GPTModel):
        model = model.module
    if model.share_embeddings_and_output_weights:
        weight: Tensor = model.shared_embedding_or_output_weight()
    else:
        weight = model.output_layer.weight
    return weight


def _mark_tensor_parallel(model: nn.Module) -> None:
    """Mark sharded weights, which Megatron-Core does only while it initialises them itself.

    Unmarked, a shard counts as a copy, and the gradient norm leaves out all but rank 0's.
    """
    shard_dims = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in model.modules():
        dim = shard_dims.get(type(module))
        if dim is not None and module.weight is not None:
            set_tensor_model_parallel_attributes(module.weight, True, dim, 1)


def _hidden_states_unchanged(hidden: Tensor, **_unused: Any) -> tuple[Tensor, None]:
    return hidden, None


def transformer_config(
    shape: ModelShape,
    context: ParallelContext,
    *,
    dtype: torch.dtype,
    sequence_parallel: bool,
    recompute: Recompute,
) -> TransformerConfig:
    """Megatron-Core's configuration of a dense decoder in the Qwen / Llama style."""
    interleaved = context.topology.vpp > 1
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        num_attention_heads=shape.num_heads,
        num_query_groups=shape.num_kv_heads,
        kv_channels=shape.head_dim,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=context.topology.tp,
        context_parallel_size=context.topology.cp,
        pipeline_model_parallel_size=context.topology.pp,
        pipeline_model_parallel_layout=_pipeline_layout(shape.num_layers, context.topology),
        sequence_parallel=sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        variable_seq_lengths=context.topology.pp > 1,
        # Unused by a dense model, but the default refuses variable lengths.
        moe_token_dispatcher_type="alltoall",
        batch_p2p_comm=context.device.type == "cuda" and not interleaved,
        # The interleaved schedule on two stages sends and receives both ways between the same two
        # ranks; only its overlapped form keeps activations and gradients apart.
        overlap_p2p_comm=interleaved,
        # Token weights already hold every normalisation, so nothing may divide the loss again.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=context.device.type == "cpu",
        **_fusions(),
        **_recomputation(recompute),
    )


def _fusions() -> dict[str, bool]:
    """Which of Megatron-Core's fused kernels are used."""
    engine = uses_transformer_engine()
    return {
        # The output layer is Megatron-Core's own, which takes this kernel from apex.
        "gradient_accumulation_fusion": fuses_weight_gradient(),
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": engine,
        "persist_layer_norm": engine,
    }


def _recomputation(recompute: Recompute) -> dict[str, Any]:
    """What the backward pass computes again, in Megatron-Core's words.

    Selective: the MLP, whose intermediate activations are the most by far. Not `core_attn`: torch's
    and Transformer Engine's attention keep no scores, so there only one number a token and head
    would be saved. Not `layernorm`: Megatron-Core 0.16.1 needs Transformer Engine for it, whose
    norms are fused with the product that follows.
    """
    match recompute:
        case "none":
            return {}
        case "selective":
            return {"recompute_granularity": "selective", "recompute_modules": ["mlp"]}
        case "full":
            return {
                "recompute_granularity": "full",
                "recompute_method": "uniform",
                "recompute_num_layers": 1,
            }


def _pipeline_layout(num_layers: int, topology: Topology) -> list[list[str]] | None:
    """What each model chunk holds, in Megatron-Core's words; None where there is one stage."""
    if topology.pp == 1:
        return None
    parts = layer_parts(num_layers, topology.pp * topology.vpp)
    layout = [["decoder"] * len(layers) for layers in parts]
    layout[0].insert(0, "embedding")
    layout[-1].append("loss")
    return layout


def _layer_spec(
    shape: ModelShape, *, num_local_layers: int
) -> ModuleSpec | TransformerBlockSubmodules:
    if uses_transformer_engine():
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=shape.qk_norm)
    layers = [local_layer_spec(qk_norm=shape.qk_norm)] * num_local_layers
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RmsNorm)
