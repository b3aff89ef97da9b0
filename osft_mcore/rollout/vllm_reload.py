"""Whole Hugging Face tensors through vLLM's own loader, and proof that all have arrived."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.rollout.vllm_cpu import repack_tied_head
from osft_mcore.weights.params import EMBEDDING, OUTPUT, hf_tensors

NUM_PROBES = 16


def reload_model(
    worker: Any, tensors: Iterable[tuple[str, Tensor]], shape: ModelShape
) -> list[str]:
    """Fill the model of a vLLM worker from all its Hugging Face tensors; returns what is wrong.

    Reads `tensors` to the end whatever comes, so that ranks that produce them together stay
    together. What does not fit is not loaded.
    """
    model, expected = worker.get_model(), hf_tensors(shape)
    arrived: set[str] = set()
    problems: list[str] = []
    try:
        worker.reload_weights(
            weights_iterator=_fitting(tensors, expected, arrived, problems),
            is_checkpoint_format=True,
        )
    finally:
        # If the stream broke off: puts the parameters back, or no later reload would find them.
        # After a complete reload vLLM has done it already and nothing is left to do.
        finalize_layerwise_reload(model, worker.model_config)
    problems += [f"tensor {name!r} is missing" for name in expected if name not in arrived]
    if shape.tied:
        repack_tied_head(model.lm_head)
        problems += _stale_head(model.lm_head, model.model.embed_tokens.weight)
    return problems


def _fitting(
    tensors: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[int, ...]],
    arrived: set[str],
    problems: list[str],
) -> Iterator[tuple[str, Tensor]]:
    """Those that the model asks for; vLLM would pass over some of the others, and stop at some."""
    for name, tensor in tensors:
        if name not in expected:
            problems.append(f"tensor {name!r} is not one of this model's")
        elif name in arrived:
            problems.append(f"tensor {name!r} came twice")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(
                f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {expected[name]}"
            )
        else:
            yield name, tensor
        arrived.add(name)


@torch.no_grad()
def _stale_head(head: Any, weight_VH: Tensor) -> list[str]:
    """Whether the head multiplies by anything but the embedding it is tied to, in words.

    Asks the kernel that sampling uses. A vector with a single 1 picks out one column of the
    weight: there is no sum, so no rounding, and one changed bit shows.
    """
    hidden = weight_VH.shape[1]
    columns = torch.linspace(0, hidden - 1, NUM_PROBES, device=weight_VH.device).long()
    probes_NH = F.one_hot(columns, hidden).to(weight_VH.dtype)
    found_NV = head.quant_method.apply(head, probes_NH, bias=None)
    if torch.allclose(found_NV, weight_VH.T[columns], rtol=0, atol=0, equal_nan=True):
        return []
    return [
        f"{OUTPUT} is stale: this model ties it to {EMBEDDING}, but vLLM still computes "
        "logits with older weights; this vLLM needs sync.mode=copy"
    ]
