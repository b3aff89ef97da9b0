"""Memory that leaves the device while nobody needs it, and comes back to where it was.

Storages are emptied, not replaced: every view of them, Megatron-Core's buffers and the optimizer's
shards among them, is good again once they are back. On CPU the path is the same; what leaves then
goes from host memory to host memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from osft_mcore.actor.training_state import StateTensor
from osft_mcore.config.schema import Offload


class ActorMemory:
    """What of one actor is on the device, and when, as train.offload says. Not collective."""

    def __init__(
        self, choice: Offload, state: Sequence[StateTensor], gradients: Iterable[Tensor]
    ) -> None:
        """All is in place now; `state` is what is to be moved, Adam's moments included."""
        weights = [part.tensor for part in state if part.kind == "weight"]
        # Of an fp32 model the optimizer updates the weights themselves.
        are_weights = storages_of(weights)
        others = [
            part.tensor for part in state if part.tensor.untyped_storage()._cdata not in are_weights
        ]
        self._optimizer = HostCopies(others if choice != "none" else [])
        self._weights = HostCopies(weights if choice == "all" else [])
        self._gradients = Scratch(gradients if choice != "none" else [])
        self._optimizer.put_away()
        self._gradients.free()

    @contextmanager
    def update(self) -> Iterator[None]:
        """Enter around forward, backward and step: weights and gradient buffers are there.

        The latter may hold anything.
        """
        self._weights.fetch()
        self._gradients.make()
        try:
            yield
        finally:
            self._gradients.free()

    @contextmanager
    def step(self) -> Iterator[None]:
        """Enter around the optimizer's step: what it updates is there. Nobody else reads it."""
        self._optimizer.fetch()
        try:
            yield
        finally:
            self._optimizer.put_away()

    @property
    def holds_weights(self) -> bool:
        """True if `put_weights_away` would move something."""
        return self._weights.in_place

    def put_weights_away(self) -> None:
        """Nobody needs the weights for a while, and nobody reads their host copies."""
        self._weights.put_away()

    def fetch_weights(self) -> None:
        """The weights are there."""
        self._weights.fetch()

    def readable(self, state: Iterable[StateTensor]) -> list[StateTensor]:
        """The same, to be read only: where a tensor is away, its host copy.

        Good until weights or optimizer state change.
        """
        return [
            replace(part, tensor=self._weights.readable(self._optimizer.readable(part.tensor)))
            for part in state
        ]


class HostCopies:
    """Storages that are either in place or, bit for bit, in host memory."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """All storages behind `tensors`, which are in place, as whole storages, each once."""
        self._parts = [_Part(storage) for storage in storages_of(tensors).values()]
        self._by_storage = {part.storage._cdata: part for part in self._parts}
        self._away = False

    @property
    def in_place(self) -> bool:
        """True if there is something, and it is not away."""
        return bool(self._parts) and not self._away

    def put_away(self) -> None:
        """Copy all to host memory and empty the storages; nothing to do if they are.

        The host copies are complete on return, and stay as they are until the next call.
        """
        if self._away:
            return
        for part in self._parts:
            part.to_host()
        if any(part.storage.device.type == "cuda" for part in self._parts):
            torch.cuda.current_stream().synchronize()
        for part in self._parts:
            part.storage.resize_(0)
        self._away = True

    def fetch(self) -> None:
        """Bring all back; nothing to do if it is in place."""
        if not self._away:
            return
        for part in self._parts:
            part.from_host()
        self._away = False

    def readable(self, tensor: Tensor) -> Tensor:
        """`tensor` as it is, or the same view of its host copy if it is away. To be read only."""
        part = self._by_storage.get(tensor.untyped_storage()._cdata)
        if part is None or not self._away:
            return tensor
        view = torch.empty(0, dtype=tensor.dtype)
        return view.set_(part.host(), tensor.storage_offset(), tensor.shape, tensor.stride())


class Scratch:
    """Storages whose content is needed between `make` and `free` only."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """All storages behind `tensors`; they exist as if made."""
        self._parts = [(part, part.nbytes()) for part in storages_of(tensors).values()]

    def make(self) -> None:
        """They exist, and may hold anything."""
        for storage, num_bytes in self._parts:
            storage.resize_(num_bytes)

    def free(self) -> None:
        """They take no memory."""
        for storage, _ in self._parts:
            storage.resize_(0)


def storages_of(tensors: Iterable[Tensor]) -> dict[int, torch.UntypedStorage]:
    """The storages behind `tensors`, each once, by what tells them apart; none that are empty."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage for storage in storages if storage.nbytes()}


class _Part:
    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self._num_bytes = storage.nbytes()
        self._host: Tensor | None = None

    def host(self) -> torch.UntypedStorage:
        """Pinned where a device copies to it. Kept: to make it costs as much as the copy."""
        if self._host is None:
            pinned = self.storage.device.type == "cuda"
            self._host = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=pinned)
        return self._host.untyped_storage()

    def to_host(self) -> None:
        self.host().copy_(self.storage, non_blocking=True)

    def from_host(self) -> None:
        self.storage.resize_(self._num_bytes)
        self.storage.copy_(self.host(), non_blocking=True)
