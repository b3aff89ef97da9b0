"""The mean loss of tokens, in all the ways that are compared; each leaves the same gradients.

Shape suffixes: T tokens, H hidden, V this rank's vocabulary rows.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor

from loss_benchmark.cases import Baseline, Case
from osft_mcore.loss.linear import token_loss
from osft_mcore.parallel.groups import ParallelContext

Way = Literal["ours"] | Baseline

TAU_SAMPLE: Final = 0.7
"""Ours answers for this temperature too; the others have only the one that they train at, 1."""
LOGIT_STD: Final = 3.0
"""About a language model's. Denormal numbers, which are slow, never come up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Of one rank: hidden states and targets are the same on all, the weight is a shard."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    vocab: int
    tp_group: dist.ProcessGroup

    @property
    def gradient_bytes(self) -> int:
        """What every way leaves behind."""
        return sum(at.numel() * at.element_size() for at in (self.hidden_TH, self.weight_VH))

    def first(self, num_tokens: int) -> "Inputs":
        """The first tokens alone, and the same weight."""
        hidden_TH = self.hidden_TH[:num_tokens].detach().clone().requires_grad_()
        return replace(self, hidden_TH=hidden_TH, targets_T=self.targets_T[:num_tokens])

    def forget_gradients(self) -> None:
        """Free them."""
        self.hidden_TH.grad = self.weight_VH.grad = None


def make_inputs(case: Case, context: ParallelContext) -> Inputs:
    """Random ones, for this rank."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[case.dtype]
    common, own = (
        torch.Generator(context.device).manual_seed(seed)
        for seed in (0, 1 + context.coordinates.tp_rank)
    )
    hidden_TH = torch.empty((case.num_tokens, case.hidden), dtype=dtype, device=context.device)
    weight_VH = torch.empty(
        (case.vocab // case.tp, case.hidden), dtype=dtype, device=context.device
    )
    hidden_TH.normal_(generator=common)
    weight_VH.normal_(std=LOGIT_STD / case.hidden**0.5, generator=own)
    return Inputs(
        hidden_TH=hidden_TH.requires_grad_(),
        weight_VH=weight_VH.requires_grad_(),
        targets_T=torch.randint(
            case.vocab, (case.num_tokens,), device=context.device, generator=common
        ),
        vocab=case.vocab,
        tp_group=context.tp_group,
    )


def run(way: Way, inputs: Inputs) -> float:
    """Loss, forward and backward. Collective over the group of `inputs`."""
    loss = _function(way)(inputs)
    # Called with types that torch does not declare.
    loss.backward()  # type: ignore[no-untyped-call]
    if loss.is_cuda:
        torch.cuda.synchronize()
    return loss.item()


def _function(way: Way) -> Callable[[Inputs], Tensor]:
    match way:
        case "ours":
            return _ours
        case "megatron":
            return _megatron
        case "torch":
            return _torch
        case "liger":
            return _liger


def _ours(inputs: Inputs) -> Tensor:
    num_tokens = inputs.targets_T.numel()
    weights_T = inputs.hidden_TH.new_full((num_tokens,), 1 / num_tokens, dtype=torch.float32)
    return token_loss(
        inputs.hidden_TH,
        inputs.weight_VH,
        inputs.targets_T,
        lambda logprobs_C, _, rows: -weights_T[rows] * logprobs_C,
        tau_train=1.0,
        tau_sample=TAU_SAMPLE,
        vocab=inputs.vocab,
        tp_group=inputs.tp_group,
    ).loss


def _megatron(inputs: Inputs) -> Tensor:
    # Its backward sums the hidden states' gradients over the group, as Megatron's layer would.
    hidden_TH = copy_to_tensor_model_parallel_region(inputs.hidden_TH, inputs.tp_group)
    losses_T: Tensor = vocab_parallel_cross_entropy(
        hidden_TH @ inputs.weight_VH.T, inputs.targets_T
    )
    return losses_T.mean()


def _torch(inputs: Inputs) -> Tensor:
    return F.cross_entropy(inputs.hidden_TH @ inputs.weight_VH.T, inputs.targets_T)


def _liger(inputs: Inputs) -> Tensor:
    # By name: it is optional, and unknown to a type checker where it is not installed.
    fused = importlib.import_module("liger_kernel.transformers").LigerFusedLinearCrossEntropyLoss()
    loss: Tensor = fused(inputs.weight_VH, inputs.hidden_TH, inputs.targets_T)
    return loss
