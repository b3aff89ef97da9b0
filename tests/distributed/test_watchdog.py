"""A rank that is lost or late is named, and nobody waits for it longer than was said."""

import ctypes
import os
import signal
import sys
import time
from pathlib import Path
from typing import Final

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from osft_mcore.errors import DeadlinePassed
from osft_mcore.parallel import watchdog
from osft_mcore.parallel.watchdog import Place, Seen, Watchdog, describe

DEADLINE_S: Final = 1.0
LONG_S: Final = 1000.0


def run_watched(rank: int, how: str, port: int, folder: Path) -> None:
    """Three ranks pass `rollout` and wait in `train`; rank 2 is lost, `how` says where."""
    os.dup2(os.open(folder / f"err_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    guard = Watchdog(
        rank,
        3,
        deadlines_s={"rollout": LONG_S, "train": DEADLINE_S},
        otherwise_s=LONG_S,
        limit_collectives=lambda seconds: os.write(2, f"collectives {seconds:g}\n".encode()),
        store=TCPStore("localhost", port, None, False),
    )
    with guard as watch:
        with watch.phase("rollout"):
            if rank == 2 and how == "late":
                time.sleep(LONG_S)
        with watch.phase("train"):
            if rank == 2:
                lose(how)
            time.sleep(LONG_S)


def lose(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    else:
        # A call that keeps the interpreter's lock.
        ctypes.PyDLL(None).sleep(int(LONG_S))


@pytest.mark.parametrize("how", ["killed", "frozen", "locked", "late"])
def test_who_waits_says_for_whom_and_ends(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("BEAT_S", 0.2), ("SILENT_S", 1.0), ("LAST_RESORT_S", 1.0)):
        monkeypatch.setattr(watchdog, name, seconds)
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pids = []
    for rank in range(3):
        if (pid := os.fork()) == 0:
            try:
                run_watched(rank, how, store.port, tmp_path)
            finally:
                os._exit(0)
        pids.append(pid)
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids[:2]]
    waited_s = time.monotonic() - began
    if how == "locked":
        # Ended by what needs no lock, with its stacks, but without names.
        assert os.waitstatus_to_exitcode(os.waitpid(pids[2], 0)[1]) == 1
        assert "in lose" in (tmp_path / "err_2").read_text()
    else:
        os.kill(pids[2], signal.SIGKILL)
        os.waitpid(pids[2], 0)
    assert codes == [DeadlinePassed.exit_code] * 2
    assert waited_s < DEADLINE_S + 10
    for rank in range(2):
        told = (tmp_path / f"err_{rank}").read_text()
        assert f"[rank {rank}] train is not over after" in told
        assert "(deadlines.train); the run ends" in told
        assert "in run_watched" in told, "the stacks are printed"
        [line] = [line for line in told.splitlines() if line.startswith("rank ")]
        assert line.startswith("rank 2 (host ")
        if how == "late":
            assert line.endswith("has not come: it is in rollout")
        else:
            assert "does not answer" in line
            assert line.endswith("last seen in train")
        limits = [float(line.split()[1]) for line in told.splitlines() if "collectives" in line]
        assert min(limits) > DEADLINE_S, "this must come before a collective fails"


def test_the_description_names_the_lost_and_the_late_only() -> None:
    here = Place(host="a", phase="train", number=7)
    seen = [
        Seen(rank=0, place=here, silent=False),
        Seen(rank=1, place=Place(host="a", phase="rollout", number=6), silent=False),
        Seen(rank=2, place=Place(host="b", phase="sync", number=8), silent=False),
        Seen(rank=3, place=Place(host="b", phase="train", number=7), silent=True),
        Seen(rank=4, place=here, silent=True),
    ]
    assert describe(here, seen, rank=4).splitlines() == [
        "rank 1 (host a) has not come: it is in rollout",
        "rank 3 (host b) does not answer: killed, frozen, or cut off; last seen in train",
    ]
    assert describe(here, seen[:1], rank=0) == ""


def test_one_that_is_not_entered_limits_nothing() -> None:
    def limit(_seconds: float) -> None:
        raise AssertionError("limited")

    idle = Watchdog(
        0, 1, deadlines_s={}, otherwise_s=0.0, limit_collectives=limit, store=None
    )  # fmt: skip
    with idle.phase("train"):
        time.sleep(0.01)
    assert idle.missing() == ""


def test_a_lost_store_is_said_once_and_ends_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.1)
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    store = TCPStore("localhost", server.port, None, False)
    guard = Watchdog(
        0, 2, deadlines_s={}, otherwise_s=LONG_S, limit_collectives=lambda _s: None, store=store
    )  # fmt: skip
    with guard as watch:
        del server
        with watch.phase("train"):
            time.sleep(3 * watchdog.BEAT_S)
            # Not empty, which would mean that all are here.
            assert "the store of the launcher does not answer" in watch.missing()
    assert capfd.readouterr().err.count("the store of the launcher does not answer") == 1
