"""From examples to micro-batches of tensors; pure, the same on every rank.

Shape suffixes: B sequences, S positions, T response tokens of the micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from osft_mcore.actor.splitting import Split, padded
from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss.objectives import batch_weights
from osft_mcore.records import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """One forward pass: right-padded sequences and the flat list of their response tokens."""

    tokens_BS: Tensor
    positions_BS: Tensor
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
        return MicroBatch(**{name: getattr(self, name).to(device) for name in self.__slots__})


def micro_batches(
    examples: Sequence[Example],
    split: Split,
    *,
    dp_rank: int,
    pad_to_multiple: int,
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
        collate(
            [examples[number] for number in groups[place]],
            weights[place],
            pad_to_multiple=pad_to_multiple,
        )
        for place in range(first, first + len(split[dp_rank]))
    ]


def _num_trained(example: Example) -> int:
    return len(example.response_token_ids) if example.trained else 0


def collate(
    examples: Sequence[Example], weights: Sequence[float], *, pad_to_multiple: int
) -> MicroBatch:
    """Pad on the right; causal attention then never looks at padding from a real token."""
    width = padded(max(example.num_tokens for example in examples), pad_to_multiple)
    tokens_BS = torch.zeros(len(examples), width, dtype=torch.long)
    predictors: list[int] = []
    targets: list[int] = []
    token_weights: list[float] = []
    logprobs: list[float] = []
    replicas: list[int] = []
    for row, (example, weight) in enumerate(zip(examples, weights, strict=True)):
        ids = example.prompt_token_ids + example.response_token_ids
        tokens_BS[row, : len(ids)] = torch.tensor(ids)
        num_prompt, num_response = len(example.prompt_token_ids), len(example.response_token_ids)
        first = row * width + num_prompt - 1
        predictors += range(first, first + num_response)
        targets += example.response_token_ids
        token_weights += [weight] * num_response
        logprobs += example.rollout_logprobs or [float("nan")] * num_response
        replicas += [example.replica] * num_response
    return MicroBatch(
        tokens_BS=tokens_BS,
        positions_BS=torch.arange(width).expand(len(examples), width).contiguous(),
        predictor_T=torch.tensor(predictors),
        targets_T=torch.tensor(targets),
        weights_T=torch.tensor(token_weights, dtype=torch.float32),
        rollout_logprobs_T=torch.tensor(logprobs, dtype=torch.float32),
        reference_logprobs_T=torch.full((len(targets),), torch.nan),
        replicas_T=torch.tensor(replicas),
    )
