"""Ends a run whose ranks wait for nothing, and says which rank they waited for."""

import contextlib
import faulthandler
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from osft_mcore.errors import DeadlinePassed, NothingLeft, Stopped
from osft_mcore.log import redact
from osft_mcore.parallel.board import (
    LEFT,
    Board,
    BoardLost,
    Ending,
    Place,
    Sign,
    compared,
    describe,
)
from osft_mcore.parallel.deadlines import BETWEEN, IDLE, Deadlines, Limit
from osft_mcore.parallel.peers import Process, signal_process

BEAT_S: Final = 1.0
"""Between two signs of life of a rank."""
SILENT_S: Final = 3.5
"""Without one for so long it is dead or frozen, or its host is gone."""
REMIND_S: Final = 60.0
"""After so long in a phase, or after a tenth of its deadline, ranks that are missing are named."""
PARTING_S: Final = 1.5
"""From saying that the run ends to ending: all see it, and print their stacks."""
GRACE_S: Final = 2.0
"""After another rank has raised an error: where all raise it, each ends with its own code."""
LAST_RESORT_S: Final = 5.0
"""After a deadline: a thread of Python waits for ever where C code keeps the interpreter's lock;
this one does not, but it knows no names."""
STACKS: Final = signal.SIGUSR2
"""What a process that is watched prints its stacks at, whoever keeps the interpreter's lock."""
LONGEST_ERROR: Final = 300
"""Characters of an error that others are told."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stay:
    """In a phase, or between two."""

    place: Place
    limit: Limit
    since: float
    """By the monotonic clock."""


class Watchdog:
    """Limits how long phases take; a thread beside the main one, on every rank.

    Ranks that are missing for long are named, once. When a phase is over its deadline on one rank,
    all print their stacks and end with DeadlinePassed.exit_code. Does nothing unless entered.
    """

    def __init__(
        self,
        rank: int,
        *,
        deadlines: Deadlines,
        limit_collectives: Callable[[float], None],
        board: Board | None,
        peers: Sequence[Process] = (),
        holders: Collection[int] = (),
        kills: bool = False,
    ) -> None:
        """`limit_collectives` is called with the seconds of each phase that is entered, and some
        more: they fail where this cannot help. `board` None: this rank is alone.

        `peers`: the processes of all ranks. `holders`: ranks that are silent if the board is lost.
        `kills`: silent ranks of this machine, as the run ends; their launcher would wait for them.
        """
        self._rank, self._board, self._peers = rank, board, peers
        self._deadlines, self._limit_collectives = deadlines, limit_collectives
        self._holders, self._kills = list(holders), kills
        place = Place(host=socket.gethostname(), phase=BETWEEN, number=0)
        self._stay = Stay(place=place, limit=deadlines.limit(BETWEEN), since=time.monotonic())
        self._ended = threading.Event()
        self._on = False
        self._looked_at, self._signs = time.monotonic(), dict[int, Sign]()
        self._told: tuple[int, set[str]] = (0, set())
        self._board_lost = False
        # Who may be lost together with rank 0 cannot speak for it.
        elsewhere = (rank for rank, peer in enumerate(peers) if peer.machine != peers[0].machine)
        self._reminds = rank in (0, next(elsewhere, 1))

    def __enter__(self) -> "Watchdog":
        self._on = True
        faulthandler.register(STACKS, file=sys.__stderr__ or sys.stderr)
        self._enter(BETWEEN)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = isinstance(error, Exception) and not isinstance(error, Stopped | NothingLeft)
        # torchrun sends it at once where a rank is dead, and nobody else may name that one.
        previous = signal.signal(signal.SIGTERM, signal.SIG_IGN) if failed else None
        self._on = False
        self._ended.set()
        self._thread.join()
        if error is None or isinstance(error, Stopped | NothingLeft):
            self._show(Place(host=self._stay.place.host, phase=LEFT, number=0))
        elif isinstance(error, Exception):
            self._say_failed(error)
        if previous is not None:
            signal.signal(signal.SIGTERM, previous)
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(STACKS)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Every rank enters the same phases in the same order, none inside another.

        What fails inside stays in it, for those who look.
        """
        self._enter(name)
        yield
        self._enter(BETWEEN)

    def _look(self, why: str, *, raised: bool = False) -> Ending:
        """An end with the ranks that do not answer, or are not here yet; takes a few seconds.

        Another rank's end, if that announces one meanwhile. `raised`: by an error of this rank.
        """
        here, silent, missing = self._stay.place, list[int](), ""
        try:
            if self._board is not None:
                before = self._board.look()
                until = time.monotonic() + SILENT_S
                while time.monotonic() < until:
                    if (ending := self._board.ending()) is not None:
                        return ending
                    # Others look for this one meanwhile.
                    self._board.show(self._stay.place)
                    time.sleep(BEAT_S / 2)
                seen = compared(before, self._board.look())
                silent = [one.rank for one in seen if one.silent and one.place.phase != LEFT]
                missing = describe(here, seen, rank=self._rank)
                missing = missing or ("" if raised else "all other ranks are in it, too")
        except BoardLost as lost:
            silent, missing = self._holders, str(lost)
        return Ending(
            rank=self._rank, text=f"{why}\n{missing}".strip(), silent=silent, raised=raised
        )

    def _enter(self, phase: str) -> None:
        left, now = self._stay, time.monotonic()
        place = Place(host=left.place.host, phase=phase, number=left.place.number + 1)
        if self._on:
            self._deadlines.note(left.place.phase, now - left.since)
        limit = self._deadlines.limit(phase)
        self._stay = Stay(place=place, limit=limit, since=now)
        if not self._on:
            return
        self._show(place)
        self._limit_collectives(limit.seconds + SILENT_S + 2 * LAST_RESORT_S)
        faulthandler.dump_traceback_later(
            limit.seconds + SILENT_S + LAST_RESORT_S,
            exit=True,
            file=sys.__stderr__ or sys.stderr,
        )

    def _show(self, place: Place) -> None:
        with contextlib.suppress(BoardLost):
            if self._board is not None:
                self._board.show(place)

    def _watch(self) -> None:
        while not self._ended.wait(BEAT_S):
            stay = self._stay
            late = time.monotonic() - stay.since > stay.limit.seconds
            if not late:
                self._show(stay.place)
            if (ending := self._announced()) is not None:
                if ending.raised and self._ended.wait(GRACE_S):
                    return
                self._end(ending)
            elif late:
                self._end_late(stay)
            elif self._reminds and stay.place.phase != IDLE:
                self._remind(stay)

    def _announced(self) -> Ending | None:
        """What ends the run. Says, once, if the board is lost."""
        try:
            ending = None if self._board is None else self._board.ending()
        except BoardLost as lost:
            if not (self._board_lost or self._ended.is_set()):
                sys.stderr.write(
                    f"[rank {self._rank}] {lost}; as long as that lasts, no rank that is lost can "
                    "be named\n"
                )
            self._board_lost = True
            return None
        self._board_lost = False
        return ending

    def _remind(self, stay: Stay) -> None:
        """Name, once a phase, who keeps others waiting; not on rank 0 if that is among them."""
        now = time.monotonic()
        after_s = max(SILENT_S, min(REMIND_S, stay.limit.seconds / 10))
        if self._board is None or now - self._looked_at < after_s:
            return
        try:
            before, self._signs = self._signs, self._board.look()
        except BoardLost:
            return
        self._looked_at = now
        if now - stay.since < after_s:
            return
        text = describe(stay.place, compared(before, self._signs), rank=self._rank)
        lines = text.splitlines()
        if self._rank and not any(line.startswith("rank 0 ") for line in lines):
            return
        told = self._told[1] if self._told[0] == stay.place.number else set()
        if new := [line for line in lines if line not in told]:
            sys.stderr.write(
                f"[rank {self._rank}] in {stay.place.phase} for {now - stay.since:.0f} s; the run "
                f"ends after {stay.limit.minutes}\n" + "".join(f"{line}\n" for line in new)
            )
        self._told = (stay.place.number, told | set(lines))

    def _say_failed(self, error: Exception) -> None:
        """Ranks that wait for this one end, too. Only what a lost rank may have caused is looked
        into; else it takes no time, as all may raise the same."""
        place, told = self._stay.place, _in_one_line(error)
        why = f"rank {self._rank} failed in {place.phase} ({told}); the run ends"
        causes = (error, error.__cause__)
        by_a_peer = any(isinstance(one, RuntimeError | ConnectionError) for one in causes)
        ending = self._announced()
        if ending is None and by_a_peer:
            ending = self._look(why, raised=True)
        elif ending is None:
            ending = Ending(rank=self._rank, text=why, silent=[], raised=True)
        if ending.rank == self._rank:
            sys.stderr.write("".join(f"{line}\n" for line in ending.text.splitlines()[1:]))
            self._tell(ending)
        elif by_a_peer:
            sys.stderr.write(f"[rank {self._rank}] rank {ending.rank} says: {ending.text}\n")
        if self._acts_on(ending):
            self._signal(ending.silent, signal.SIGKILL)

    def _end_late(self, stay: Stay) -> None:
        phase, limit = stay.place.phase, stay.limit
        ending = self._look(
            f"{phase} is not over after {limit.minutes} ({limit.option}); the run ends"
        )
        # Else the main thread got through meanwhile, or ends by itself.
        if self._stay is stay and not self._ended.is_set():
            self._end(ending)

    def _end(self, ending: Ending) -> None:
        """This process, and on this machine, if nobody else does it, those that cannot."""
        mine = ending.rank == self._rank
        said = "" if mine else f"rank {ending.rank} says: "
        sys.stderr.write(f"[rank {self._rank}] {said}{ending.text}\n")
        faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr)
        if mine:
            self._tell(ending)
        acts = self._acts_on(ending)
        if acts:
            self._signal(ending.silent, STACKS)
        time.sleep(PARTING_S)
        if acts:
            self._signal(ending.silent, signal.SIGKILL)
        os._exit(DeadlinePassed.exit_code)

    def _tell(self, ending: Ending) -> None:
        with contextlib.suppress(BoardLost):
            if self._board is not None:
                self._board.announce(ending)

    def _acts_on(self, ending: Ending) -> bool:
        """Whether this rank ends the run, or is the first of a machine where that one is not."""
        if ending.rank == self._rank or not self._peers:
            return ending.rank == self._rank
        here = self._peers[self._rank].machine
        ours = [rank for rank, peer in enumerate(self._peers) if peer.machine == here]
        alive = [rank for rank in ours if rank not in ending.silent]
        return ending.rank not in ours and alive[:1] == [self._rank]

    def _signal(self, ranks: Sequence[int], number: signal.Signals) -> None:
        if number == signal.SIGKILL and not self._kills:
            return
        for rank in ranks:
            if rank == self._rank or rank >= len(self._peers):
                continue
            if signal_process(self._peers[rank], number):
                sys.stderr.write(f"[rank {self._rank}] {number.name} to rank {rank}\n")


def _in_one_line(error: Exception) -> str:
    """As other ranks are told of it."""
    secrets = redact.environment_secrets(os.environ)
    told = redact.without_secrets(f"{type(error).__name__}: {error}", secrets)
    return " ".join(told.split())[:LONGEST_ERROR]
