"""One job at a time beside the training loop, and what became of it."""

import threading
import time
from collections.abc import Callable

from osft_mcore.errors import OsftError


class BackgroundJob:
    """Runs a job in a thread, or at once if `background` is false."""

    def __init__(self, *, background: bool) -> None:
        self._background = background
        self._thread: threading.Thread | None = None
        self._problem = ""
        self.seconds = 0.0
        """What the last job took."""

    def start(self, job: Callable[[], None]) -> None:
        """Begin; the one before must have been waited for."""
        assert not self.running, "the job before this one has not ended"
        self._problem = ""
        if self._background:
            # A daemon: a write that hangs must not keep the program from ending.
            self._thread = threading.Thread(target=self._run, args=(job,), daemon=True)
            self._thread.start()
        else:
            self._run(job)

    @property
    def running(self) -> bool:
        """True while a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self, deadline: float) -> str:
        """What went wrong with the last job, or nothing; it is told once.

        Waits until it ends or `deadline` (seconds of time.monotonic()) has passed, which is a
        problem too: then the job is still running.
        """
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            if self._thread.is_alive():
                return "a save is still being written after checkpoint.timeout_minutes"
            self._thread = None
        problem, self._problem = self._problem, ""
        return problem

    def _run(self, job: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            job()
        except OsftError as error:
            self._problem = str(error)
        except Exception as error:
            # Nobody sees a thread's exception: it is handed over like the expected ones.
            self._problem = repr(error)
        self.seconds = time.monotonic() - started
