"""Where ranks make known where they are: keys in the launcher's store."""

import json
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Final, Protocol

LEFT: Final = "left"
"""In place of a phase: it has ended, and nobody waits for it."""
_END: Final = "watchdog/end"


class BoardLost(Exception):
    """The store does not answer any more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a rank is. `number` counts the edges of phases that it has passed, as all do."""

    host: str
    phase: str
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Sign:
    """What a rank has made known last."""

    place: Place
    beat: int
    """One more each time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """A rank, looked at twice."""

    rank: int
    place: Place
    silent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why the run ends, said by one rank to all."""

    rank: int
    text: str
    silent: list[int]
    """Ranks that do not answer."""


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

    def delete_key(self, key: str, /) -> bool:
        """Whether it was there."""
        ...


class Board:
    """A rank's view of it. Every method raises BoardLost if the store does not answer; that is
    printed once. May be used from several threads."""

    def __init__(
        self, store: Store, rank: int, world_size: int, *, keeper: str = "the launcher"
    ) -> None:
        """`store`: nobody else uses this connection. `keeper`: who has the store."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._keeper, self._lost = keeper, ""
        self._lock = threading.Lock()
        self._beats = 0

    def clear(self) -> None:
        """Forget what an earlier start has left, which may have had the same store."""
        with self._use() as store:
            store.delete_key(_END)
            for rank in range(self._world_size):
                store.delete_key(_place(rank))

    def show(self, place: Place) -> None:
        """This rank is there, and alive."""
        with self._use() as store:
            self._beats += 1
            store.set(_place(self._rank), json.dumps({"beat": self._beats, **asdict(place)}))

    def look(self) -> dict[int, Sign]:
        """The ranks that have shown themselves."""
        found = {}
        with self._use() as store:
            for rank in range(self._world_size):
                if store.check([_place(rank)]):
                    known = json.loads(store.get(_place(rank)))
                    beat = known.pop("beat")
                    found[rank] = Sign(place=Place(**known), beat=beat)
        return found

    def announce(self, ending: Ending) -> None:
        """All ranks that look will end."""
        with self._use() as store:
            store.set(_END, json.dumps(asdict(ending)))

    def ending(self) -> Ending | None:
        """None as long as the run goes on."""
        with self._use() as store:
            return Ending(**json.loads(store.get(_END))) if store.check([_END]) else None

    @contextmanager
    def _use(self) -> Iterator[Store]:
        with self._lock:
            if self._lost:
                raise BoardLost(self._lost)
            try:
                yield self._store
            except RuntimeError as error:
                why = " ".join(str(error).split())[:120]
                self._lost = (
                    f"the store of {self._keeper} does not answer, as if that were gone ({why})"
                )
                sys.stderr.write(
                    f"[rank {self._rank}] {self._lost}; ranks that are lost from here on cannot be "
                    "named\n"
                )
                raise BoardLost(self._lost) from error


def compared(before: Mapping[int, Sign], now: Mapping[int, Sign]) -> list[Seen]:
    """Two looks at the board; whoever did not stir in between is silent."""
    return [
        Seen(
            rank=rank,
            place=sign.place,
            silent=rank in before and before[rank].beat == sign.beat,
        )
        for rank, sign in now.items()
    ]


def describe(here: Place, seen: Sequence[Seen], *, rank: int) -> str:
    """The ranks that `rank`, which is `here`, waits for, a line each; empty if there are none."""
    lines = []
    for other in seen:
        where = other.place.phase
        if other.rank == rank or where == LEFT:
            continue
        was = f"rank {other.rank} (host {other.place.host})"
        if other.silent:
            lines.append(f"{was} does not answer: killed, frozen, or cut off; last seen in {where}")
        elif other.place.number < here.number:
            lines.append(f"{was} has not come: it is in {where}")
    return "\n".join(lines)


def _place(rank: int) -> str:
    return f"watchdog/place/{rank}"
