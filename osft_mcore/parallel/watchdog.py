"""Ends a run whose ranks wait for nothing, and says which rank they waited for."""

import contextlib
import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Final, Protocol

from osft_mcore.errors import DeadlinePassed

BEAT_S: Final = 1.0
"""Between two signs of life of a rank."""
SILENT_S: Final = 3.5
"""Without one for so long it is dead or frozen, or its host is gone."""
LAST_RESORT_S: Final = 5.0
"""After a deadline: a thread of Python waits for ever where C code keeps the interpreter's lock;
this one does not, but it knows no names."""


IDLE: Final = "idle"
"""A phase without a deadline: ranks wait for work."""
FOR_EVER_S: Final = 30 * 24 * 3600.0
"""Timers take no infinity."""
BETWEEN: Final = "what comes between phases"
"""Nothing there takes long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is. Phases are counted from the start of the process; ranks pass the same."""

    host: str
    phase: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What a rank has made known."""

    rank: int
    place: Place
    silent: bool


class Store(Protocol):
    """The part of torch's key-value store that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Overwrites."""
        ...

    def get(self, key: str, /) -> bytes:
        """Waits for the key."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all are there."""
        ...


class Watchdog:
    """Limits how long phases take; a thread beside the main one, on every rank.

    When a phase is over its deadline the ranks that are missing are named, all stacks of this
    process are printed, and it ends with DeadlinePassed.exit_code. Does nothing unless entered.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        *,
        deadlines_s: Mapping[str, float],
        otherwise_s: float,
        limit_collectives: Callable[[float], None],
        store: Store | None,
        keeper: str = "the launcher",
    ) -> None:
        """Seconds by phase, `otherwise_s` for others and in between.

        `limit_collectives` is called with the seconds of each phase that is entered, and some more:
        they fail where this cannot help. `store`, which no other thread uses, is where ranks make
        themselves known, and `keeper` who has it; None: this one is alone.
        """
        self._rank, self._world_size, self._store = rank, world_size, store
        self._keeper, self._lost = keeper, ""
        self._deadlines_s, self._otherwise_s = deadlines_s, otherwise_s
        self._limit_collectives = limit_collectives
        self._place = Place(host=socket.gethostname(), phase=BETWEEN, number=0)
        self._entered_at, self._limit_s = time.monotonic(), otherwise_s
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._beats = 0
        self._on = False

    def __enter__(self) -> "Watchdog":
        self._on = True
        self._arm(self._place, self._otherwise_s)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if any(isinstance(one, RuntimeError) for one in (error, error and error.__cause__)):
            # It may be a collective that lost a peer.
            sys.stderr.write("".join(f"{line}\n" for line in self.missing().splitlines()))
        self._on = False
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Every rank enters the same phases in the same order, none inside another.

        What fails inside stays in it, for `missing`.
        """
        host, number = self._place.host, self._place.number
        self._arm(
            Place(host=host, phase=name, number=number + 1),
            FOR_EVER_S if name == IDLE else self._deadlines_s.get(name, self._otherwise_s),
        )
        yield
        self._arm(Place(host=host, phase=BETWEEN, number=number + 1), self._otherwise_s)

    def missing(self) -> str:
        """Which ranks do not answer, or are not here yet; takes a few seconds. Empty: none.

        Without a store it says that there is none.
        """
        if self._store is None:
            return self._lost
        try:
            before = self._beats_of_all()
            until = time.monotonic() + SILENT_S
            while time.monotonic() < until:
                # Others look for this one meanwhile.
                self._make_known()
                time.sleep(BEAT_S / 2)
            return describe(self._place, self._seen(before), rank=self._rank)
        except RuntimeError as error:
            return self._store_lost(error)

    def _store_lost(self, error: RuntimeError) -> str:
        text = " ".join(str(error).split())[:120]
        return f"the store of {self._keeper} does not answer, as if that were gone ({text})"

    def _arm(self, place: Place, limit_s: float) -> None:
        with self._lock:
            self._place, self._limit_s = place, limit_s
            self._entered_at = time.monotonic()
        if not self._on:
            return
        self._make_known()
        self._limit_collectives(limit_s + SILENT_S + 2 * LAST_RESORT_S)
        faulthandler.dump_traceback_later(
            limit_s + SILENT_S + LAST_RESORT_S, exit=True, file=sys.__stderr__ or sys.stderr
        )

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            self._make_known()
            with self._lock:
                place, limit_s = self._place, self._limit_s
                late = time.monotonic() - self._entered_at > limit_s
            if late:
                self._end(place, limit_s)

    def _make_known(self) -> None:
        """Also from the main thread, as soon as it comes to a phase."""
        with self._lock:
            if self._store is None:
                return
            self._beats += 1
            try:
                self._store.set(f"watchdog/place/{self._rank}", json.dumps(asdict(self._place)))
                self._store.set(f"watchdog/beats/{self._rank}", str(self._beats))
            except RuntimeError as error:
                self._store, self._lost = None, self._store_lost(error)
                sys.stderr.write(
                    f"[rank {self._rank}] {self._lost}; ranks that are lost from here on cannot be "
                    "named\n"
                )

    def _end(self, place: Place, limit_s: float) -> None:
        missing = self.missing()
        sys.stderr.write(
            f"[rank {self._rank}] {place.phase} is not over after {limit_s / 60:g} minutes "
            f"(deadlines.{_option(place.phase)}); the run ends\n"
            f"{missing or 'all other ranks are in it, too'}\n"
        )
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        os._exit(DeadlinePassed.exit_code)

    def _beats_of_all(self) -> dict[int, bytes]:
        with self._lock:
            store, names = self._store, [f"watchdog/beats/{r}" for r in range(self._world_size)]
            if store is None:
                return {}
            return {rank: store.get(name) for rank, name in enumerate(names) if store.check([name])}

    def _seen(self, before: Mapping[int, bytes]) -> list[Seen]:
        now, found = self._beats_of_all(), []
        with self._lock:
            for rank in now:
                assert self._store is not None, "beats were read from it"
                place = Place(**json.loads(self._store.get(f"watchdog/place/{rank}")))
                found.append(Seen(rank=rank, place=place, silent=now[rank] == before.get(rank)))
        return found


def describe(here: Place, seen: Sequence[Seen], *, rank: int) -> str:
    """The ranks that `rank`, which is `here`, waits for, a line each; empty if there are none."""
    lines = []
    for other in seen:
        if other.rank == rank:
            continue
        was = f"rank {other.rank} (host {other.place.host})"
        where = other.place.phase
        if other.silent:
            lines.append(f"{was} does not answer: killed, frozen, or cut off; last seen in {where}")
        elif other.place.number < here.number:
            lines.append(f"{was} has not come: it is in {where}")
    return "\n".join(lines)


def _option(phase: str) -> str:
    return "start" if phase == BETWEEN else phase
