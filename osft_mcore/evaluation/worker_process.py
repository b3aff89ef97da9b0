"""One grading worker seen from its parent: start it, ask it, listen without blocking, end it."""

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from osft_mcore.evaluation.judges import Reply
from osft_mcore.evaluation.lines import write_by
from osft_mcore.evaluation.scorers import Question

START_TIMEOUT_S = 120.0
"""Importing the algebra system from a cold network file system takes this long at worst."""

ENVIRONMENT = (
    "PATH",
    "HOME",
    "LANG",
    "LC_ALL",
    "TMPDIR",
    "VIRTUAL_ENV",
    "PYTHONHOME",
    "LD_LIBRARY_PATH",
)
"""What a worker may know: no credentials, nothing of the launcher."""

GRACE = 1.4
"""A worker ends its judging child at the deadline. This many deadlines later it hangs itself."""


class WorkerProcess:
    """A child process running grading_worker.py. Started by exec, so safe beside CUDA and gloo."""

    def __init__(self, scorer: str, *, timeout_s: float, memory_bytes: int) -> None:
        self._timeout_s = timeout_s
        # -P: a math_verify.py in the working directory must not be imported.
        command = [sys.executable, "-P", "-m", "osft_mcore.evaluation.grading_worker"]
        limits = [f"--timeout-s={timeout_s}", f"--memory-bytes={memory_bytes}"]
        with stop_signals_blocked():
            self._process = subprocess.Popen(
                [*command, f"--scorer={scorer}", *limits],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=_environment(),
                # Ctrl-C in the terminal is for the parent to handle.
                start_new_session=True,
            )
        assert self._process.stdin is not None, "stdin was asked to be a pipe"
        assert self._process.stdout is not None, "stdout was asked to be a pipe"
        self._stdin, self._stdout = self._process.stdin, self._process.stdout
        os.set_blocking(self._stdin.fileno(), False)
        os.set_blocking(self._stdout.fileno(), False)
        self._received = b""
        self.pid = self._process.pid
        self.ready = self.has_loaded = False
        self.question: Question | None = None
        self.deadline = time.monotonic() + START_TIMEOUT_S

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to `listen` to."""
        return self._stdout.fileno()

    def ask(self, question: Question) -> None:
        """Hand over one question and start its clock. A dead worker shows in `listen`."""
        self.question = question
        self.deadline = time.monotonic() + GRACE * self._timeout_s
        line = json.dumps(dataclasses.asdict(question)) + "\n"
        # A long response fills the pipe, but an idle worker empties it at once.
        write_by(self.deadline, self._stdin.fileno(), line.encode("ascii"))

    def expect_more(self, *, ready: bool) -> None:
        """Its question is answered. If not ready it will be: no answer's time pays for that."""
        self.question, self.ready = None, ready
        self.deadline = time.monotonic() + START_TIMEOUT_S

    @property
    def pending(self) -> bool:
        """True while the worker owes a line before its deadline."""
        return not self.ready or self.question is not None

    def listen(self) -> Reply | None:
        """What has become of the worker since last time; None if there is nothing new.

        `gone` and `stuck` are this end's words: the worker has to be replaced.
        """
        while chunk := self._stdout.read(65536):
            self._received += chunk
        line, newline, rest = self._received.partition(b"\n")
        if newline:
            self._received = rest
            reply: Reply = json.loads(line)
            return reply
        if chunk == b"":
            return {"kind": "gone"}
        late = self.pending and time.monotonic() >= self.deadline
        return {"kind": "stuck"} if late else None

    def kill(self) -> None:
        """End the process and all that it started, and wait until it is gone."""
        children = _children(self.pid)
        self._process.kill()
        self._process.wait()
        for group in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)
        self.abandon()

    def abandon(self) -> None:
        """Close the pipes: a forked copy of its parent must neither use nor end it."""
        self._stdin.close()
        self._stdout.close()


def _children(pid: int) -> list[int]:
    """Process ids, each also its group's; empty if the process has ended."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []


@contextlib.contextmanager
def stop_signals_blocked() -> Iterator[None]:
    """A child started inside never sees SIGTERM and SIGUSR1, which Slurm may send to all processes
    of a job: its parent needs it until the end of the step. It ends with its standard input.
    """
    # Children inherit what is blocked, from their first instruction on. What arrives here meanwhile
    # is delivered afterwards.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTERM, signal.SIGUSR1))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    package_root = str(Path(__file__).resolve().parents[2])
    python_path = os.pathsep.join(filter(None, (package_root, os.environ.get("PYTHONPATH"))))
    # Set iteration order inside the algebra system must not change a grade between runs.
    return kept | {"PYTHONPATH": python_path, "PYTHONHASHSEED": "0"}
