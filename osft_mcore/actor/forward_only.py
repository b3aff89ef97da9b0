"""What a model says of the response tokens of micro-batches, without training."""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch
from osft_mcore.actor.response_loss import response_loss
from osft_mcore.loss.linear import TokenLoss
from osft_mcore.model.build import output_weight
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext


def token_figures(
    chunks: Sequence[Any],
    batches: Sequence[MicroBatch],
    context: ParallelContext,
    *,
    tau: float,
    vocab: int,
    sequence_parallel: bool,
) -> list[TokenLoss]:
    """Log-probabilities and entropies at temperature `tau`, by micro-batch; the loss is 0.

    Every rank must call, alike. Empty on ranks outside of the last pipeline stage. With context
    parallelism a rank has its own tokens' alone.
    """

    def figures(batch: MicroBatch, hidden_BSH: Tensor) -> tuple[Tensor, Tensor, TokenLoss]:
        found = response_loss(
            hidden_BSH,
            output_weight(chunks[-1]),
            batch,
            # Nothing is minimised here.
            lambda logprobs_C, _entropy_C, _rows: torch.zeros_like(logprobs_C),
            tau_train=tau,
            tau_sample=tau,
            vocab=vocab,
            tp_group=context.tp_group,
            sequence_parallel=sequence_parallel,
        )
        num_tokens = torch.tensor(
            batch.targets_T.numel(), dtype=torch.int, device=hidden_BSH.device
        )
        return found.loss, num_tokens, found

    def forward(batches: Iterator[MicroBatch], model: Any) -> tuple[Tensor, Any]:
        batch = next(batches).to(context.device)
        return batch.forward(model), partial(figures, batch)

    with megatron_device(), torch.no_grad():
        found: list[TokenLoss] = get_forward_backward_func()(
            forward_step_func=forward,
            # Every chunk sees every micro-batch.
            data_iterator=[iter(batches) for _ in chunks],
            model=list(chunks),
            num_microbatches=len(batches),
            # Shapes travel with the activations between stages, so these are only nominal.
            seq_length=batches[0].tokens_BS.shape[1],
            micro_batch_size=batches[0].tokens_BS.shape[0],
            forward_only=True,
        )
    return found
