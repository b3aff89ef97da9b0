"""The evaluator of a run as the run sees it: a process to start, to look at, and to end."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from osft_mcore.config.evaluation import cores
from osft_mcore.config.schema import RunConfig
from osft_mcore.evaluation.worker_process import stop_signals_blocked
from osft_mcore.log.run_folder import EVALUATOR_LOG
from osft_mcore.parallel.world import device_type, variables_of_child

PROGRAM: Final = (sys.executable, "-m", "osft_mcore.cli", "follow")
LEAVES_S: Final = 30.0
"""For an evaluator that has nothing left to do."""
INTERRUPTED_S: Final = 5.0
TAIL_BYTES: Final = 4096


class EvaluatorProcess:
    """Started by the main thread, whose end would end it; what it says is in a log of its own."""

    def __init__(self, config: RunConfig, program: Sequence[str] = PROGRAM) -> None:
        self.log = Path(config.output_dir) / EVALUATOR_LOG
        command = [*program, config.output_dir]
        with self.log.open("ab") as log, stop_signals_blocked():
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=variables_of_child(_variables(config)),
                # Ctrl-C in the terminal is for the run to handle.
                start_new_session=True,
            )
        self.pid = self._process.pid

    def ended(self) -> str:
        """How it ended, with its last words; empty while it runs."""
        code = self._process.poll()
        if code is None:
            return ""
        how = f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"
        return f"{how}; its last words, {self.last_words()!r}, and all others: {self.log}"

    def last_words(self) -> str:
        """The last line of its log."""
        with self.log.open("rb") as log:
            log.seek(max(0, os.fstat(log.fileno()).st_size - TAIL_BYTES))
            lines = log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else ""

    def leave(self) -> None:
        """Wait a little: it has been told that nothing will come."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVES_S)

    def end(self) -> None:
        """End it and all that it started. Nothing, if it has ended."""
        if self._process.poll() is None:
            # It ends its ranks then, and frees what they share.
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(INTERRUPTED_S)
            # Its ranks have asked the kernel to end with it.
            self._process.kill()
            self._process.wait()


def _variables(config: RunConfig) -> dict[str, str]:
    devices = config.evaluation.devices
    if device_type() == "cuda":
        return {"CUDA_VISIBLE_DEVICES": devices}
    if not devices:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, len(cores(devices)) // config.rollout.tp))}
