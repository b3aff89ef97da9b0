"""What every conversion tool does around its work: errors, exit code, time and memory."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from osft_mcore.errors import CheckpointError, ConfigError, OsftError
from osft_mcore.log.console import Console

_STATUS: Final = Path("/proc/self/status")


def run_tool(name: str, work: Callable[[Console], int]) -> int:
    """Call `work` and return its exit code, or that of its error, which is printed.

    Says at the end how long it took and how much memory beyond the program itself.
    """
    console = Console(enabled=True)
    before, started = _memory("VmRSS"), time.monotonic()
    try:
        code = work(console)
    except OsftError as error:
        lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
        text = "".join(f"  - {line}\n" for line in lines)
        sys.stderr.write(f"{name}: {type(error).__name__}\n{text}")
        return error.exit_code
    except OSError as error:
        sys.stderr.write(f"{name}: {error}\n")
        return CheckpointError.exit_code
    except KeyboardInterrupt:
        sys.stderr.write(f"{name}: stopped by SIGINT; repeat the command to go on\n")
        return 130
    console.say(f"{time.monotonic() - started:.1f} s")
    peak = _memory("VmHWM")
    if before is not None and peak is not None:
        # Both of this process alone: getrusage would also count the program that started it.
        console.say(f"peak memory: {(peak - before) >> 10} MiB above the program itself")
    return code


def _memory(field: str) -> int | None:
    """KiB that the kernel says are, or at most were, resident; None where it says nothing."""
    if not _STATUS.is_file():
        return None
    lines = _STATUS.read_text(encoding="utf-8").splitlines()
    found = (line.split()[1] for line in lines if line.startswith(f"{field}:"))
    return next((int(value) for value in found), None)
