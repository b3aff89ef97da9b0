"""Other ranks on this machine, as processes that may be signalled."""

import contextlib
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, kw_only=True)
class Process:
    """One process, and never another one that gets its number later."""

    machine: str
    """Where `pid` counts: a start of a kernel, and a container there. Empty: not known."""
    pid: int
    started: int
    """Ticks of that kernel's clock."""


def this_process() -> Process:
    """The caller; not known where there is no /proc."""
    pid = os.getpid()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return Process(
            machine=f"{boot} {os.readlink('/proc/self/ns/pid')}", pid=pid, started=_started(pid)
        )
    except OSError:
        return Process(machine="", pid=pid, started=0)


def signal_process(process: Process, number: signal.Signals) -> bool:
    """False if it is not on this machine, has ended, or may not be signalled from here."""
    if not process.machine or process.machine != this_process().machine:
        return False
    try:
        with _held(process.pid) as handle:
            if _started(process.pid) != process.started:
                return False
            if handle is None:
                os.kill(process.pid, number)
            else:
                signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _held(pid: int) -> Iterator[int | None]:
    """A handle that stays with its process: what is looked at meanwhile is what gets the signal.

    None where the kernel is older than that (Linux 5.3), or a container forbids it. Raises
    ProcessLookupError if there is no such process.
    """
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        raise
    except OSError:
        yield None
        return
    try:
        yield handle
    finally:
        os.close(handle)


def _started(pid: int) -> int:
    # The name before it may have blanks and brackets of its own.
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
