"""Lets Megatron-Core run where there is no CUDA: everything it assumes of CUDA, in one place.

Megatron-Core 0.16.1 names the CUDA device in constructors, asks for the current device and
compares `Tensor.type()` with CUDA type names. `megatron_device()` is entered around every call
into Megatron-Core; where CUDA exists it does nothing, and outside of it nothing is changed, so
that vLLM's CPU build never sees these substitutions.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
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
    saved = torch.cuda.current_device, torch.cuda.synchronize
    torch.cuda.current_device = _current_device
    torch.cuda.synchronize = _synchronize
    try:
        with _CudaMeansCpu():
            yield
    finally:
        torch.cuda.current_device, torch.cuda.synchronize = saved


def _current_device() -> Any:
    return _CPU


def _synchronize(device: Any = None) -> None:
    """Nothing runs asynchronously on CPU."""
