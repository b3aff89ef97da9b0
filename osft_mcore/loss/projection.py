"""Products with the output weight in any dtype, summed in at least float32.

Shape suffixes: C tokens, H hidden, V vocabulary rows. A GPU multiplies bf16 and sums in float32. A
CPU cannot: there the weight is widened, a block of rows at a time so that no whole copy exists.
"""

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

BLOCK_ROWS: Final = 8192
"""Rows of the weight that are widened at once."""


def widened(dtype: torch.dtype) -> torch.dtype:
    """What sums are held in: float32, or float64 for float64."""
    return torch.promote_types(dtype, torch.float32)


def logits(hidden_CH: Tensor, weight_VH: Tensor, *, out_CV: Tensor) -> None:
    """hidden @ weight.T into out_CV, of the widened dtype."""
    exact = out_CV.dtype
    if weight_VH.dtype == exact:
        torch.mm(hidden_CH.to(exact), weight_VH.T, out=out_CV)
    elif weight_VH.is_cuda:
        torch.mm(hidden_CH, weight_VH.T, out_dtype=exact, out=out_CV)
    else:
        hidden_CH = hidden_CH.to(exact)
        for rows, block_VH in _blocks(weight_VH, exact):
            out_CV[:, rows] = hidden_CH @ block_VH.T


def hidden_gradient(grad_CV: Tensor, weight_VH: Tensor) -> Tensor:
    """grad @ weight, [C, H] in grad's dtype."""
    if weight_VH.dtype == grad_CV.dtype:
        return grad_CV @ weight_VH
    if weight_VH.is_cuda:
        return torch.mm(grad_CV.to(weight_VH.dtype), weight_VH, out_dtype=grad_CV.dtype)
    out_CH = grad_CV.new_zeros((grad_CV.shape[0], weight_VH.shape[1]))
    for rows, block_VH in _blocks(weight_VH, grad_CV.dtype):
        out_CH.addmm_(grad_CV[:, rows], block_VH)
    return out_CH


def add_weight_gradient(sum_VH: Tensor, grad_CV: Tensor, hidden_CH: Tensor) -> None:
    """sum += grad.T @ hidden, in sum's dtype."""
    if hidden_CH.is_cuda and hidden_CH.dtype != sum_VH.dtype:
        grad_VC = grad_CV.to(hidden_CH.dtype).T
        sum_VH += torch.mm(grad_VC, hidden_CH, out_dtype=sum_VH.dtype)
    else:
        sum_VH.addmm_(grad_CV.T, hidden_CH.to(sum_VH.dtype))


def _blocks(weight_VH: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, weight_VH.shape[0], BLOCK_ROWS):
        rows = slice(start, min(start + BLOCK_ROWS, weight_VH.shape[0]))
        yield rows, weight_VH[rows].to(dtype)
