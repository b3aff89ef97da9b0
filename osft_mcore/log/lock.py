"""run.lock: one job at a time writes a run folder."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final, Literal

from osft_mcore.errors import ConfigError

# The kernel's lock on the file ends with its process, however that ends; children do not inherit
# it (POSIX kind). What the file says counts where that lock does not reach: between machines, over
# some network file systems. Closing any descriptor of the file drops the lock, so the process that
# holds it never opens the file again.

FILE: Final = "run.lock"
WRITE_S: Final = 2.0
"""Who makes the file writes it at once: if it says nothing for so long, its writer is gone."""
POLL_S: Final = 0.02
_NO_LOCKS: Final = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""From file systems without locks, as Lustre mounted without `flock`."""
_FLOCK: Final = "hhqqi0q"
"""C's struct flock on 64-bit Linux: type, whence, start, length, process."""

Kernel = Literal["free", "held", "unknown"]
"""What the kernel says of other processes and the lock; nothing, if the file system has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """Who holds a lock: the content of run.lock."""

    host: str
    pid: int
    job_id: str | None
    """Slurm's."""
    started: str
    """ISO time."""
    attempt: str = ""
    """How often Slurm had started the job again; empty if it had not."""

    def __str__(self) -> str:
        job = f"Slurm job {self.job_id}, " if self.job_id else ""
        return f"process {self.pid} on {self.host} ({job}started {self.started})"


@contextlib.contextmanager
def run_lock(folder: Path, *, job_id: str | None, attempt: str = "") -> Iterator[str]:
    """Hold the lock of an existing run folder. Gives a line to print, if it was another's before.

    For one rank. Raises ConfigError if another job holds the lock, or may hold it.
    """
    file, me = folder / FILE, _this_process(job_id, attempt)
    descriptor, before = _acquire(file, me)
    try:
        content = json.dumps(asdict(me)).encode()
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
        os.fsync(descriptor)
        yield "" if before is None else _taken_over(before, me)
    finally:
        # Removed before it is unlocked: who waits for the lock then sees that the file is gone.
        if _is_at(descriptor, file):
            file.unlink()
        os.close(descriptor)


def lock_refusal(folder: Path, *, job_id: str | None, attempt: str = "") -> str:
    """Why `run_lock` would fail now; empty if it would not. Takes no lock.

    The process that holds the lock must not call: it would lose it.
    """
    try:
        descriptor = os.open(folder / FILE, os.O_RDONLY)
    except (FileNotFoundError, NotADirectoryError):
        return ""
    try:
        kernel, found = _look(descriptor), _read(descriptor)
    finally:
        os.close(descriptor)
    return _refusal(folder / FILE, found, _this_process(job_id, attempt), kernel)


def _acquire(file: Path, me: Holder) -> tuple[int, Holder | None]:
    """The open and locked file, and whom it named before; None if it is new."""
    deadline = time.monotonic() + WRITE_S
    while True:
        descriptor, is_new = _open(file)
        # Who made the file has not written it yet: must not find it locked.
        says_nothing = not is_new and _read(descriptor) is None
        kernel = "unknown" if says_nothing else _lock(descriptor)
        waits = says_nothing and time.monotonic() < deadline
        if not waits and _is_at(descriptor, file):
            break
        os.close(descriptor)
        time.sleep(POLL_S)
    found = _read(descriptor)
    if is_new and kernel != "held":
        return descriptor, None
    if refusal := _refusal(file, found, me, kernel):
        os.close(descriptor)
        raise ConfigError(refusal)
    return descriptor, found


def _refusal(file: Path, found: Holder | None, me: Holder, kernel: Kernel) -> str:
    """Why a file that exists may not be taken over; empty if it may."""
    other = "or choose another output_dir"
    if kernel == "held":
        holder = "another process" if found is None else found
        return f"output_dir: {file.parent} is in use by {holder}; wait for it, stop it, {other}"
    if found is None:
        return f"output_dir: {file} does not say which job holds it; if none does, delete it"
    here = found.host == me.host
    if _is_earlier_attempt(found, me) or (here and (kernel == "free" or _ended(found, me))):
        return ""
    return (
        f"output_dir: {file.parent} is locked by {found}, and {me.host} cannot see whether that "
        f"still runs; if it has ended delete {file}, {other}"
    )


def _taken_over(before: Holder, me: Holder) -> str:
    if before.host == me.host:
        return f"took over the lock of {before}, which ended without removing it"
    return f"took over the lock of {before}: the same job, started again"


def _is_earlier_attempt(found: Holder, me: Holder) -> bool:
    """Of one job, which Slurm ended before it started it again. Within an attempt there may be
    several runs, as from two steps of a job."""
    is_same_job = me.job_id is not None and found.job_id == me.job_id
    return is_same_job and found.attempt != me.attempt


def _ended(found: Holder, me: Holder) -> bool:
    """Whether a process of this job on this host is gone, as a rank is that torchrun started anew.

    Of other jobs, and without a job, this cannot be known: they may be in a container of their own.
    """
    if me.job_id is None or found.job_id != me.job_id:
        return False
    return found.pid == me.pid or not Path(f"/proc/{found.pid}").exists()


def _this_process(job_id: str | None, attempt: str) -> Holder:
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    return Holder(
        host=socket.gethostname(), pid=os.getpid(), job_id=job_id, started=now, attempt=attempt
    )


def _open(file: Path) -> tuple[int, bool]:
    """A descriptor, and whether the file was made for it: only one of all machines can do that."""
    while True:
        with contextlib.suppress(FileExistsError):
            return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True
        with contextlib.suppress(FileNotFoundError):
            return os.open(file, os.O_RDWR), False


def _read(descriptor: int) -> Holder | None:
    try:
        return Holder(**json.loads(os.pread(descriptor, 4096, 0)))
    except (ValueError, TypeError):
        return None


def _lock(descriptor: int) -> Kernel:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _kernel_of(error)
    return "free"


def _look(descriptor: int) -> Kernel:
    """As `_lock`, without locking."""
    wanted = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    try:
        found = fcntl.fcntl(descriptor, fcntl.F_GETLK, wanted)
    except OSError as error:
        return _kernel_of(error)
    return "free" if struct.unpack(_FLOCK, found)[0] == fcntl.F_UNLCK else "held"


def _kernel_of(error: OSError) -> Kernel:
    if error.errno in (errno.EACCES, errno.EAGAIN):
        return "held"
    if error.errno in _NO_LOCKS:
        return "unknown"
    raise error


def _is_at(descriptor: int, file: Path) -> bool:
    """False if the file was removed, or replaced by another, since it was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(file))
    except FileNotFoundError:
        return False
