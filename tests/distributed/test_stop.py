"""Ranks that are told to stop, by real signals."""

import ctypes
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from osft_mcore.errors import Stopped
from osft_mcore.parallel import stop
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.stop import StopSignals, agreed_stop
from osft_mcore.parallel.topology import Topology
from osft_mcore.parallel.world import PROGRAM_START, STARTED, end_with_parent

GRACEFUL = (signal.SIGTERM, signal.SIGUSR1)


def joined(world_size: int) -> ParallelContext:
    return join_groups(Topology(tp=1, pp=1, dp=world_size), device=torch.device("cpu"))


def agreements(rank: int, reasons: list[list[str]]) -> list[str]:
    context = joined(len(reasons[0]))
    return [agreed_stop(of_ranks[rank], context) for of_ranks in reasons]


def test_one_reason_is_everybodys() -> None:
    late = "SLURM_JOB_END_TIME in 43 s"
    reasons = [["", "", ""], ["", "SIGTERM", ""], ["", "", late], ["", late, "SIGUSR1"], [""] * 3]
    expected = ["", "rank 1: SIGTERM", f"rank 2: {late}", f"rank 1: {late}", ""]
    assert run_ranks(agreements, 3, reasons=reasons) == [expected] * 3


def exchanges(rank: int) -> list[int]:
    """Collectives of an edge without and with a reason."""
    context, counts = joined(2), []
    for reason in ("", "SIGTERM"):
        with torch.profiler.profile() as profile:
            agreed_stop(reason if rank else "", context)
        counts.append(sum(event.name.startswith("gloo:") for event in profile.events()))
    return counts


def test_an_edge_without_a_reason_is_one_exchange() -> None:
    for without, with_reason in run_ranks(exchanges, 2):
        assert without == 1
        assert with_reason > 1


def stopped_at(rank: int, number: int) -> list[str]:
    """What is agreed after each step, while rank 1 is signalled during the third."""
    context, told = joined(2), []
    previous = [signal.getsignal(known) for known in GRACEFUL]
    with StopSignals(rank) as signals:
        for step in range(1, 5):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), number)
                while not signals.received:
                    time.sleep(0.001)
            told.append(agreed_stop(signals.received, context))
    assert [signal.getsignal(known) for known in GRACEFUL] == previous
    assert signal.set_wakeup_fd(-1) == -1
    return told


@pytest.mark.parametrize("number", GRACEFUL)
def test_a_signal_to_any_rank_stops_all_after_the_same_step(
    number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    text = f"rank 1: {number.name}"
    assert run_ranks(stopped_at, 2, number=number) == [["", "", text, text]] * 2
    assert capfd.readouterr().err.count("saving after this step, then stopping") == 1


def stopped_by_file(rank: int, folder: Path) -> list[str]:
    """What is agreed after each step, while rank 1 makes the file during the third."""
    context, told = joined(2), []
    try:
        with StopSignals(rank, folder) as signals:
            for step in range(1, 5):
                if rank == 1 and step == 3:
                    (folder / "stop").touch()
                dist.barrier()
                told.append(agreed_stop(signals.received, context))
            raise Stopped("after step 4")
    except Stopped:
        return told


def test_a_file_stops_all_ranks_once_and_the_folder_says_so(tmp_path: Path) -> None:
    for stale in ("stop", "stopped"):
        (tmp_path / stale).write_text("of an earlier start")
        os.utime(tmp_path / stale, (PROGRAM_START - 1, PROGRAM_START - 1))
    text = f"rank 0: {tmp_path / 'stop'} is there"
    assert run_ranks(stopped_by_file, 2, folder=tmp_path) == [["", "", text, text]] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["stopped"]
    assert (tmp_path / "stopped").read_text() == "after step 4\n"


def told_while_starting(rank: int, folder: Path) -> list[str]:
    context = joined(2)
    try:
        with StopSignals(rank, folder) as signals:
            told = [agreed_stop(signals.received, context)]
            raise Stopped("before the first step")
    except Stopped:
        return told


@pytest.mark.parametrize("ago", [0.0, 3000.0])
def test_a_file_that_came_while_ranks_started_is_for_them(
    tmp_path: Path, ago: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the job is older than its ranks, which torchrun may have started anew."""
    (tmp_path / "stop").touch()
    if ago:
        at = PROGRAM_START - ago
        os.utime(tmp_path / "stop", (at, at))
        monkeypatch.setenv(STARTED, str(int(at)))
    text = f"rank 0: {tmp_path / 'stop'} is there"
    assert run_ranks(told_while_starting, 2, folder=tmp_path) == [[text]] * 2
    assert [file.name for file in tmp_path.iterdir()] == ["stopped"]


@pytest.mark.parametrize(
    ("restarts", "announced", "heeded"), [(0, False, False), (1, False, True), (1, True, False)]
)
def test_a_wish_to_stop_waits_for_ranks_that_are_started_again(
    tmp_path: Path, restarts: int, announced: bool, heeded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be for the run, though older than they; what is older than the run is not."""
    (tmp_path / "stop").touch()
    os.utime(tmp_path / "stop", (PROGRAM_START - 60, PROGRAM_START - 60))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(restarts))
    if announced:
        monkeypatch.setenv(STARTED, str(int(PROGRAM_START) - 30))
    told = run_ranks(told_while_starting, 2, folder=tmp_path)
    assert told == [[f"rank 0: {tmp_path / 'stop'} is there"] if heeded else [""]] * 2


def breaking(rank: int, folder: Path) -> None:
    try:
        with StopSignals(rank, folder):
            (folder / "stop").touch()
            raise KeyError
    except KeyError:
        # Who was lost is still to be said, whatever a launcher sends.
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_wish_to_stop_outlives_ranks_that_break(tmp_path: Path) -> None:
    run_ranks(breaking, 1, folder=tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["stop"]


def left_alone(rank: int, folder: Path) -> None:
    """A run that nobody stops, after one that was stopped."""
    with StopSignals(rank, folder):
        pass


def test_a_run_that_goes_on_is_not_stopped_any_more(tmp_path: Path) -> None:
    (tmp_path / "stopped").touch()
    run_ranks(left_alone, 1, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def state_of(pid: int) -> str:
    """As in ps; X if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "X"


def comes_to_wait(pid: int) -> bool:
    """True once the process has not been seen at work for a while, False if it ends."""
    idle = 0
    while idle < 20 and (state := state_of(pid)) not in "XZ":
        idle = idle + 1 if state == "S" else 0
        time.sleep(0.01)
    return idle == 20


def end_a_blocked_peer(rank: int) -> bool:
    """Rank 1 waits in a collective that rank 0 never enters; returns if it outlived one signal."""
    pids: list[int] = [0, 0]
    dist.all_gather_object(pids, os.getpid())
    with StopSignals(rank):
        dist.barrier()
        if rank == 1:
            dist.all_reduce(torch.zeros(1))
    comes_to_wait(pids[1])
    os.kill(pids[1], signal.SIGTERM)
    survived_first = comes_to_wait(pids[1])
    while state_of(pids[1]) not in "XZ":
        os.kill(pids[1], signal.SIGUSR1)
        time.sleep(0.1)
    dist.destroy_process_group()
    return survived_first


def test_a_second_signal_ends_a_rank_inside_a_collective() -> None:
    assert run_ranks(end_a_blocked_peer, 2, lost=[1]) == [True, None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """A forked process inside StopSignals."""

    pid: int
    leave: int
    """Closing this pipe lets it leave, unless it is blocked."""
    err: Path

    def wait_for(self, text: str) -> None:
        """The test's own time limit is the deadline."""
        while text not in self.err.read_text():
            time.sleep(0.01)

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def listener(folder: Path, *, blocked: bool) -> Listener:
    """One that is listening; `blocked` in C, as in a collective, where nothing returns for a signal
    and Python does not look at it."""
    err = folder / "err"
    err.touch()
    reader, writer = os.pipe()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        end_with_parent()
        os.close(writer)
        os.dup2(os.open(err, os.O_WRONLY | os.O_APPEND), 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        with StopSignals(3):
            sys.stderr.write("listens\n")
            mutex = ctypes.create_string_buffer(64)
            for _ in range(2 if blocked else 0):
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
            os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    process = Listener(pid=pid, leave=writer, err=err)
    process.wait_for("listens")
    return process


@pytest.mark.parametrize("blocked", [True, False])
def test_the_exit_code_of_a_second_signal(
    blocked: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, "SAME_REQUEST_S", 0.0)
    process = listener(tmp_path, blocked=blocked)
    os.kill(process.pid, signal.SIGUSR1)
    process.wait_for(
        "[rank 3] SIGUSR1: saving after this step, then stopping; a second signal stops at once\n"
    )
    os.kill(process.pid, signal.SIGTERM)
    assert process.code() == 128 + signal.SIGTERM
    os.close(process.leave)


def test_signals_of_one_moment_are_one_request(tmp_path: Path) -> None:
    """As from Slurm to all processes of a job, and passed on by the launcher."""
    process = listener(tmp_path, blocked=False)
    for number in GRACEFUL:
        os.kill(process.pid, number)
    process.wait_for("saving after this step")
    os.close(process.leave)
    assert process.code() == 0
    assert process.err.read_text().count("saving after this step") == 1
