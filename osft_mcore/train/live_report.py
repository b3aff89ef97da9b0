"""report.html of a run: written by a process of its own, while the run goes on and when it ends."""

import contextlib
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from osft_mcore.config.schema import ReportConfig
from osft_mcore.errors import Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import REPORT, RunFolder
from osft_mcore.parallel.world import variables_of_child
from osft_mcore.report.command import temporary_file

PROGRAM: Final = (sys.executable, "-m", "osft_mcore.report")
LOWEST_PRIORITY: Final = 19
POLL_S: Final = 0.05
REFRESH_S: Final = 600.0
"""A report that takes longer, while the run goes on, is given up."""
AT_END_S: Final = 60.0
"""The same at the end, which waits for it."""
WHEN_STOPPED_S: Final = 10.0
"""The same if the run was told to stop: whoever did may not wait long."""


@contextlib.contextmanager
def live_report(
    folder: RunFolder, cfg: ReportConfig, console: Console, program: Sequence[str] = PROGRAM
) -> Iterator[None]:
    """Keep the report up to date while inside, and leave the last one behind. Rank 0 does it.

    Nothing that happens to a report is raised: one line on the console tells it. An error ends
    this without a last report, at once.
    """
    if not folder.writer:
        yield
        return
    command = [*program, str(folder.path)]
    closing = threading.Event()
    writer = threading.Thread(
        target=_refresh,
        args=(command, folder.path, cfg, console, closing),
        name="report",
        daemon=True,
    )
    if cfg.every_minutes > 0:
        writer.start()
    patience_s = 0.0
    try:
        yield
        patience_s = AT_END_S
    except Stopped:
        patience_s = WHEN_STOPPED_S
        raise
    finally:
        closing.set()
        if writer.is_alive():
            writer.join()
        if cfg.at_end and patience_s:
            failure = write_report(command, folder.path, patience_s, threading.Event())
            console.say(failure or f"report: {folder.path / REPORT}")


def write_report(
    command: Sequence[str],
    folder: Path,
    limit_s: float,
    closing: threading.Event,
    *,
    priority: int = 0,
) -> str:
    """Run the command, which writes the report of `folder`; a line that tells why there is none,
    or an empty one.

    Returns at once if `closing` is set, or after `limit_s`; the process is killed then.
    """
    try:
        with tempfile.TemporaryFile() as said:
            process = subprocess.Popen(
                command,
                # A rank's own names its launcher as the parent, and the report would end with that.
                env=variables_of_child({}),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
            try:
                if priority:
                    os.setpriority(os.PRIO_PROCESS, process.pid, priority)
                why = _ended(process, limit_s, closing)
            finally:
                process.kill()
                process.wait()
                # Killed in the middle of writing it leaves that behind.
                temporary_file(folder / REPORT, process.pid).unlink(missing_ok=True)
            said.seek(0)
            lines = said.read().decode(errors="replace").strip().splitlines()
    except OSError as error:
        return f"no report: {error}"
    if why is None or process.returncode == 0:
        return ""
    return f"no report: {why or (lines[-1] if lines else f'exit code {process.returncode}')}"


def _ended(
    process: "subprocess.Popen[bytes]", limit_s: float, closing: threading.Event
) -> str | None:
    """Wait for the end: "" if it came, None if the run closes, else why nobody waits longer."""
    deadline = time.monotonic() + limit_s
    while process.poll() is None:
        if time.monotonic() >= deadline:
            return f"not finished after {limit_s:g} s"
        if closing.wait(POLL_S):
            return None
    return ""


def _refresh(
    command: Sequence[str],
    folder: Path,
    cfg: ReportConfig,
    console: Console,
    closing: threading.Event,
) -> None:
    while not closing.wait(60 * cfg.every_minutes):
        if failure := write_report(command, folder, REFRESH_S, closing, priority=LOWEST_PRIORITY):
            console.say(failure)
