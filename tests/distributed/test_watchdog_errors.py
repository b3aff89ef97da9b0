"""An error of one rank, or a store that does not answer, keeps no other rank waiting."""

import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from watched import (
    CODE,
    LONG_S,
    NUM_RANKS,
    Store,
    code_of,
    forked,
    hurry,
    lose,
    make_known,
    pass_and_wait,
    told,
    watched,
)

from osft_mcore.errors import CheckpointError
from osft_mcore.parallel import board as boards
from osft_mcore.parallel import watchdog
from osft_mcore.parallel.board import Board, BoardLost, Place
from osft_mcore.parallel.watchdog import Watchdog

HERE = Place(host="a", phase="train", number=1)
# A rank that does not end is what these tests are about.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("how", "code", "error"),
    [
        ("failed", 1, "RuntimeError: as a collective does"),
        ("no room", 1, "OSError: no room, [redacted]"),
        ("not saved", CheckpointError.exit_code, "CheckpointError: rank 0 alone has no room"),
    ],
)
def test_peers_of_a_rank_that_failed_do_not_wait_for_their_deadline(
    how: str, code: int, error: str, tmp_path: Path
) -> None:
    def run(rank: int, store: Store) -> None:
        pass_and_wait(rank, store, how, train_s=LONG_S)

    began = time.monotonic()
    with forked(tmp_path, run) as pids:
        assert [code_of(pids, rank) for rank in range(NUM_RANKS)] == [CODE, CODE, code]
    assert time.monotonic() - began < watchdog.GRACE_S + 10
    for rank in range(2):
        says = f"[rank {rank}] rank 2 says: rank 2 failed in train ({error}); the run ends\n"
        assert says in told(tmp_path, rank)
        assert "in pass_and_wait" in told(tmp_path, rank), "the stacks are printed"
    assert "does not answer" not in "".join(told(tmp_path, rank) for rank in range(NUM_RANKS))


def fail_alike(rank: int, store: Store) -> None:
    with watched(rank, store, train_s=LONG_S) as watch, watch.phase("save"):
        store.add("here", 1)
        while store.add("here", 0) < NUM_RANKS:
            time.sleep(0.01)
        # It sees that the others have ended.
        time.sleep(4 * watchdog.BEAT_S if rank == 2 else 0.0)
        lose("not saved")


@pytest.mark.usefixtures("quick")
def test_what_all_raise_is_the_error_of_each(tmp_path: Path) -> None:
    with forked(tmp_path, fail_alike) as pids:
        codes = [code_of(pids, rank) for rank in range(NUM_RANKS)]
    assert codes == [CheckpointError.exit_code] * NUM_RANKS
    for rank in range(NUM_RANKS):
        assert "rank " not in told(tmp_path, rank), "who is missing, or another rank's error"


def follow_an_error(rank: int, store: Store) -> None:
    """Rank 2 fails, and rank 1 because rank 2 is gone."""
    with watched(rank, store, train_s=LONG_S) as watch, watch.phase("train"):
        if rank == 2:
            lose("no room")
        if rank == 1:
            while not store.check(["watchdog/end"]):
                time.sleep(0.01)
            lose("failed")
        time.sleep(LONG_S)


@pytest.mark.usefixtures("quick")
def test_who_fails_because_of_another_says_so(tmp_path: Path) -> None:
    with forked(tmp_path, follow_an_error) as pids:
        assert [code_of(pids, rank) for rank in range(NUM_RANKS)] == [CODE, 1, 1]
    assert "[rank 1] rank 2 says: rank 2 failed in train (OSError: " in told(tmp_path, 1)
    assert "does not answer" not in told(tmp_path, 0) + told(tmp_path, 1)


def end_one_that_ends(watch: Watchdog) -> None:
    while not watch._ended.is_set():
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def fail_after_a_loss(rank: int, store: Store) -> None:
    """Rank 2 is killed, rank 1 loses its connection to it, and the launcher tells rank 1 to end."""
    with watched(rank, store, train_s=LONG_S) as watch, watch.phase("train"):
        if rank == 2:
            lose("killed")
        if rank == 1:
            time.sleep(1.0)
            threading.Thread(target=end_one_that_ends, args=(watch,), daemon=True).start()
            lose("failed")
        time.sleep(LONG_S)


@pytest.mark.usefixtures("quick")
def test_who_is_lost_is_named_although_the_launcher_ends_the_others(tmp_path: Path) -> None:
    with forked(tmp_path, fail_after_a_loss) as pids:
        assert [code_of(pids, rank) for rank in range(NUM_RANKS)] == [CODE, 1, -signal.SIGKILL]
    named = "does not answer: killed, frozen, or cut off; last seen in train"
    assert f"rank 2 (host {socket.gethostname()}) {named}" in told(tmp_path, 1)


def test_a_lost_store_is_said_once_and_ends_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.1)
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in range(NUM_RANKS):
        make_known(rank, server)
    with watched(0, TCPStore("localhost", server.port, None, False), train_s=LONG_S) as watch:
        del server
        for _ in range(3):
            with watch.phase("train"):
                time.sleep(3 * watchdog.BEAT_S)
    assert capfd.readouterr().err.count("the store of the launcher does not answer") == 1


@contextmanager
def held_by_rank_0() -> Iterator[tuple[int, int]]:
    """Process and port of a rank that has the store, as where torchrun leaves it to rank 0."""
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
            make_known(0, server)
            os.write(writer, json.dumps(server.port).encode())
            time.sleep(LONG_S)
        finally:
            os._exit(99)
    try:
        yield pid, json.loads(os.read(reader, 100))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)
        os.close(writer)


def freeze(child: int) -> None:
    os.kill(child, signal.SIGSTOP)
    # On a busy machine its threads go on for a while.
    os.waitpid(child, os.WUNTRACED)


def wait_or_go_on(rank: int, store: Store) -> None:
    """The store freezes in `train`. Rank 1 waits there; rank 2 is through in time."""
    with watched(rank, store, train_s=3.0, holders=[0]) as watch:
        with watch.phase("train"):
            os.write(2, b"in train\n")
            time.sleep(LONG_S if rank == 1 else 1.0)
        for _ in range(5):
            with watch.phase("sync"):
                time.sleep(0.4)


def test_a_frozen_store_costs_names_and_no_run(tmp_path: Path) -> None:
    """With the true times: `limit + 10 s` is what docs/faults.md promises."""
    with held_by_rank_0() as (holder, port):
        with forked(tmp_path, wait_or_go_on, ranks=[1, 2], port=port) as pids:
            while not all("in train" in told(tmp_path, rank) for rank in pids):
                time.sleep(0.01)
            freeze(holder)
            began = time.monotonic()
            codes = {rank: code_of(pids, rank) for rank in (2, 1)}
        assert codes == {1: CODE, 2: 0}
        assert time.monotonic() - began < 3.0 + 10
    assert "train is not over after 0.05 minutes" in told(tmp_path, 1)
    assert "the store of rank 0 does not answer" in told(tmp_path, 1)
    assert "[rank 1] SIGKILL to rank 0" in told(tmp_path, 1), "torchrun would wait for it"
    assert told(tmp_path, 2).count("the store of rank 0 does not answer") == 1
    assert "not over" not in told(tmp_path, 2)


def test_a_store_that_answers_again_is_used_again() -> None:
    with held_by_rank_0() as (holder, port):
        board = Board(TCPStore("localhost", port, None, False), 0, 1)
        board.show(HERE)
        freeze(holder)
        began = time.monotonic()
        with pytest.raises(BoardLost, match="does not answer"):
            board.ending()
        once = time.monotonic()
        for _ in range(10):
            with pytest.raises(BoardLost, match="does not answer"):
                board.look()
        assert once - began < boards.PATIENCE_S + 2
        assert time.monotonic() - once < boards.PATIENCE_S / 2, "it is asked once"
        os.kill(holder, signal.SIGCONT)
        seen, until = dict[int, object](), time.monotonic() + 10
        while not seen:
            assert time.monotonic() < until
            time.sleep(0.05)
            try:
                seen.update(board.look())
            except BoardLost:
                continue
