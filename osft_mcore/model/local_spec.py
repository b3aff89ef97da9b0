"""Layer parts for machines without Transformer Engine, where Megatron-Core's own do not fit."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn


class RmsNorm(nn.Module):
    """RMSNorm that may run on a sequence shard, which Megatron-Core's torch norm refuses."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        # Megatron-Core sums the gradient of marked parameters over the tensor-parallel group.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:
        """Normalise the last dim."""
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight, self.eps)


class CausalAttention(nn.Module):
    """torch's scaled_dot_product_attention: no [s, s] mask, fp32 accumulation inside.

    Shape suffixes: S sequence, B batch, N local query heads, G local KV heads, D head dim. Where
    sequences are packed, S holds all of them end to end, and there is no B.
    """

    def __init__(self, *_unused: Any, **_unused_by_name: Any) -> None:
        super().__init__()

    def forward(
        self,
        query_SBND: Tensor,
        key_SBGD: Tensor,
        value_SBGD: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Causal attention; padding is on the right, so it needs no mask. Returns [S, B, N*D]."""
        assert attention_mask is None, "right-padded and packed sequences carry no attention mask"
        if packed_seq_params is None:
            return _causal(query_SBND, key_SBGD, value_SBGD).flatten(2)
        lengths = packed_seq_params.cu_seqlens_q.diff().tolist()
        # Not a slice each, whose gradients would be as long as all sequences together.
        parts = (torch.split(x.unsqueeze(1), lengths) for x in (query_SBND, key_SBGD, value_SBGD))
        return torch.cat([_causal(*part) for part in zip(*parts, strict=True)]).flatten(2)


def _causal(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    """[S, B, N, D]."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
    context_BNSD = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=query.shape[1] != key.shape[1]
    )
    return context_BNSD.permute(2, 0, 1, 3)


def local_layer_spec(*, qk_norm: bool) -> ModuleSpec:
    """Megatron-Core's local layer with this module's norm and attention in place of its own."""
    spec = get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization="RMSNorm")
    layer = spec.submodules
    attention = layer.self_attention.submodules
    layer.input_layernorm = layer.pre_mlp_layernorm = RmsNorm
    attention.core_attention = CausalAttention
    if qk_norm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    return spec
