"""One grading worker seen from its parent: start it, ask it, listen without blocking, end it."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

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

Event = Literal["ready", "correct", "wrong", "unreadable_gold", "died", "late"]


@dataclass(frozen=True, slots=True)
class Question:
    """An answer that only algebra can hold against its gold answer."""

    answer: str
    gold: str


class WorkerProcess:
    """A child process running grading_worker.py. Started by exec, so safe beside CUDA and gloo."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # -P: a math_verify.py in the working directory must not be imported.
        module = "osft_mcore.evaluation.grading_worker"
        with _stop_signals_blocked():
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, str(timeout_s)],
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
        os.set_blocking(self._stdout.fileno(), False)
        self._received = b""
        self.pid = self._process.pid
        self.ready = False
        self.question: Question | None = None
        self.num_asked = 0
        self.deadline = time.monotonic() + START_TIMEOUT_S

    def fileno(self) -> int:
        """The descriptor that becomes readable when there is something to `listen` to."""
        return self._stdout.fileno()

    def ask(self, question: Question) -> None:
        """Hand over one question and start its clock. A dead worker shows in `listen`."""
        self.question = question
        self.num_asked += 1
        self.deadline = time.monotonic() + self._timeout_s
        line = json.dumps({"gold": question.gold, "answer": question.answer}) + "\n"
        with contextlib.suppress(BrokenPipeError):
            # Never blocks or falls short: two capped answers are smaller than an empty pipe.
            self._stdin.write(line.encode("ascii"))

    @property
    def pending(self) -> bool:
        """True while the worker owes a line before its deadline."""
        return not self.ready or self.question is not None

    def listen(self) -> Event | None:
        """What has become of the worker since last time; None if there is nothing new."""
        while chunk := self._stdout.read(65536):
            self._received += chunk
        line, newline, rest = self._received.partition(b"\n")
        if newline:
            self._received = rest
            event: Event = json.loads(line)["verdict"]
            return event
        if chunk == b"":
            return "died"
        return "late" if self.pending and time.monotonic() >= self.deadline else None

    def kill(self) -> None:
        """End the process, whatever it is doing, and wait until it is gone."""
        self._process.kill()
        self._process.wait()
        self._stdin.close()
        self._stdout.close()


@contextlib.contextmanager
def _stop_signals_blocked() -> Iterator[None]:
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
