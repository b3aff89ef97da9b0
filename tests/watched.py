"""Ranks under a watchdog, without collectives: what tests of it share."""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from osft_mcore.errors import CheckpointError, DeadlinePassed
from osft_mcore.parallel import watchdog
from osft_mcore.parallel.board import Board
from osft_mcore.parallel.deadlines import Deadlines
from osft_mcore.parallel.peers import Process, this_process
from osft_mcore.parallel.watchdog import Watchdog

NUM_RANKS: Final = 3
DEADLINE_S: Final = 1.0
LONG_S: Final = 1000.0
CODE: Final = DeadlinePassed.exit_code
Store = TCPStore


def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"BEAT_S": 0.2, "SILENT_S": 0.8, "PARTING_S": 0.5, "LAST_RESORT_S": 3.0}
    for name, seconds in times.items():
        monkeypatch.setattr(watchdog, name, seconds)


def make_known(rank: int, store: Store, *, machine: str = "") -> None:
    process = this_process()
    process = replace(process, machine=machine or process.machine)
    store.set(f"peer/{rank}", json.dumps(asdict(process)))


def watched(
    rank: int,
    store: Store,
    *,
    train_s: float = DEADLINE_S,
    kills: bool = True,
    machine: str = "",
    holders: Collection[int] = (),
) -> Watchdog:
    """On a rank that knows the processes of all, as after the start of a run."""
    make_known(rank, store, machine=machine)
    return Watchdog(
        rank,
        deadlines=Deadlines({"train": train_s}, otherwise_s=LONG_S, slack=0.0),
        limit_collectives=lambda seconds: os.write(2, f"collectives {seconds:g}\n".encode()),
        board=Board(store, rank, NUM_RANKS, keeper="rank 0" if holders else "the launcher"),
        peers=[Process(**json.loads(store.get(f"peer/{r}"))) for r in range(NUM_RANKS)],
        holders=holders,
        kills=kills,
    )


def lose(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "failed":
        raise RuntimeError("as a collective does")
    elif how == "no room":
        raise OSError("no room, hf_" + "a1" * 20)
    elif how == "not saved":
        raise CheckpointError("rank 0 alone\nhas no room")
    elif how == "locked":
        # A call that keeps the interpreter's lock, and that a signal does not end.
        ctypes.PyDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
    time.sleep(LONG_S)


def pass_and_wait(rank: int, store: Store, how: str, *, lost: int = 2, **options: float) -> None:
    """All pass `rollout` and wait in `train`; one rank is lost, `how` says where."""
    with watched(rank, store, **options) as watch:  # type: ignore[arg-type]
        with watch.phase("rollout"):
            if rank == lost and how == "late":
                store.set("lost", "")
                lose(how)
            # Else, on a busy machine, their deadline may be over before it comes to be lost.
            while rank != lost and not store.check(["lost"]):
                time.sleep(0.01)
        with watch.phase("train"):
            if rank == lost:
                store.set("lost", "")
                lose(how)
            time.sleep(LONG_S)


@contextmanager
def forked(
    folder: Path,
    run: Callable[[int, Store], None],
    *,
    ranks: Collection[int] = range(NUM_RANKS),
    port: int = 0,
) -> Iterator[dict[int, int]]:
    """Process ids by rank; what a rank writes goes to a file of its own. None is left.

    `port`: of a store that is there already.
    """
    server = TCPStore("localhost", port, is_master=not port, wait_for_workers=False)
    pids = {}
    for rank in ranks:
        (folder / f"err_{rank}").touch()
        if (pid := os.fork()) == 0:
            code = 99
            try:
                os.dup2(os.open(folder / f"err_{rank}", os.O_WRONLY | os.O_APPEND), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                run(rank, TCPStore("localhost", server.port, None, False))
                code = 0
            except (RuntimeError, OSError):
                code = 1
            except CheckpointError as error:
                code = error.exit_code
            finally:
                os._exit(code)
        pids[rank] = pid
    try:
        yield pids
    finally:
        for pid in pids.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def code_of(pids: dict[int, int], rank: int) -> int:
    """Waits for its end."""
    code = os.waitstatus_to_exitcode(os.waitpid(pids[rank], 0)[1])
    del pids[rank]
    return code


def told(folder: Path, rank: int) -> str:
    return (folder / f"err_{rank}").read_text()
