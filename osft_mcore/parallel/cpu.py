"""Lets Megatron-Core run where there is no CUDA: everything it assumes of CUDA, in one place.

Megatron-Core 0.16.1 names the CUDA device in constructors, asks for the current device, compares
`Tensor.type()` with CUDA type names, and keeps the state of CUDA's random number generator for
activations that are computed twice. `megatron_device()` is entered around every call
into Megatron-Core; where CUDA exists it does nothing, and outside of it nothing is changed, so
that vLLM's CPU build never sees these substitutions.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.tensor_parallel import random as megatron_random
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaMeansCpu(TorchFunctionMode):
    """Redirects `device="cuda"`, `.cuda()` and the CUDA names of tensor types."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # The optimizer sorts parameters by this name; "torch.FloatTensor" is unknown to it.
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if kwargs and kwargs.get("device") is not None:
            device = kwargs["device"]
            if not isinstance(device, torch.device):
                device = torch.device(device)
            if device.type == "cuda":
                kwargs = {**kwargs, "device": _CPU}
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def megatron_device() -> Iterator[None]:
    """Enter around calls into Megatron-Core, on every device."""
    if torch.cuda.is_available():
        yield
        return
    replaced = (
        (torch.cuda, "current_device", _current_device),
        (torch.cuda, "synchronize", _synchronize),
        (megatron_random, "_get_cuda_rng_state", _no_rng_state),
        (megatron_random, "_set_cuda_rng_state", _keep_rng_state),
    )
    saved = [getattr(module, name) for module, name, _ in replaced]
    for module, name, ours in replaced:
        setattr(module, name, ours)
    try:
        with _CudaMeansCpu():
            yield
    finally:
        for (module, name, _), theirs in zip(replaced, saved, strict=True):
            setattr(module, name, theirs)


def _current_device() -> Any:
    return _CPU


def _synchronize(device: Any = None) -> None:
    """Nothing runs asynchronously on CPU."""


def _no_rng_state(*_unused: Any, **_unused_by_name: Any) -> torch.Tensor:
    """CUDA's generator does not exist. Megatron-Core keeps the CPU's, the only one, by itself."""
    return torch.empty(0, dtype=torch.uint8)


def _keep_rng_state(_state: torch.Tensor, **_unused: Any) -> None:
    """Nothing to put back."""
