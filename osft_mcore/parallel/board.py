"""Where ranks make known where they are: keys in the launcher's store."""

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import Any, Final, Protocol, TypeVar

Answer = TypeVar("Answer")
PATIENCE_S: Final = 2.5
"""Without an answer of the store for so long, it is lost until it answers after all."""
LEFT: Final = "left"
"""In place of a phase: it has ended, and nobody waits for it."""
_END: Final = "watchdog/end"


class BoardLost(Exception):
    """The store does not answer."""


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
    raised: bool = False
    """By an error, which others may be about to raise, too."""


class Store(Protocol):
    """The part of torch's key-value store that is used here."""

    def set(self, key: str, value: str, /) -> None:
        """Overwrites."""
        ...

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        """Waits for the keys."""
        ...

    def check(self, keys: list[str], /) -> bool:
        """Whether all are there."""
        ...

    def delete_key(self, key: str, /) -> bool:
        """Whether it was there."""
        ...


class Board:
    """A rank's view of it. Every method raises BoardLost if the store does not answer within
    PATIENCE_S, or at once if it has not yet answered before. May be used from several threads."""

    def __init__(
        self, store: Store, rank: int, world_size: int, *, keeper: str = "the launcher"
    ) -> None:
        """`store`: nobody else uses this connection. `keeper`: who has the store."""
        self._store, self._rank, self._world_size = store, rank, world_size
        self._keeper, self._lost = keeper, ""
        self._questions = SimpleQueue[tuple[Callable[[Store], Any], Future[Any]]]()
        self._late = Future[Any]()
        self._late.set_result(None)
        self._beats = 0
        # Its calls have no timeouts of their own where the store's process is frozen or cut off.
        threading.Thread(target=self._answer, name="board", daemon=True).start()

    def clear(self) -> None:
        """Forget what an earlier start has left, which may have had the same store."""

        def forget(store: Store) -> None:
            for key in (_END, *map(_place, range(self._world_size))):
                store.delete_key(key)

        self._ask(forget)

    def show(self, place: Place) -> None:
        """This rank is there, and alive."""

        def show(store: Store) -> None:
            self._beats += 1
            store.set(_place(self._rank), json.dumps({"beat": self._beats, **asdict(place)}))

        self._ask(show)

    def look(self) -> dict[int, Sign]:
        """The ranks that have shown themselves."""
        found = {}
        for rank, text in self._ask(self._places).items():
            known = json.loads(text)
            beat = known.pop("beat")
            found[rank] = Sign(place=Place(**known), beat=beat)
        return found

    def _places(self, store: Store) -> dict[int, bytes]:
        # Two calls, not two a rank: all ranks of a large world may look at the same time.
        ranks = list(range(self._world_size))
        if not store.check([_place(rank) for rank in ranks]):
            ranks = [rank for rank in ranks if store.check([_place(rank)])]
        return dict(zip(ranks, store.multi_get([_place(rank) for rank in ranks]), strict=True))

    def announce(self, ending: Ending) -> None:
        """All ranks that look will end."""
        self._ask(lambda store: store.set(_END, json.dumps(asdict(ending))))

    def ending(self) -> Ending | None:
        """None as long as the run goes on."""
        told = self._ask(lambda store: store.multi_get([_END]) if store.check([_END]) else [])
        return Ending(**json.loads(told[0])) if told else None

    def _ask(self, question: Callable[[Store], Answer]) -> Answer:
        if self._lost or not self._late.done():
            raise BoardLost(self._lost or self._gone(f"not for {PATIENCE_S:g} s"))
        answer = Future[Answer]()
        self._questions.put((question, answer))
        try:
            return answer.result(PATIENCE_S)
        except TimeoutError:
            self._late = answer
            raise BoardLost(self._gone(f"not for {PATIENCE_S:g} s")) from None
        except RuntimeError as error:
            # Its connection is gone for good.
            self._lost = self._gone(" ".join(str(error).split())[:120])
            raise BoardLost(self._lost) from error

    def _gone(self, why: str) -> str:
        return f"the store of {self._keeper} does not answer, as if that were gone ({why})"

    def _answer(self) -> None:
        while True:
            question, answer = self._questions.get()
            try:
                answer.set_result(question(self._store))
            except Exception as error:
                # Whoever asked raises it.
                answer.set_exception(error)


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
