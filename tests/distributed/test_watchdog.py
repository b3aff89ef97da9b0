"""A rank that is lost or late is named, and nobody waits for it longer than was said."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from toy_run import toy_config, write_start
from watched import (
    CODE,
    DEADLINE_S,
    LONG_S,
    NUM_RANKS,
    Store,
    code_of,
    forked,
    hurry,
    lose,
    pass_and_wait,
    told,
    watched,
)

from osft_mcore.errors import Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock
from osft_mcore.parallel import deadlines, groups, watchdog
from osft_mcore.parallel.board import LEFT, Board, Ending, Place, Seen, describe
from osft_mcore.parallel.deadlines import BETWEEN, Deadlines
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.parallel.watchdog import Watchdog
from osft_mcore.train.start import build_actor, build_edge

# A rank that does not end is what these tests are about.
pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hurry(monkeypatch)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("how", ["killed", "frozen", "locked", "late"])
def test_who_waits_says_for_whom_and_all_end(how: str, tmp_path: Path) -> None:
    """As under torchrun, which would wait for a frozen rank, and for one that heeds no signal."""
    began = time.monotonic()
    with forked(tmp_path, lambda rank, store: pass_and_wait(rank, store, how)) as pids:
        codes = [code_of(pids, rank) for rank in range(NUM_RANKS)]
        waited_s = time.monotonic() - began
    assert codes == [CODE, CODE, CODE if how == "late" else -signal.SIGKILL]
    assert waited_s < DEADLINE_S + 10
    assert "train is not over after 0.02 minutes" in told(tmp_path, 0)
    for rank in range(2):
        text = told(tmp_path, rank)
        assert "(deadlines.train); the run ends" in text
        assert "in pass_and_wait" in text, "the stacks are printed"
        [line] = {line for line in text.splitlines() if line.startswith("rank ")}
        assert line.startswith("rank 2 (host ")
        if how == "late":
            assert line.endswith("has not come: it is in rollout")
        else:
            assert "does not answer" in line
            assert line.endswith("last seen in train")
        limits = [float(line.split()[1]) for line in text.splitlines() if "collectives" in line]
        assert min(limits) > DEADLINE_S, "this must come before a collective fails"
    # Its stacks, too, unless nothing runs there any more.
    assert ("in lose" in told(tmp_path, 2)) == (how in ("locked", "late"))
    if how == "late":
        assert "says: train is not over after" in told(tmp_path, 2)


@pytest.mark.usefixtures("quick")
def test_under_the_own_launcher_nobody_else_kills(tmp_path: Path) -> None:
    """It ends all at once, and takes a rank that was killed for the cause."""

    def run(rank: int, store: Store) -> None:
        pass_and_wait(rank, store, "frozen", kills=False)

    with forked(tmp_path, run) as pids:
        assert [code_of(pids, rank) for rank in range(2)] == [CODE] * 2
        state = Path(f"/proc/{pids[2]}/stat").read_text().rpartition(")")[2].split()[0]
    assert state == "T"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("lost", "how"), [(2, "late"), (0, "frozen")])
def test_who_is_missing_is_told_long_before_the_deadline_and_once(
    lost: int, how: str, tmp_path: Path
) -> None:
    speaks, silent = (1, 2) if lost == 0 else (0, 1)

    def run(rank: int, store: Store) -> None:
        pass_and_wait(rank, store, how, lost=lost, train_s=10.0)

    with forked(tmp_path, run):
        until = time.monotonic() + 8
        while f"rank {lost} (host" not in told(tmp_path, speaks) and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(2.5)
        lines = told(tmp_path, speaks).splitlines()
        assert "rank " not in told(tmp_path, silent)
    lines = [line for line in lines if "collectives" not in line]
    assert len(lines) == 2, lines
    assert lines[0].startswith(f"[rank {speaks}] in train for ")
    assert lines[0].endswith(" s; the run ends after 0.17 minutes")
    where = "does not answer" if how == "frozen" else "has not come: it is in rollout"
    assert where in lines[1]


@pytest.mark.usefixtures("quick")
def test_a_lost_machine_is_told_by_a_rank_of_another_one(tmp_path: Path) -> None:
    """Ranks 0 and 1 would both be on it."""

    def run(rank: int, store: Store) -> None:
        machine = "another" if rank == 2 else ""
        with watched(rank, store, train_s=10.0, machine=machine) as watch, watch.phase("train"):
            if rank < 2:
                lose("frozen")
            time.sleep(LONG_S)

    with forked(tmp_path, run):
        until, text = time.monotonic() + 8, ""
        while not all(f"rank {lost} (host" in text for lost in (0, 1)):
            assert time.monotonic() < until, text
            time.sleep(0.05)
            text = told(tmp_path, 2)
    assert "[rank 2] in train for " in text
    assert "not over" not in text, "this comes long before the deadline"


def leave(rank: int, store: Store) -> None:
    """Rank 1 has nothing more to do, the others have."""
    with watched(rank, store, train_s=6.0) as watch:
        if rank == 1:
            return
        with watch.phase("train"):
            time.sleep(3.0)


@pytest.mark.usefixtures("quick")
def test_nobody_waits_for_a_rank_that_has_left(tmp_path: Path) -> None:
    with forked(tmp_path, leave) as pids:
        assert [code_of(pids, rank) for rank in range(NUM_RANKS)] == [0] * NUM_RANKS
    assert "rank " not in told(tmp_path, 0)


def come_late(rank: int, store: Store) -> None:
    """The phase is over while the watchdog looks for those that are missing."""
    with watched(rank, store) as watch:
        with watch.phase("train"):
            time.sleep(DEADLINE_S + 2 * watchdog.BEAT_S + 0.2)
        time.sleep(2.0)


@pytest.mark.usefixtures("quick")
def test_a_phase_that_ends_after_all_ends_nothing(tmp_path: Path) -> None:
    with forked(tmp_path, come_late) as pids:
        assert [code_of(pids, rank) for rank in range(NUM_RANKS)] == [0] * NUM_RANKS
    assert "not over" not in told(tmp_path, 0)


def test_the_description_names_the_lost_and_the_late_only() -> None:
    here = Place(host="a", phase="train", number=7)
    seen = [
        Seen(rank=0, place=here, silent=False),
        Seen(rank=1, place=Place(host="a", phase="rollout", number=6), silent=False),
        Seen(rank=2, place=Place(host="b", phase="sync", number=8), silent=False),
        Seen(rank=3, place=Place(host="b", phase="train", number=7), silent=True),
        Seen(rank=4, place=here, silent=True),
        Seen(rank=5, place=Place(host="b", phase=LEFT, number=0), silent=True),
    ]
    assert describe(here, seen, rank=4).splitlines() == [
        "rank 1 (host a) has not come: it is in rollout",
        "rank 3 (host b) does not answer: killed, frozen, or cut off; last seen in train",
    ]
    assert describe(here, seen[:1], rank=0) == ""


def alone(limits: list[float], *, train_s: float = LONG_S) -> Watchdog:
    return Watchdog(
        0,
        deadlines=Deadlines({"train": train_s}, otherwise_s=LONG_S, slack=10.0),
        limit_collectives=limits.append,
        board=None,
    )


@pytest.mark.usefixtures("quick")
def test_a_rank_that_is_alone_waits_for_nobody(tmp_path: Path) -> None:
    def run(_rank: int, _store: Store) -> None:
        with alone([], train_s=DEADLINE_S) as watch, watch.phase("train"):
            time.sleep(LONG_S)

    with forked(tmp_path, run, ranks=[0]) as pids:
        assert code_of(pids, 0) == CODE
    assert "train is not over after 0.02 minutes (deadlines.train); the run ends\n" in told(
        tmp_path, 0
    )
    assert "other ranks" not in told(tmp_path, 0)


def test_one_that_is_not_entered_limits_nothing() -> None:
    limits: list[float] = []
    idle = alone(limits)
    with idle.phase("train"):
        time.sleep(0.01)
    assert limits == []


def test_collectives_get_less_time_once_a_phase_was_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadlines, "LEAST_S", 100.0)
    limits: list[float] = []
    with alone(limits) as watch:
        for _ in range(2):
            with watch.phase("train"):
                time.sleep(0.01)
    more_s = watchdog.SILENT_S + 2 * watchdog.LAST_RESORT_S
    assert [seconds - more_s for seconds in limits] == [LONG_S, LONG_S, LONG_S, 100, 100]


def join_after_another_start(rank: int) -> tuple[bool, list[int]]:
    """What is left of an earlier start on the launcher's store, and whose processes are known."""
    context = join_groups(Topology(tp=1, pp=1, dp=2), device=torch.device("cpu"))
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    board = Board(TCPStore(address, port, None, False), rank, 2)
    board.announce(Ending(rank=1, text="of an earlier start", silent=[]))
    board.show(Place(host="old", phase=BETWEEN, number=9))
    groups.wait_for_all(context)
    watch = groups._watchdog(context, Deadlines({}, otherwise_s=LONG_S, slack=0.0))
    left = board.ending() is not None or bool(board.look())
    groups.wait_for_all(context)
    return left, [peer.pid for peer in watch._peers]


def test_a_later_start_on_the_same_store_begins_anew() -> None:
    (left, pids), (also_left, same) = run_ranks(join_after_another_start, 2)
    assert not left
    assert not also_left
    assert pids == same
    assert len(set(pids)) == 2


def stop_and_save(_rank: int, root: Path) -> list[str]:
    """The phases that a run enters whose time is over after its first step."""
    entered: list[str] = []

    @contextmanager
    def within(phase: str) -> Iterator[None]:
        entered.append(phase)
        yield
        entered.append(f"end of {phase}")

    topology = Topology(tp=1, pp=1, dp=1)
    config = toy_config(write_start(root), root / "run", topology)
    config = replace(config, checkpoint=replace(config.checkpoint, stop_after="1s"))
    actor = build_actor(config, join_groups(topology, device=torch.device("cpu")))
    clock, console = Clock(within=within), Console(enabled=False)
    edge = build_edge(config, "sft", 9, actor, clock, console, None)
    with pytest.raises(Stopped):
        edge.passed(1, sound=True)
    assert (root / "run" / "checkpoints" / "step_1").is_dir()
    return entered


def test_the_last_save_of_a_run_that_stops_has_the_deadline_of_saves(tmp_path: Path) -> None:
    [entered] = run_ranks(stop_and_save, 1, root=tmp_path)
    # The first waits for a save that is still written, of which there is none.
    assert entered == 2 * ["save", "end of save"]
