"""Ranks that find each other and measure the way between them; without Megatron or a model.

Not through groups.py: what is looked at here must also work where a run would not start.
"""

import datetime
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from osft_mcore.errors import ConfigError, DeadlinePassed
from osft_mcore.parallel.world import launched_rank, launched_world_size, local_rank

Backend = Literal["gloo", "nccl"]

PATIENCE_S: Final = 60.0
"""For ranks that have not come, and for each exchange between those that have."""
TRIPS: Final = 20
ROUNDS: Final = 5
NUM_BYTES: Final = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}
POLL_S: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """What rank 0 measured over one backend."""

    backend: Backend
    round_trips: tuple[float, ...]
    """Seconds from rank 0 to each other rank and back, by rank from 1; medians."""
    num_bytes: int
    """Of the tensor that was summed over all ranks."""
    seconds: float
    """That this took; median."""

    @property
    def bus_bytes_per_s(self) -> float:
        """What a rank has to send at least, 2 (n - 1) / n of the tensor, by the time; 0 alone."""
        n = len(self.round_trips) + 1
        return 2 * (n - 1) / n * self.num_bytes / self.seconds


class Meeting:
    """The launcher's store, where ranks tell each other things before any process group exists."""

    def __init__(self, patience_s: float = PATIENCE_S) -> None:
        """Joins the store. Raises ConfigError if it does not answer. Every rank must call."""
        self.rank, self.world_size = launched_rank(), launched_world_size() or 1
        self._patience = datetime.timedelta(seconds=patience_s)
        try:
            self._store, _, _ = next(rendezvous("env://", timeout=self._patience))
        except (RuntimeError, ValueError) as error:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise ConfigError(
                f"ping: the launcher's store at {place} does not answer rank {self.rank} within "
                f"{patience_s:g} s ({_first_line(error)}); is MASTER_ADDR a host that this one "
                "reaches, and the port open between them?"
            ) from error
        self._store.set_timeout(self._patience)

    def gather(self, what: str, value: Any, *, within_s: float | None = None) -> list[Any]:
        """JSON-able values of all ranks on rank 0, nothing on others. Every rank must call.

        `within_s`: how long rank 0 waits for the last one; None: as long as for the store. Raises
        DeadlinePassed on rank 0 with the ranks that did not come.
        """
        self._store.set(f"{what}/{self.rank}", json.dumps(value))
        if self.rank:
            return []
        keys = [f"{what}/{rank}" for rank in range(self.world_size)]
        patience_s = self._patience.total_seconds() if within_s is None else within_s
        until = time.monotonic() + patience_s
        while absent := [rank for rank, key in enumerate(keys) if not self._store.check([key])]:
            if time.monotonic() > until:
                raise DeadlinePassed(
                    f"ping: no word from rank {', '.join(map(str, absent))} of {self.world_size} "
                    f"within {patience_s:g} s; look at what they said"
                )
            time.sleep(POLL_S)
        return [json.loads(self._store.get(key)) for key in keys]

    def tell(self, what: str, decide: Callable[[], Any], *, within_s: float | None = None) -> Any:
        """What rank 0 decides, on every rank. Every rank must call.

        `within_s`: how long the others wait for it. Raises DeadlinePassed on those that give up.
        """
        if self.rank == 0:
            self._store.set(what, json.dumps(decide()))
        # Rank 0 may have waited for somebody else as long as that.
        patience = 2 * self._patience if within_s is None else datetime.timedelta(seconds=within_s)
        try:
            self._store.wait([what], patience)
            return json.loads(self._store.get(what))
        except RuntimeError as error:
            raise DeadlinePassed(
                f"ping: no word from rank 0 ({_first_line(error)}); look at what it said"
            ) from error

    def leave(self) -> None:
        """Rank 0, which may keep the store, leaves last. Every rank must call."""
        self._store.add("left", 1)
        until = time.monotonic() + self._patience.total_seconds()
        while self.rank == 0 and self._store.add("left", 0) < self.world_size:
            if time.monotonic() > until:
                return
            time.sleep(POLL_S)

    def ping(self, backend: Backend) -> Ping:
        """Round trips from rank 0, and a sum over all ranks. Collective over the world.

        Raises ConfigError if the ranks cannot speak to each other, or a sum is wrong. One that
        hangs ends this process with the exit code of DeadlinePassed.
        """
        try:
            with (
                _limit(backend, 2 * self._patience.total_seconds()),
                self._group(backend) as device,
            ):
                trips = tuple(self._round_trips(device))
                num_bytes = NUM_BYTES[backend]
                seconds = self._sum(device, num_bytes)
        except RuntimeError as error:
            variable = f"{backend.upper()}_SOCKET_IFNAME"
            raise ConfigError(
                f"ping: {backend} between {self.world_size} ranks failed on rank {self.rank}: "
                f"{_first_line(error)}; name the network interface that the hosts share in "
                f"{variable}, and let its hosts reach each other on all ports"
            ) from error
        return Ping(backend=backend, round_trips=trips, num_bytes=num_bytes, seconds=seconds)

    @contextmanager
    def _group(self, backend: Backend) -> Iterator[torch.device]:
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", local_rank())
            torch.cuda.set_device(device)
        dist.init_process_group(
            backend,
            store=PrefixStore(backend, self._store),
            rank=self.rank,
            world_size=self.world_size,
            timeout=self._patience,
            device_id=device if backend == "nccl" else None,
        )
        yield device
        # Not after an error: peers that are gone would be waited for.
        dist.destroy_process_group()

    def _round_trips(self, device: torch.device) -> Iterator[float]:
        ball = torch.zeros(1, device=device)
        if self.rank:
            for _ in range(TRIPS):
                dist.recv(ball, 0)
                dist.send(ball, 0)
            return
        for peer in range(1, self.world_size):
            seconds = []
            for _ in range(TRIPS):
                started = time.perf_counter()
                dist.send(ball, peer)
                dist.recv(ball, peer)
                _finish(device)
                seconds.append(time.perf_counter() - started)
            yield statistics.median(seconds)

    def _sum(self, device: torch.device, num_bytes: int) -> float:
        expected = self.world_size * (self.world_size + 1) / 2
        tensor = torch.empty(num_bytes // 4, device=device)
        seconds = []
        for _ in range(1 + ROUNDS):
            tensor.fill_(self.rank + 1)
            dist.barrier()
            _finish(device)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            _finish(device)
            seconds.append(time.perf_counter() - started)
            if not bool((tensor == expected).all()):
                raise RuntimeError(
                    f"a sum over all ranks is wrong: found {float(tensor.min()):g} to "
                    f"{float(tensor.max()):g}, expected {expected:g}"
                )
        # The first one connects.
        return statistics.median(seconds[1:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def _limit(backend: Backend, seconds: float) -> Iterator[None]:
    """What does not heed its own timeout, such as NCCL while it connects, ends with the process."""

    def end() -> None:
        sys.stderr.write(
            f"osft: {DeadlinePassed.__name__}\n  - ping: {backend} still hangs on rank "
            f"{launched_rank()} after {seconds:g} s; name the network interface that the hosts "
            f"share in {backend.upper()}_SOCKET_IFNAME\n"
        )
        sys.stderr.flush()
        os._exit(DeadlinePassed.exit_code)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _first_line(error: BaseException) -> str:
    lines: Sequence[str] = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
