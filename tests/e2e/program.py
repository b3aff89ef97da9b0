"""The program as its users start it: as a process, or forked from a test that has torch already."""

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

# Forked children find these loaded; importing them is nearly all that a failing start takes.
import osft_mcore.parallel.launch
import osft_mcore.train.preflight  # noqa: F401
from osft_mcore import cli

LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a finished program leaves on the terminal."""

    code: int
    out: str
    err: str


def as_rank(rank: int, world_size: int) -> dict[str, str]:
    """What torchrun sets for one rank."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        # Nothing listens there: these programs must end before they look for each other.
        "MASTER_PORT": "9",
    }


def forked(
    arguments: Sequence[str], cwd: Path, launcher: Mapping[str, str] | None = None
) -> Outcome:
    """`osft *arguments` in a forked child, with the variables of a launcher or none."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        sys.stderr.flush()
        pid = os.fork()
        if pid == 0:
            _child(arguments, cwd, launcher or {}, out.fileno(), err.fileno())
        code = _wait(pid)
        out.seek(0)
        err.seek(0)
        return Outcome(code=code, out=out.read().decode(), err=err.read().decode())


def _child(
    arguments: Sequence[str], cwd: Path, launcher: Mapping[str, str], out: int, err: int
) -> None:
    code: object = 99
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.chdir(cwd)
        for name in LAUNCHER:
            os.environ.pop(name, None)
        os.environ.update(launcher)
        code = cli.main(arguments)
    except SystemExit as ending:
        code = ending.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Skips interpreter shutdown: the parent's pytest must not run its teardown here.
        os._exit(code if isinstance(code, int) else 99)


def _wait(pid: int, timeout_s: float = 60.0) -> int:
    deadline = time.monotonic() + timeout_s
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.005)


def started(
    arguments: Sequence[str],
    cwd: Path,
    launcher: Mapping[str, str] | None = None,
    program: Sequence[str] = (),
) -> "subprocess.Popen[str]":
    """`osft *arguments` as a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    command = program or [str(Path(sys.executable).with_name("osft"))]
    return subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env=environment | (launcher or {}),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def outcome(process: "subprocess.Popen[str]", timeout_s: float = 120.0) -> Outcome:
    """Wait for its end."""
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        err += "\nstill running, killed by the test"
    return Outcome(code=process.returncode, out=out, err=err)


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """Standard output up to and including the first line with `text`, or to its end."""
    assert process.stdout is not None, "stdout was asked to be a pipe"
    seen = ""
    for line in process.stdout:
        seen += line
        if text in line:
            break
    return seen


def children(pid: int) -> list[int]:
    """Processes that `pid` started and that have not been waited for."""
    try:
        tasks = list(Path(f"/proc/{pid}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except FileNotFoundError:
        return []


@contextmanager
def no_process_left() -> Iterator[None]:
    """Fails if a process that was started inside lives on, whoever its parent was."""
    libc = ctypes.CDLL(None)
    before = set(children(os.getpid()))
    # Orphans of our descendants become our children, so none is lost from sight.
    assert libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) == 0
    try:
        yield
        left = _outliving(before)
    finally:
        libc.prctl(PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
    assert not left, left


def _outliving(before: set[int], grace_s: float = 10.0) -> dict[int, str]:
    deadline = time.monotonic() + grace_s
    while left := set(children(os.getpid())) - before:
        for pid in left:
            os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            names = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in left}
            for pid in left:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            return names
        time.sleep(0.02)
    return {}
