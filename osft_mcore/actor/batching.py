"""From examples to micro-batches of tensors; pure, the same on every rank.

Shape suffixes: B rows, S positions of a row, T response tokens of the micro-batch. A row is a
sequence, padded on the right, or all of them, packed end to end. Of a row, and of the response
tokens that it predicts, each context-parallel rank has a share.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from osft_mcore.actor.splitting import Rows, Split
from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.objectives import batch_weights
from osft_mcore.records import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass: sequences and the flat list of their response tokens."""

    tokens_BS: Tensor
    packed_lengths: tuple[int, ...]
    """Of the sequences of the whole row with their padding, and of what is left at its end as the
    last; () if each row is a sequence."""
    predictor_T: Tensor
    """Index into B*S of the position whose output predicts each response token."""
    targets_T: Tensor
    weights_T: Tensor
    """Weight of each token in the loss of the whole optimizer batch."""
    rollout_logprobs_T: Tensor
    """What the rollout engine saw; NaN for given answers."""
    reference_logprobs_T: Tensor
    """The reference model's at tau_train; NaN until they are known, and where there is none."""
    replicas_T: Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`."""
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        tensors = {name: x for name, x in fields.items() if isinstance(x, Tensor)}
        moved: dict[str, Any] = {name: x.to(device) for name, x in tensors.items()}
        return replace(self, **moved)

    def share(self, *, cp: int, cp_rank: int) -> "MicroBatch":
        """What one of `cp` ranks computes: two runs of every packed sequence, and their tokens.

        Of a sequence in 2 cp equal runs it is number cp_rank, and the same counted from the end: so
        the ranks have the same work although later tokens look back at more. Rotary embeddings
        (Megatron-Core) and attention (Transformer Engine) know this order.
        """
        if cp == 1:
            return self
        whole_S = torch.arange(self.tokens_BS.shape[1])
        own_S = torch.cat(
            [
                sequence.chunk(2 * cp)[run]
                for sequence in torch.split(whole_S, list(self.packed_lengths))
                for run in (cp_rank, 2 * cp - 1 - cp_rank)
            ]
        )
        place_S = torch.full_like(whole_S, -1)
        place_S[own_S] = torch.arange(len(own_S))
        predictor_T = place_S[self.predictor_T]
        mine_T = predictor_T >= 0
        return replace(
            self,
            tokens_BS=self.tokens_BS[:, own_S],
            predictor_T=predictor_T[mine_T],
            targets_T=self.targets_T[mine_T],
            weights_T=self.weights_T[mine_T],
            rollout_logprobs_T=self.rollout_logprobs_T[mine_T],
            reference_logprobs_T=self.reference_logprobs_T[mine_T],
            replicas_T=self.replicas_T[mine_T],
        )

    def forward(self, model: Any) -> Tensor:
        """What this rank's model chunk makes of the tokens, or of the stage before."""
        # Rotary embeddings count positions themselves, from the start of a row or of a sequence in
        # it; no mask: causal attention does not look at the padding on the right.
        hidden: Tensor = model(
            self.tokens_BS, None, None, packed_seq_params=self._packed_seq_params()
        )
        return hidden

    def _packed_seq_params(self) -> PackedSeqParams | None:
        """Where sequences begin, for Megatron-Core's rotary embedding and the core attention.

        Transformer Engine's wants int32 on the device, and the longest as an int, which it would
        else fetch from there. It takes `causal`, the layer's mask, for `padding_causal`. What no
        sequence covers it leaves unwritten, NaN perhaps: hence the padding is a sequence.
        """
        if not self.packed_lengths:
            return None
        bounds = torch.tensor(
            [0, *accumulate(self.packed_lengths)], dtype=torch.int32, device=self.tokens_BS.device
        )
        longest = max(self.packed_lengths)
        return PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            # Context parallelism asks for them: padding counts as a part of its sequence.
            cu_seqlens_q_padded=bounds,
            cu_seqlens_kv_padded=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )


def micro_batches(
    examples: Sequence[Example],
    split: Split,
    *,
    dp_rank: int,
    rows: Rows,
    algorithm: AlgorithmConfig,
    max_response_tokens: int,
) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches of one optimizer batch.

    Weights come from the whole batch, so they do not depend on `split` unless
    algorithm.normalization says so.
    """
    groups = [numbers for rank in split for numbers in rank]
    weights = batch_weights(
        [[_num_trained(examples[number]) for number in numbers] for numbers in groups],
        aggregation=algorithm.aggregation,
        normalization=algorithm.normalization,
        max_response_tokens=max_response_tokens,
    )
    first = sum(len(rank) for rank in split[:dp_rank])
    return [
        collate([examples[number] for number in groups[place]], weights[place], rows)
        for place in range(first, first + len(split[dp_rank]))
    ]


def _num_trained(example: Example) -> int:
    return len(example.response_token_ids) if example.trained else 0


def collate(examples: Sequence[Example], weights: Sequence[float], rows: Rows) -> MicroBatch:
    """Sequences end to end in one row, or each in a row of its own; padding on the right."""
    lengths = [example.num_tokens for example in examples]
    size, padded = rows.num_positions(lengths), rows.padded(lengths)
    starts = accumulate(padded[:-1], initial=0)
    tokens = torch.zeros(size, dtype=torch.long)
    predictors: list[int] = []
    targets: list[int] = []
    token_weights: list[float] = []
    logprobs: list[float] = []
    replicas: list[int] = []
    for start, example, weight in zip(starts, examples, weights, strict=True):
        ids = example.prompt_token_ids + example.response_token_ids
        tokens[start : start + len(ids)] = torch.tensor(ids)
        num_prompt, num_response = len(example.prompt_token_ids), len(example.response_token_ids)
        first = start + num_prompt - 1
        predictors += range(first, first + num_response)
        targets += example.response_token_ids
        token_weights += [weight] * num_response
        logprobs += example.rollout_logprobs or [float("nan")] * num_response
        replicas += [example.replica] * num_response
    return MicroBatch(
        tokens_BS=tokens.view(1 if rows.packed else len(examples), -1),
        packed_lengths=(*padded, *filter(None, [size - sum(padded)])) if rows.packed else (),
        predictor_T=torch.tensor(predictors),
        targets_T=torch.tensor(targets),
        weights_T=torch.tensor(token_weights, dtype=torch.float32),
        rollout_logprobs_T=torch.tensor(logprobs, dtype=torch.float32),
        reference_logprobs_T=torch.full((len(targets),), torch.nan),
        replicas_T=torch.tensor(replicas),
    )
