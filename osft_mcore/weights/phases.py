"""Seconds by phase, on the host or on a CUDA stream."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Phases:
    """Adds up the time of each phase; on CUDA by events, so that nothing waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._on_cuda = device.type == "cuda"
        self._seconds: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Enter around a part of phase `name`."""
        if self._on_cuda:
            start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
            return
        started = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - started

    def seconds(self, name: str) -> float:
        """Of one phase so far; waits for the device."""
        if self._events:
            torch.cuda.synchronize()
        for at, start, end in self._events:
            self._seconds[at] += start.elapsed_time(end) / 1000
        self._events.clear()
        return self._seconds[name]
