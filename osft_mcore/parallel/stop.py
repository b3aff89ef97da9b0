"""Being told to stop: by a signal, a file, the end of the job, or checkpoint.stop_after."""

import contextlib
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Final, Self

import torch
import torch.distributed as dist

from osft_mcore.config.duration import seconds
from osft_mcore.errors import Stopped
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.parallel.launch import GRACEFUL, SAME_REQUEST_S
from osft_mcore.parallel.world import job_end, knows_run_start, run_start

STOP_FILE: Final = "stop"
"""In the run folder: whoever makes it asks the run to stop. Where ranks have a launcher that keeps
signals from them, and for people."""
STOPPED: Final = "stopped"
"""In the run folder: the run was told to stop, and has; it says why. Gone once the run goes on. For
job scripts under launchers that have no exit code for it."""


class StopSignals:
    """Listens for SIGTERM and SIGUSR1 while entered. To be entered in the main thread.

    The first only sets `received`; a later one ends the process at once, with 128 + its number,
    even where the main thread waits in a collective. Rank 0 also looks for STOP_FILE in `folder`;
    one that is older than this run was meant for an earlier one and is removed. Left with Stopped,
    it leaves STOPPED there; left with another error, STOP_FILE stays, for ranks that are started
    again.
    """

    # Python's own handlers run between two bytecodes of the main thread, so not before a collective
    # has ended. The bytes that Python's C handler writes at once are read by a thread instead.

    def __init__(self, rank: int, folder: Path | None = None) -> None:
        self.promise = "saving after this step, then stopping"
        """What the first signal is answered with."""
        self._signal = ""
        self._rank = rank
        self._folder = folder if rank == 0 else None

    @property
    def received(self) -> str:
        """Name of the first signal, or the file; empty if there was none. Looks for the file."""
        if not self._signal and self._folder is not None:
            file = self._folder / STOP_FILE
            return f"{file} is there" if file.exists() else ""
        return self._signal

    def __enter__(self) -> Self:
        self._forget(STOPPED)
        self._forget_older_request()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._previous_wakeup = signal.set_wakeup_fd(self._writer)
        self._previous = {number: signal.signal(number, _left_to_the_thread) for number in GRACEFUL}
        self._thread = threading.Thread(target=self._listen, name="stop-signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            # None: a handler that was not installed from Python, which cannot be put back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if isinstance(error, Exception) and not isinstance(error, Stopped):
            # torchrun sends it as soon as a rank is dead; the others still have to say which.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._writer)
        os.close(self._reader)
        if error is None or isinstance(error, Stopped):
            self._forget(STOP_FILE)
        if self._folder is not None and isinstance(error, Stopped):
            (self._folder / STOPPED).write_text(f"{error}\n", encoding="utf-8")

    def _forget(self, name: str) -> None:
        if self._folder is not None:
            (self._folder / name).unlink(missing_ok=True)

    def _forget_older_request(self) -> None:
        # Ranks that are started again may have been asked while the first ones ran.
        if self._folder is not None and knows_run_start():
            with contextlib.suppress(FileNotFoundError):
                if (self._folder / STOP_FILE).stat().st_mtime < run_start():
                    self._forget(STOP_FILE)

    def _listen(self) -> None:
        first = 0.0
        while number := os.read(self._reader, 1)[0]:
            if number not in GRACEFUL:
                continue
            if not self._signal:
                first = time.monotonic()
                self._signal = signal.Signals(number).name
                sys.stderr.write(
                    f"[rank {self._rank}] {self._signal}: {self.promise}; a second signal stops "
                    "at once\n"
                )
            elif time.monotonic() - first > SAME_REQUEST_S:
                os._exit(128 + number)


def _left_to_the_thread(_number: int, _frame: FrameType | None) -> None:
    """Without a handler Python would write no byte."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Deadline:
    """When the run must have stopped; None: no limit. Both in seconds since the epoch."""

    job_end: float | None
    """SLURM_JOB_END_TIME."""
    run_end: float | None
    """Start of the run + checkpoint.stop_after."""

    def near(self, now: float, *, longest_step_s: float, longest_save_s: float) -> str:
        """Why to stop now: what is left is less than twice a step and a save. Empty: go on."""
        needed = 2 * (longest_step_s + longest_save_s)
        ends = {"SLURM_JOB_END_TIME": self.job_end, "checkpoint.stop_after": self.run_end}
        for name, end in ends.items():
            if end is not None and end - now < needed:
                left = end - now
                return f"{name} in {left:.0f} s" if left >= 0 else f"{name} {-left:.0f} s ago"
        return ""


def deadline(stop_after: str | None, *, started: float | None = None) -> Deadline:
    """The limits of this process: of its Slurm job, and of an option that `check` has passed.

    `started`: when the run was, by a person or a job; None: as the environment says.
    """
    if started is None:
        # Not when this process was: ranks that are started again would get the whole time again.
        started = run_start()
    run_end = None if stop_after is None else started + seconds(stop_after)
    return Deadline(job_end=job_end(), run_end=run_end)


def agreed_stop(reason: str, context: ParallelContext) -> str:
    """The reason of the first rank that has one, with that rank; empty if none has.

    The same on all ranks. Collective over the world; one number is exchanged if nobody has one.
    """
    asked = torch.tensor([int(bool(reason))], device=context.device)
    dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=context.world_group)
    if not int(asked):
        return ""
    reasons: list[Any] = all_gather_json(reason, context)
    return next(f"rank {rank}: {text}" for rank, text in enumerate(reasons) if text)
