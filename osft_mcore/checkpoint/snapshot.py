"""What tensors hold at one moment, for a writer that takes longer than the moment lasts."""

import threading
import time
from collections.abc import Iterator, Sequence
from typing import Final

import torch
from torch import Tensor

from osft_mcore.errors import CheckpointError
from osft_mcore.weights.safetensors_stream import bytes_of

PIECE_BYTES: Final = 1 << 20
"""Small enough to stay in the processor's cache until it is hashed and written."""
LEAST_PATIENCE_S: Final = 5.0
"""For the copy of a piece, also when the deadline of the save has passed."""


class Snapshot:
    """One thread reads `values`, another calls `take` before it changes the tensors.

    What has been read by then was never copied as a whole; only the rest is, into `buffers`: by
    number of the tensor, kept by the caller from one snapshot to the next, because fresh memory
    costs as much as the copy itself.
    """

    def __init__(self, live: Sequence[Tensor], buffers: dict[int, Tensor]) -> None:
        """`live` tensors are contiguous, in host memory or on one device."""
        assert all(tensor.is_contiguous() for tensor in live), "the state has gaps"
        self._live, self._buffers = live, buffers
        self._lock = threading.Lock()
        self._num_read = 0
        self._taken = False
        self._problem = ""

    def take(self, deadline: float) -> None:
        """Copy what has not been read; from then on the tensors may change.

        On a GPU, on the current stream; returns when the copies are there. A copy that fails is
        told to the reader, not here. Raises CheckpointError if the other thread is still copying
        at `deadline` (seconds of time.monotonic()).
        """
        patience = max(LEAST_PATIENCE_S, deadline - time.monotonic())
        if not self._lock.acquire(timeout=patience):
            raise CheckpointError(
                "the training state was not copied within checkpoint.timeout_minutes; is the host "
                "out of memory?"
            )
        try:
            if not self._taken:
                self._taken = True
                # Until it is done: buffers hold values of an earlier snapshot.
                self._problem = "the copy of the training state was broken off"
                self._copy_rest()
                self._problem = ""
        except Exception as error:
            self._problem = f"cannot copy the training state: {error!r}"
        finally:
            self._lock.release()

    def abandon(self) -> None:
        """Nobody reads any more: from now on `take` copies nothing."""
        with self._lock:
            self._taken, self._problem = True, "the snapshot was given up"

    def values(self) -> Iterator[Iterator[memoryview]]:
        """Of each tensor the bytes, piece by piece; a piece is good until the next is asked for.

        Raises CheckpointError if `take` failed.
        """
        bounce = memoryview(bytearray(PIECE_BYTES))
        for number in range(len(self._live)):
            yield self._pieces(number, bounce)

    def _pieces(self, number: int, bounce: memoryview) -> Iterator[memoryview]:
        start, size = 0, self._live[number].nbytes
        while start < size:
            with self._lock:
                piece = self._bytes(number)[start : start + PIECE_BYTES]
                # Copied: a disk that hangs must not hold the lock.
                bounce[: len(piece)] = piece
                start += len(piece)
                if start == size:
                    self._num_read = number + 1
            yield bounce[: len(piece)]

    def _bytes(self, number: int) -> memoryview:
        if self._problem:
            raise CheckpointError(self._problem)
        return bytes_of((self._buffers if self._taken else self._live)[number])

    def _copy_rest(self) -> None:
        for number in range(self._num_read, len(self._live)):
            tensor = self._live[number]
            if number not in self._buffers:
                self._buffers[number] = torch.empty(
                    tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda
                )
            self._buffers[number].copy_(tensor, non_blocking=True)
        devices = {tensor.device for tensor in self._live if tensor.is_cuda}
        for device in devices:
            torch.cuda.current_stream(device).synchronize()
