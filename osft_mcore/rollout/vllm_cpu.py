"""What vLLM's CPU build does differently, and how to make it look like the GPU build.

The CPU build packs every linear weight for oneDNN while loading and leaves an empty parameter
behind, so that nothing could be written in place afterwards. Loading with a plain `F.linear`
dispatch keeps the GPU layout: live parameters whose in-place changes the next call sees.
"""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from vllm.model_executor.layers import utils as vllm_layers


def prepare_environment() -> None:
    """Let torchrun's thread settings stand; vLLM would bind every rank to the same core."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


@contextlib.contextmanager
def live_weights() -> Iterator[None]:
    """Enter while vLLM loads a model; on CUDA nothing needs to change."""
    if torch.cuda.is_available():
        yield
        return
    packing = vllm_layers.dispatch_cpu_unquantized_gemm
    vllm_layers.dispatch_cpu_unquantized_gemm = _plain_linear
    try:
        yield
    finally:
        vllm_layers.dispatch_cpu_unquantized_gemm = packing


def _plain_linear(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = F.linear  # type: ignore[assignment]
