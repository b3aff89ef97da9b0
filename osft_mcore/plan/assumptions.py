"""What a plan assumes of GPUs; nothing here was measured with this package."""

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from osft_mcore.train.flops import PEAK_TFLOPS

GIB: Final = 2**30
GPUS_PER_NODE: Final = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One device, from its vendor's data sheet."""

    name: str
    gib: float
    """Memory that programs get."""
    hbm_gb_s: float
    peak_tflops: float
    """Dense bf16."""
    batched_tokens: int
    """vLLM 0.32.0's max_num_batched_tokens on it (engine/arg_utils.py)."""

    @property
    def memory(self) -> int:
        """In bytes."""
        return int(self.gib * GIB)


GPUS: Final = MappingProxyType(
    {
        "a100": Gpu(
            name="A100",
            gib=79.0,
            hbm_gb_s=2039.0,
            peak_tflops=PEAK_TFLOPS["A100"],
            batched_tokens=8192,
        ),
        "h100": Gpu(
            name="H100",
            gib=79.0,
            hbm_gb_s=3350.0,
            peak_tflops=PEAK_TFLOPS["H100"],
            batched_tokens=16384,
        ),
        "h200": Gpu(
            name="H200",
            gib=139.0,
            hbm_gb_s=4800.0,
            peak_tflops=PEAK_TFLOPS["H200"],
            batched_tokens=16384,
        ),
    }
)
"""SXM. Of 80 GB about 79 GiB are there."""

OVERHEAD_GIB: Final = 3.0
"""CUDA context, NCCL's buffers, cuBLAS's and Transformer Engine's workspaces."""
ENGINE_OVERHEAD_GIB: Final = 1.0
"""What the engine takes beside tensors, within its share."""
CUDA_GRAPHS_GIB: Final = 2.0
"""With rollout.enforce_eager=false, beside the engine's share."""
FRAGMENTATION: Final = 0.1
"""Of the actor's activations, that torch's allocator holds on top."""
MFU: Final = 0.35
"""Of the peak, in training and in prefill."""
HBM_SHARE: Final = 0.6
"""Of the bandwidth, in decoding and in the optimizer's step."""
LAUNCH_S_PER_LAYER: Final = 4e-4
"""A decode step takes no less, where kernels are launched one by one from Python."""
GRAPH_S_PER_LAYER: Final = 3e-5
"""The same with CUDA graphs."""
SUM_S: Final = 1e-5
"""To begin a sum over the ranks of an engine; a layer has two in a decode step."""
NODE_GB_S: Final = 150.0
"""A GPU to another of its node."""
NETWORK_GB_S: Final = 20.0
"""A GPU to one of another node."""
HOST_GB_S: Final = 20.0
"""A GPU from and to the host's memory."""
PROMPT_SHARE: Final = 0.25
RESPONSE_SHARE: Final = 0.5
"""Mean lengths, of the longest that the options allow."""
TEXT_BYTES: Final = 4
ID_BYTES: Final = 7
"""A token in a file, as text and as a number."""


def assumption_lines(gpu: Gpu, *, response_tokens: float, prompt_tokens: float) -> list[str]:
    """All of it for people."""
    return [
        "GPU figures are estimates: nothing of this plan was run on a GPU",
        f"{gpu.name}: {gpu.gib:g} GiB, {gpu.peak_tflops:g} TFLOP/s bf16, {gpu.hbm_gb_s:g} GB/s",
        f"{OVERHEAD_GIB:g} GiB for CUDA, NCCL and workspaces; {FRAGMENTATION:.0%} of the actor's "
        "activations lost to fragmentation",
        f"engine: {ENGINE_OVERHEAD_GIB:g} GiB beside tensors, and {CUDA_GRAPHS_GIB:g} GiB for CUDA "
        f"graphs if they are on; {gpu.batched_tokens} tokens in a prefill",
        "layers: Transformer Engine's, as one expects them to keep tensors; every sequence as long "
        "as the options allow",
        f"mean lengths: prompt {prompt_tokens:.0f}, answer {response_tokens:.0f} tokens; one "
        "answer of every replica is the longest",
        f"{MFU:.0%} of the peak in training and prefill, {HBM_SHARE:.0%} of the memory bandwidth "
        "in decoding and in the optimizer's step",
        f"a decode step takes at least {LAUNCH_S_PER_LAYER * 1e3:g} ms a layer without CUDA "
        f"graphs, {GRAPH_S_PER_LAYER * 1e3:g} ms with them",
        f"{SUM_S * 1e6:g} microseconds to begin a sum over the ranks of an engine, and then its "
        "bytes",
        f"{NODE_GB_S:g} GB/s between GPUs of a node of {GPUS_PER_NODE}, {NETWORK_GB_S:g} GB/s "
        f"between nodes, {HOST_GB_S:g} GB/s to the host",
        f"{TEXT_BYTES} bytes of text a token in files, {ID_BYTES} more where its number is kept",
        "host memory not counted: libraries, the engine's, data, files that the kernel keeps",
        "seconds not counted: evaluation, grading, saves, what is read at start, keys and values "
        "between ranks of parallel.cp, ranks that wait for a slower one",
    ]
