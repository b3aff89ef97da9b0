"""Layer parts for machines without Transformer Engine, where Megatron-Core's own do not fit."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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
    sequences are packed, S holds all of them end to end, and there is no B. With context
    parallelism a rank has two runs of each (`MicroBatch.share`) and gathers keys and values.
    """

    def __init__(self, *_unused: Any, pg_collection: Any, **_unused_by_name: Any) -> None:
        super().__init__()
        self._cp_group: dist.ProcessGroup = pg_collection.cp

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
        packed = [x.unsqueeze(1) for x in (query_SBND, key_SBGD, value_SBGD)]
        if self._cp_group.size() > 1:
            # Computed again in the backward pass: what it gathers, and its masks, would be more to
            # keep than cutting sequences saves.
            context: Tensor = checkpoint(
                _over_ranks,
                *packed,
                lengths,
                self._cp_group,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            return context.flatten(2)
        # Not a slice each, whose gradients would be as long as all sequences together.
        parts = (torch.split(x, lengths) for x in packed)
        return torch.cat([_causal(*part) for part in zip(*parts, strict=True)]).flatten(2)


def _over_ranks(
    query_SBND: Tensor,
    key_SBGD: Tensor,
    value_SBGD: Tensor,
    lengths: Sequence[int],
    cp_group: dist.ProcessGroup,
) -> Tensor:
    """Attention of this rank's two runs of each sequence over its keys and values from all ranks.

    `lengths`: of the whole sequences, multiples of 2 cp. Collective over cp_group; the backward
    pass sums the gradients of keys and values over it.
    """
    cp, cp_rank = cp_group.size(), cp_group.rank()
    runs = [length // (2 * cp) for length in lengths for _ in range(2)]
    queries = torch.split(query_SBND, runs)
    keys, values = (
        torch.split(gather_from_sequence_parallel_region(x, group=cp_group), runs * cp)
        for x in (key_SBGD, value_SBGD)
    )
    contexts = []
    for first in range(0, len(runs), 2):
        # Rank r has the runs r and 2 cp - 1 - r: the second ones come in the opposite order.
        places = [rank * len(runs) + first for rank in range(cp)]
        places += [place + 1 for place in reversed(places)]
        for query, run in ((queries[first], cp_rank), (queries[first + 1], 2 * cp - 1 - cp_rank)):
            key, value = (torch.cat([x[at] for at in places[: run + 1]]) for x in (keys, values))
            contexts.append(_causal(query, key, value))
    return torch.cat(contexts)


def _causal(query_SBND: Tensor, key_SBGD: Tensor, value_SBGD: Tensor) -> Tensor:
    """[S, B, N, D]. Queries are the last of the positions that have keys."""
    query, key, value = (x.permute(1, 2, 0, 3) for x in (query_SBND, key_SBGD, value_SBGD))
    whole = query.shape[2] == key.shape[2]
    context_BNSD = F.scaled_dot_product_attention(
        query,
        key,
        value,
        # torch's own causal mask takes queries for the first positions.
        attn_mask=None if whole else _seen(query.shape[2], key.shape[2], query.device),
        is_causal=whole,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context_BNSD.permute(2, 0, 1, 3)


def _seen(num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[queries, keys], true where a query sees a key."""
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return ones.tril_(num_keys - num_queries)


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
