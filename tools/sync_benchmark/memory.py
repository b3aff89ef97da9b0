"""The largest amount of memory that a push takes beyond what is there before it."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_extra_bytes(push: Callable[[], object], device: torch.device) -> int:
    """Run `push`; the peak of the bytes of tensors that were made meanwhile and still alive.

    On CUDA the allocator counts. On CPU, where torch keeps no count, every new tensor's storage
    is followed until it goes; buffers inside gloo are not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        push()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _LiveStorages() as storages:
        push()
    return storages.peak


class _LiveStorages(TorchDispatchMode):
    """Sees every operation of this thread and adds up the storages that they make."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._followed: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = {_address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _address(leaf) not in given | self._followed:
                self._follow(leaf.untyped_storage())
        return result

    def _follow(self, storage: torch.UntypedStorage) -> None:
        self._followed.add(storage._cdata)
        self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())

    def _forget(self, address: int, num_bytes: int) -> None:
        self._followed.discard(address)
        self.live -= num_bytes


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
