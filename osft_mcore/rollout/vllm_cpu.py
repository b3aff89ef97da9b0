"""What vLLM's CPU build does differently, and how to make it look like the GPU build.

The CPU build packs every linear weight for oneDNN while loading and leaves an empty parameter
behind, so that nothing could be written in place afterwards. Loading with a plain `F.linear`
dispatch keeps the GPU layout: live parameters whose in-place changes the next call sees.
"""

import contextlib
import ctypes
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import nn
from vllm.distributed.device_communicators import cpu_communicator
from vllm.model_executor.layers import utils as vllm_layers

TOKENS_PER_PASS: Final = 4096
"""What vLLM takes by itself on CPU."""


def prepare_environment() -> None:
    """Let torchrun's thread settings stand; vLLM would bind every rank to the same core."""
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def whole_prompts(max_model_len: int) -> dict[str, Any]:
    """Options with which the engine reads a prompt in one pass, never in parts.

    After a part vLLM 0.32.0 takes back the random number that it drew in vain, by the generator's
    offset. A CPU generator has none, and the engine dies of it: as soon as the prompts that wait
    for a pass have more tokens than fit into it.
    """
    return {
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(max_model_len, TOKENS_PER_PASS),
    }


@contextlib.contextmanager
def live_parameters() -> Iterator[None]:
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


def repack_tied_head(head: nn.Module) -> None:
    """Call after vLLM has reloaded a tied model; on CUDA nothing needs to change.

    vLLM reloads layer by layer and packs a layer again when its last tensor is there. A tied head
    has no tensor of its own: it gets the new embedding, but keeps multiplying by the packed copy
    of the old one.
    """
    if not torch.cuda.is_available():
        vllm_layers.dispatch_cpu_unquantized_gemm(head, remove_weight=False)


def return_freed_memory() -> None:
    """Call after freeing much; on CUDA the caching allocator hands it out again.

    glibc keeps what is freed for this process; torch's next large tensors would not fit into it.
    """
    if sys.platform == "linux" and not torch.cuda.is_available():
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def eager_sampling(*, enforce_eager: bool) -> Iterator[None]:
    """Enter around sampling; on CUDA, or if vLLM was asked to compile, nothing changes.

    enforce_eager spares only the model: vLLM still hands two small functions (rank of the sampled
    token, vocabulary mask of the embedding) to torch.compile. On CPU the first call then waits
    seconds for a C++ compiler, which must be there at all, and later calls are no faster for it.
    """
    if torch.cuda.is_available() or not enforce_eager:
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


@contextlib.contextmanager
def private_shared_memory(run_token: str) -> Iterator[None]:
    """Enter while vLLM starts, with a token that all ranks of this run share and no other run.

    The CPU build names its shared memory after a port that external_launcher does not give: all
    runs of a host would use one name, and what a killed run left there would stop every later
    one. Here the name is the run's own, and gone once all ranks of a group have the memory.
    """
    start = cpu_communicator._CPUSHMDistributed._init_cpu_shm

    def start_privately(group: cpu_communicator._CPUSHMDistributed) -> Any:
        group.group_name = f"osft-{run_token}{group.group_name.lstrip('/')}"
        handle = start(group)  # ends with a barrier of the group
        for name in Path("/dev/shm").glob(f"{glob.escape(group.group_name)}_*"):
            name.unlink(missing_ok=True)
        return handle

    cpu_communicator._CPUSHMDistributed._init_cpu_shm = start_privately
    try:
        yield
    finally:
        cpu_communicator._CPUSHMDistributed._init_cpu_shm = start


def _plain_linear(layer: nn.Module, remove_weight: bool) -> None:
    layer.cpu_linear = F.linear  # type: ignore[assignment]
