"""From the last stage's hidden states to the loss of the response tokens."""

import torch.distributed as dist
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch
from osft_mcore.loss.linear import Objective, TokenLoss, token_loss


def response_loss(
    hidden_BSH: Tensor,
    weight_VH: Tensor,
    batch: MicroBatch,
    objective: Objective,
    *,
    tau_train: float,
    tau_sample: float,
    vocab: int,
    tp_group: dist.ProcessGroup,
    sequence_parallel: bool,
    recompute: bool = False,
) -> TokenLoss:
    """`token_loss` of the positions that predict a response token. Collective over tp_group.

    B sequences, S positions (with `sequence_parallel` this rank's share), H hidden, V this rank's
    vocabulary rows.
    """
    if sequence_parallel:
        # Its backward sums over ranks while it scatters: nobody else has to.
        hidden_SBH = gather_from_sequence_parallel_region(
            hidden_BSH.transpose(0, 1), tensor_parallel_output_grad=True
        )
        hidden_BSH = hidden_SBH.transpose(0, 1)
    return token_loss(
        hidden_BSH.flatten(0, 1)[batch.predictor_T],
        weight_VH,
        batch.targets_T,
        objective,
        tau_train=tau_train,
        tau_sample=tau_sample,
        vocab=vocab,
        tp_group=tp_group,
        recompute=recompute,
        partial_hidden_grad=sequence_parallel,
    )
