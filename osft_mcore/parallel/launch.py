"""Starts the ranks of a run on this machine, as `torchrun --standalone` would."""

# Not torchrun's own agent: a signal that arrives while it starts the ranks leaves them behind,
# and it ends the peers of a failed rank only after 30 seconds if they do not listen.

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Final

from osft_mcore.errors import DeadlinePassed, NothingLeft, Stopped
from osft_mcore.parallel.loopback import LOOPBACK, ON_LOOPBACK, loopback_store
from osft_mcore.parallel.world import OWN_RUN_ID, PARENT, STARTED, run_start, usable_cores

GRACEFUL: Final = (signal.SIGTERM, signal.SIGUSR1)
"""Ask a run to save and stop."""
AT_ONCE: Final = (signal.SIGINT, signal.SIGHUP)
SAME_REQUEST_S: Final = 1.0
"""Signals within this time are one request: Slurm, systemd and torchrun may signal every process of
a job, while the launcher passes on what it got."""
SAVED: Final = (Stopped.exit_code, NothingLeft.exit_code)
"""Exit codes of ranks that tell a job script how to go on, and are no failure."""
POLL_S: Final = 0.05
PEERS_S: Final = 120.0
"""A rank that has not ended this long after its peers said that they have saved is killed."""
REST_S: Final = 300.0
"""So long the others have once a rank has ended well: rank 0 may still make its last report, and
wait for a tracker, a minute each. No rank watches over another one any more."""
RANK_PROGRAM: Final = (sys.executable, "-m", "osft_mcore.cli")


class _Received:
    """What signals have asked of this launcher."""

    def __init__(self) -> None:
        self.stop = self.stop_at_once = 0
        """The signal that asked for it; 0 if none did."""
        self._stop_since = 0.0

    def listen(self) -> None:
        for number in (*GRACEFUL, *AT_ONCE):
            # What the shell that started this ignores (nohup) stays ignored.
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, self._handle)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if number in GRACEFUL and not self.stop:
            self.stop, self._stop_since = number, now
        elif number in AT_ONCE or now - self._stop_since > SAME_REQUEST_S:
            self.stop_at_once = self.stop_at_once or number


def launch(
    arguments: Sequence[str],
    *,
    num_processes: int,
    program: Sequence[str] = RANK_PROGRAM,
    peers_s: float = PEERS_S,
    rest_s: float = REST_S,
) -> int:
    """Run `*program *arguments` on `num_processes` ranks; returns the exit code.

    It is the code of the rank that failed, or 128 + signal where a signal ended that rank or this
    launcher; 85 or 86 if the ranks ended so; 10 if one hangs that others have left behind. The
    first SIGTERM or SIGUSR1 is passed on to the ranks; a second one, SIGINT or SIGHUP end all of
    them at once. When it returns, no rank is left.
    Ranks report their own errors; only a rank that was killed could not, so that is said here.
    Keeps the signal handlers that it installs.
    """
    # Here and not on rank 0, which would take the store along when it ends first.
    store = loopback_store()
    received = _Received()
    received.listen()
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_processes):
            command = [*program, *arguments]
            ranks.append(_start(command, rank, num_processes, store.port))
        return _wait(ranks, received, peers_s, rest_s)
    finally:
        _end(ranks)


def _start(
    command: Sequence[str], rank: int, num_processes: int, port: int
) -> subprocess.Popen[bytes]:
    # One thread per rank and core: ranks that compete for cores wait for each other. A job often
    # has a part of the machine's cores.
    threads = max(1, len(usable_cores()) // num_processes)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # torch on CPU maps large tensors anew each time: in huge pages that costs a tenth as much.
        "THP_MEM_ALLOC_ENABLE": "1",
        # vLLM's CPU build warns about the memory binding of every rank.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Python frees the shared memory of ranks that were ended, and would complain about it.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        **ON_LOOPBACK,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": LOOPBACK,
        "MASTER_PORT": str(port),
        # What tells torch.distributed that the store is the launcher's.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": OWN_RUN_ID,
        STARTED: str(run_start()),
        PARENT: str(os.getpid()),
    }
    # Away from the terminal: Ctrl-C there is for the launcher to handle.
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(
    ranks: Sequence[subprocess.Popen[bytes]], received: _Received, peers_s: float, rest_s: float
) -> int:
    """Until all ranks ended well, one failed or hangs, or a signal arrived; gives the exit code."""
    passed_on, waited_s, first_ended = 0, 0.0, 0.0
    while True:
        codes = [rank.poll() for rank in ranks]
        if not {0, *SAVED}.isdisjoint(codes):
            first_ended = first_ended or time.monotonic()
            waited_s = time.monotonic() - first_ended
        code = _code_of(codes, passed_on, waited_s, peers_s=peers_s, rest_s=rest_s)
        if code is not None:
            return code
        if received.stop_at_once:
            return _stopped_by(received.stop_at_once)
        if received.stop and not passed_on:
            passed_on = received.stop
            for rank in ranks:
                # Not to their groups: what a rank started is needed until that rank ends.
                rank.send_signal(passed_on)
        time.sleep(POLL_S)


def _code_of(
    codes: Sequence[int | None], passed_on: int, waited_s: float, *, peers_s: float, rest_s: float
) -> int | None:
    """What ranks came to that ended with `codes`, the first well and `waited_s` ago; None: wait."""
    running = [rank for rank, code in enumerate(codes) if code is None]
    # Ranks say so only once the checkpoint is whole: what breaks afterwards takes nothing back.
    saved = min((code for code in codes if code in SAVED), default=0)
    if saved:
        return saved if not running or waited_s > peers_s else None
    if failed := [(rank, code) for rank, code in enumerate(codes) if code]:
        return _exit_code(failed, passed_on)
    if running and waited_s <= rest_s:
        return None
    for rank in running:
        sys.stderr.write(
            f"osft: rank {rank} has not ended {rest_s:g} s after others had ended well; it is "
            "killed\n"
        )
    return DeadlinePassed.exit_code if running else 0


def _exit_code(failed: Sequence[tuple[int, int]], passed_on: int) -> int:
    """Of the cause, among ranks that ended together: peers that lose it end with code 1."""
    killed = [(rank, code) for rank, code in failed if code < 0]
    rank, code = killed[0] if killed else max(failed, key=lambda failure: failure[1])
    if code > 0:
        return code
    if -code == passed_on:
        return _stopped_by(passed_on)
    name = signal.Signals(-code).name
    hint = "; was there enough memory?" if name == "SIGKILL" else ""
    sys.stderr.write(f"osft: rank {rank} was ended by {name}{hint}\n")
    return 128 - code


def _stopped_by(number: int) -> int:
    sys.stderr.write(f"osft: stopped by {signal.Signals(number).name}\n")
    return 128 + number


def end_group(child: "subprocess.Popen[str]") -> None:
    """Kill a process that leads a session of its own, and whatever it started there."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    """Kill the ranks that still run, and ask what they started to end."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        # SIGTERM would make a rank that is in its loop begin to save. For the others in its group
        # it is right: Python's resource tracker ignores it and frees the rank's shared memory.
        rank.kill()
        with contextlib.suppress(ProcessLookupError):
            # It may have ended by itself in this moment.
            os.killpg(rank.pid, signal.SIGTERM)
    for rank in running:
        rank.wait()
