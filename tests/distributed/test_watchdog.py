"""A rank that is lost or late is named, and nobody waits for it longer than was said."""

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

import pytest
import torch
from ranks import run_ranks
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from toy_run import toy_config, write_start

from osft_mcore.errors import DeadlinePassed, Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock
from osft_mcore.parallel import deadlines, groups, watchdog
from osft_mcore.parallel.board import LEFT, Board, Ending, Place, Seen, describe
from osft_mcore.parallel.deadlines import BETWEEN, Deadlines
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.peers import Process, this_process
from osft_mcore.parallel.topology import Topology
from osft_mcore.parallel.watchdog import Watchdog
from osft_mcore.train.start import build_actor, build_edge

NUM_RANKS: Final = 3
DEADLINE_S: Final = 1.0
LONG_S: Final = 1000.0
CODE: Final = DeadlinePassed.exit_code
Store = TCPStore
# A rank that does not end is what these tests are about.
pytestmark = pytest.mark.timeout(60)


def watched(
    rank: int, store: Store, *, train_s: float = DEADLINE_S, kills: bool = True
) -> Watchdog:
    """On a rank that knows the processes of all, as after the start of a run."""
    store.set(f"peer/{rank}", json.dumps(asdict(this_process())))
    return Watchdog(
        rank,
        deadlines=Deadlines({"train": train_s}, otherwise_s=LONG_S, slack=0.0),
        limit_collectives=lambda seconds: os.write(2, f"collectives {seconds:g}\n".encode()),
        board=Board(store, rank, NUM_RANKS),
        peers=[Process(**json.loads(store.get(f"peer/{r}"))) for r in range(NUM_RANKS)],
        kills=kills,
    )


def lose(how: str) -> None:
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    elif how == "frozen":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif how == "failed":
        raise RuntimeError("as a collective does")
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
def forked(folder: Path, run: Callable[[int, Store], None]) -> Iterator[dict[int, int]]:
    """Process ids by rank; what a rank writes goes to a file of its own. None is left."""
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    pids = {}
    for rank in range(NUM_RANKS):
        if (pid := os.fork()) == 0:
            code = 99
            try:
                os.dup2(os.open(folder / f"err_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
                run(rank, TCPStore("localhost", server.port, None, False))
                code = 0
            except RuntimeError:
                code = 1
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
    return os.waitstatus_to_exitcode(os.waitpid(pids.pop(rank), 0)[1])


def told(folder: Path, rank: int) -> str:
    return (folder / f"err_{rank}").read_text()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"BEAT_S": 0.2, "SILENT_S": 0.8, "PARTING_S": 0.5, "LAST_RESORT_S": 3.0}
    for name, seconds in times.items():
        monkeypatch.setattr(watchdog, name, seconds)


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
def test_peers_of_a_rank_that_failed_do_not_wait_for_their_deadline(tmp_path: Path) -> None:
    def run(rank: int, store: Store) -> None:
        pass_and_wait(rank, store, "failed", train_s=LONG_S)

    with forked(tmp_path, run) as pids:
        assert [code_of(pids, rank) for rank in range(NUM_RANKS)] == [CODE, CODE, 1]
    for rank in range(2):
        assert f"[rank {rank}] rank 2 says: rank 2 failed in train" in told(tmp_path, rank)


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


def alone(limits: list[float]) -> Watchdog:
    return Watchdog(
        0,
        deadlines=Deadlines({}, otherwise_s=LONG_S, slack=10.0),
        limit_collectives=limits.append,
        board=None,
    )


def test_one_that_is_not_entered_limits_nothing() -> None:
    limits: list[float] = []
    idle = alone(limits)
    with idle.phase("train"):
        time.sleep(0.01)
    assert idle.missing() == ""
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


def test_a_lost_store_is_said_once_and_ends_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "BEAT_S", 0.1)
    server = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    guard = Watchdog(
        0,
        deadlines=Deadlines({}, otherwise_s=LONG_S, slack=0.0),
        limit_collectives=lambda _s: None,
        board=Board(TCPStore("localhost", server.port, None, False), 0, 2),
    )
    with guard as watch:
        del server
        with watch.phase("train"):
            time.sleep(3 * watchdog.BEAT_S)
            # Not empty, which would mean that all are here.
            assert "the store of the launcher does not answer" in watch.missing()
    assert capfd.readouterr().err.count("the store of the launcher does not answer") == 1


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
