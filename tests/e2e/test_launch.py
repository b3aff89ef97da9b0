"""The launcher, signalled and left by ranks; small programs in place of ranks."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from program import no_process_left

from osft_mcore.errors import DeadlinePassed, NothingLeft, Stopped
from osft_mcore.parallel.launch import _end, launch
from osft_mcore.parallel.world import end_with_parent

RANK = """
import os, signal, subprocess, sys, time

rank, parent = int(os.environ["RANK"]), os.getppid()

def say(text):
    os.write(1, f"rank {rank} {text}\\n".encode())
"""
LISTENING = """
def handle(number, frame):
    say(f"got {signal.Signals(number).name}")

for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, handle)
"""
FOR_EVER = """
while os.getppid() == parent:
    time.sleep(0.01)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Launched:
    """A launcher in a process of its own, with what it and its ranks write."""

    pid: int
    out: Path
    err: Path

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def wait_for(self, *lines: str) -> None:
        """The test's own time limit is the deadline."""
        while not set(lines) <= set(self.lines()):
            time.sleep(0.01)

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    def code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def ended(self) -> int | None:
        """Its exit code, if it has ended."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        return os.waitstatus_to_exitcode(status) if pid else None


def launched(folder: Path, *parts: str, **options: Any) -> Launched:
    """A forked launcher of two ranks that run the program made of `parts`."""
    files = Launched(pid=0, out=folder / "out", err=folder / "err")
    program = [sys.executable, "-c", RANK + "".join(parts)]
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            end_with_parent()
            for descriptor, file in ((1, files.out), (2, files.err)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
            sys.stderr = os.fdopen(2, "w")
            # The tests may run under nohup, or in the background of a shell.
            for number in (signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_DFL)
            code = launch([], num_processes=2, program=program, **options)
        finally:
            sys.stderr.flush()
            # Skips interpreter shutdown: the parent's pytest must not run its teardown here.
            os._exit(code)
    files.out.touch()
    return Launched(pid=pid, out=files.out, err=files.err)


SAVING = f"""
child = subprocess.Popen(["sleep", "60"])
asked = []
def handle(number, frame):
    say(f"got {{signal.Signals(number).name}}")
    asked.append(number)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, handle)
say("listens")
while not asked and os.getppid() == parent:
    time.sleep(0.01)
time.sleep(0.3 * (1 + rank))
say("saved" if child.poll() is None else "lost its child")
child.kill()
sys.exit({Stopped.exit_code})
"""


PLACE = """
import os, sys
from osft_mcore.parallel.launch import launch
from osft_mcore.parallel.world import PROGRAM_START

say = "import os; print(os.environ['OMP_NUM_THREADS'], os.environ['OSFT_STARTED'])"
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:1])
print(PROGRAM_START, flush=True)
sys.exit(launch([], num_processes=1, program=[sys.executable, "-c", say]))
"""


def test_ranks_share_the_cores_that_are_theirs_and_know_when_the_run_began() -> None:
    """As in a job that has a part of the machine: here one core, of two or more."""
    environ = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-c", PLACE]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    began, place = done.stdout.splitlines()
    assert place == f"1 {began}"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_the_first_signal_is_for_the_ranks_to_save_and_stop(
    tmp_path: Path, number: signal.Signals
) -> None:
    with no_process_left():
        run = launched(tmp_path, SAVING)
        run.wait_for("rank 0 listens", "rank 1 listens")
        run.signal(number)
        assert run.code() == Stopped.exit_code
    texts = ("listens", f"got {number.name}", "saved")
    assert sorted(run.lines()) == sorted(f"rank {rank} {text}" for rank in (0, 1) for text in texts)
    assert run.err.read_text() == ""


def test_a_signal_that_arrives_by_two_ways_is_one(tmp_path: Path) -> None:
    """As from a wrapper in a job script, beside Slurm's own."""
    with no_process_left():
        run = launched(tmp_path, SAVING)
        run.wait_for("rank 0 listens", "rank 1 listens")
        run.signal(signal.SIGTERM)
        run.signal(signal.SIGUSR1)
        assert run.code() == Stopped.exit_code
    assert len(run.lines()) == 6
    assert run.err.read_text() == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_second_signal_ends_all_at_once(tmp_path: Path, number: signal.Signals) -> None:
    with no_process_left():
        child = 'subprocess.Popen(["sleep", "60"])\nsay("listens")'
        run = launched(tmp_path, LISTENING, child, FOR_EVER)
        run.wait_for("rank 0 listens", "rank 1 listens")
        run.signal(signal.SIGTERM)
        run.wait_for("rank 0 got SIGTERM", "rank 1 got SIGTERM")
        while (code := run.ended()) is None:
            run.signal(number)
            time.sleep(0.2)
    assert code == 128 + number
    assert run.err.read_text() == f"osft: stopped by {number.name}\n"
    assert len(run.lines()) == 4, "no rank was asked twice"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_ctrl_c_does_not_wait_for_a_save(tmp_path: Path, number: signal.Signals) -> None:
    with no_process_left():
        run = launched(tmp_path, LISTENING, 'say("listens")', FOR_EVER)
        run.wait_for("rank 0 listens", "rank 1 listens")
        run.signal(signal.SIGTERM)
        run.signal(number)
        assert run.code() == 128 + number
    assert run.err.read_text() == f"osft: stopped by {number.name}\n"


def test_ranks_that_do_not_listen_yet_end_by_the_signal(tmp_path: Path) -> None:
    with no_process_left():
        run = launched(tmp_path, 'say("starts")', FOR_EVER)
        run.wait_for("rank 0 starts", "rank 1 starts")
        run.signal(signal.SIGUSR1)
        assert run.code() == 128 + signal.SIGUSR1
    assert run.err.read_text() == "osft: stopped by SIGUSR1\n"


LEAVING = """
def state(pid):
    try:
        return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "X"

if rank:
    open({file!r} + ".new", "w").write(str(os.getpid()))
    os.rename({file!r} + ".new", {file!r})
    os._exit({code})
while not os.path.exists({file!r}):
    time.sleep(0.01)
peer = int(open({file!r}).read())
while state(peer) not in "XZ":
    time.sleep(0.01)
time.sleep(0.2)
say("finished")
{end}
"""


@pytest.mark.parametrize("code", [Stopped.exit_code, NothingLeft.exit_code])
@pytest.mark.parametrize("end", ["os._exit(0)", "os._exit({code})", "os.kill(os.getpid(), 9)"])
def test_a_rank_that_has_saved_is_no_failure_and_the_others_may_finish(
    tmp_path: Path, code: int, end: str
) -> None:
    file = str(tmp_path / "pid")
    leaving = LEAVING.format(file=file, code=code, end=end.format(code=code))
    with no_process_left():
        run = launched(tmp_path, leaving)
        assert run.code() == code
    assert run.lines() == ["rank 0 finished"]
    assert run.err.read_text() == ""


def test_a_rank_that_hangs_after_the_save_is_killed(tmp_path: Path) -> None:
    with no_process_left():
        run = launched(
            tmp_path, LISTENING, f"rank and os._exit({Stopped.exit_code})", FOR_EVER, peers_s=0.2
        )
        assert run.code() == Stopped.exit_code
    assert run.err.read_text() == ""


@pytest.mark.parametrize("hangs", ["time.sleep(600)", "os.kill(os.getpid(), signal.SIGSTOP)"])
def test_a_rank_that_hangs_when_the_others_are_done_is_named_and_killed(
    tmp_path: Path, hangs: str
) -> None:
    """At its exit, where nothing watches it."""
    with no_process_left():
        run = launched(tmp_path, f"rank or os._exit(0)\n{hangs}", rest_s=0.2)
        assert run.code() == DeadlinePassed.exit_code
    assert run.err.read_text() == (
        "osft: rank 1 has not ended 0.2 s after others had ended well; it is killed\n"
    )


def test_rank_0_has_time_for_its_last_report(tmp_path: Path) -> None:
    with no_process_left():
        run = launched(tmp_path, 'rank and os._exit(0)\ntime.sleep(0.5)\nsay("reported")')
        assert run.code() == 0
    assert (run.lines(), run.err.read_text()) == (["rank 0 reported"], "")


class EndsUnseen(subprocess.Popen[bytes]):
    """It has ended since the launcher looked."""

    looked = False

    def poll(self) -> int | None:
        if self.looked:
            return super().poll()
        self.looked = True
        return None


def test_a_rank_that_ends_by_itself_in_that_moment_keeps_no_other_alive() -> None:
    gone = EndsUnseen(["true"], start_new_session=True)
    while Path(f"/proc/{gone.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        _end([gone, other])
        assert (gone.returncode, other.returncode) == (0, -signal.SIGKILL)
    finally:
        other.kill()


def test_a_failed_rank_does_not_make_the_others_save(tmp_path: Path) -> None:
    ready = f"{tmp_path}/ready"
    waits = (
        f"while rank and not os.path.exists({ready!r}): time.sleep(0.01)\nrank and os._exit(3)\n"
    )
    with no_process_left():
        run = launched(tmp_path, LISTENING, f"rank or open({ready!r}, 'w')\n", waits, FOR_EVER)
        assert run.code() == 3
    assert (run.lines(), run.err.read_text()) == ([], "")


NETWORK = 'say(" ".join(os.environ[f"{name}_SOCKET_IFNAME"] for name in ("GLOO", "NCCL")))'


def test_ranks_stay_on_this_machine_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, (given, expected) in {"a": ({}, "lo lo"), "b": ({"GLOO": "eth7"}, "eth7 lo")}.items():
        for library in ("GLOO", "NCCL"):
            monkeypatch.delenv(f"{library}_SOCKET_IFNAME", raising=False)
        for library, interface in given.items():
            monkeypatch.setenv(f"{library}_SOCKET_IFNAME", interface)
        folder = tmp_path / name
        folder.mkdir()
        with no_process_left():
            run = launched(folder, NETWORK)
            assert run.code() == 0
        assert sorted(run.lines()) == [f"rank 0 {expected}", f"rank 1 {expected}"]
