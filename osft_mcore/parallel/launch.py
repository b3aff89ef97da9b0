"""Starts the ranks of a run on this machine, as `torchrun --standalone` would."""

# Not torchrun's own agent: a signal that arrives while it starts the ranks leaves them behind,
# and it ends the peers of a failed rank only after 30 seconds if they do not listen.

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from osft_mcore.parallel.world import OWN_RUN_ID

STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
POLL_S: Final = 0.05
GRACE_S: Final = 5.0
"""A rank that has not ended this long after SIGTERM is killed."""


def launch(arguments: Sequence[str], *, num_processes: int) -> int:
    """Run `python -m osft_mcore.cli *arguments` on `num_processes` ranks; returns the exit code.

    It is the code of the rank that failed, or 128 + signal where a signal ended that rank or this
    launcher. When it returns, no rank is left. Ranks report their own errors; only a rank that
    was killed could not, so that is said here. Keeps the signal handlers that it installs.
    """
    # Here and not on rank 0, which would take the store along when it ends first.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    received: list[int] = []
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _frame: received.append(number))
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        for rank in range(num_processes):
            ranks.append(_start(arguments, rank, num_processes, store.port))
        return _wait(ranks, received)
    finally:
        _end(ranks)


def _start(
    arguments: Sequence[str], rank: int, num_processes: int, port: int
) -> subprocess.Popen[bytes]:
    # One thread per rank and core: ranks that compete for cores wait for each other.
    threads = max(1, (os.cpu_count() or 1) // num_processes)
    environment = {
        "OMP_NUM_THREADS": str(threads),
        # vLLM's CPU build warns about the memory binding of every rank.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        # Python frees the shared memory of ranks that were ended, and would complain about it.
        "PYTHONWARNINGS": "ignore:resource_tracker:UserWarning",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_processes),
        "LOCAL_WORLD_SIZE": str(num_processes),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        # What tells torch.distributed that the store is the launcher's.
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": OWN_RUN_ID,
    }
    # Away from the terminal: Ctrl-C there is for the launcher to handle.
    command = [sys.executable, "-m", "osft_mcore.cli", *arguments]
    return subprocess.Popen(command, env=environment, start_new_session=True)


def _wait(ranks: Sequence[subprocess.Popen[bytes]], received: Sequence[int]) -> int:
    """Until all ranks ended well, one failed, or a signal arrived; returns the exit code."""
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = [(rank, code) for rank, code in enumerate(codes) if code]
        if failed:
            return _exit_code(failed)
        if received:
            sys.stderr.write(f"osft: stopped by {signal.Signals(received[0]).name}\n")
            return 128 + received[0]
        if all(code == 0 for code in codes):
            return 0
        time.sleep(POLL_S)


def _exit_code(failed: Sequence[tuple[int, int]]) -> int:
    """Of the cause, among ranks that ended together: peers that lose it end with code 1."""
    killed = [(rank, code) for rank, code in failed if code < 0]
    rank, code = killed[0] if killed else max(failed, key=lambda failure: failure[1])
    if code > 0:
        return code
    name = signal.Signals(-code).name
    hint = "; was there enough memory?" if name == "SIGKILL" else ""
    sys.stderr.write(f"osft: rank {rank} was ended by {name}{hint}\n")
    return 128 - code


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    deadline = time.monotonic() + GRACE_S
    for rank in _signalled(ranks, signal.SIGTERM):
        with suppress(subprocess.TimeoutExpired):
            rank.wait(max(0.0, deadline - time.monotonic()))
    for rank in _signalled(ranks, signal.SIGKILL):
        rank.wait()


def _signalled(
    ranks: Sequence[subprocess.Popen[bytes]], number: signal.Signals
) -> list[subprocess.Popen[bytes]]:
    """Send a signal to the ranks that still run, each with its children; returns those ranks."""
    running = [rank for rank in ranks if rank.poll() is None]
    for rank in running:
        os.killpg(rank.pid, number)
    return running
