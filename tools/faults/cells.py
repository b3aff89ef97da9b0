"""One fault in one run: start it, wait for the phase, signal the rank, wait for the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

Fault = Literal["SIGKILL", "SIGSTOP"]
FAULTS: Final[tuple[Fault, ...]] = ("SIGKILL", "SIGSTOP")
PHASES: Final = ("rollout", "train", "sync", "evaluate", "save")
LAYOUTS: Final = {
    "tp2": ("parallel.tp=2", "rollout.tp=2"),
    "pp2": ("parallel.pp=2", "rollout.tp=2"),
}
NUM_RANKS: Final = 2
START_S: Final = 180.0
POLL_S: Final = 0.0005


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A fault, and what came of it."""

    layout: str
    phase: str
    rank: int
    fault: Fault
    seconds: float
    """From the signal until no process of the run is left."""
    code: int
    told: str
    """The line that names the rank; empty if none does."""


def run_cell(
    folder: Path,
    inputs: Sequence[str],
    *,
    layout: str,
    phase: str,
    rank: int,
    fault: Fault,
    deadline_s: float,
) -> Cell:
    """Start a run of the options `inputs` in `folder`, and lose `rank` in `phase`.

    `deadline_s` is the limit of every phase. Raises RuntimeError if the run ends before, or the
    phase does not come.
    """
    limits = [f"deadlines.{name}={deadline_s / 60}" for name in PHASES]
    command = [
        sys.executable, "-m", "osft_mcore.cli", "train", f"output_dir={folder}", *inputs,
        *LAYOUTS[layout], *limits, f"checkpoint.timeout_minutes={deadline_s / 120}",
    ]  # fmt: skip
    folder.mkdir(parents=True)
    log = folder / "log"
    with _started(command, log) as launcher:
        ranks = _ranks_in(launcher, phase, rank)
        os.kill(ranks[rank], getattr(signal, fault))
        began = time.monotonic()
        code = launcher.wait(timeout=deadline_s + START_S)
        while any(_lives(pid) for pid in ranks.values()):
            time.sleep(POLL_S)
        seconds = time.monotonic() - began
    told = _naming(log.read_text(encoding="utf-8", errors="replace"), rank)
    return Cell(
        layout=layout, phase=phase, rank=rank, fault=fault, seconds=seconds, code=code, told=told
    )


def _naming(text: str, rank: int) -> str:
    """The first line that says what became of the rank."""
    said = (rf"^rank {rank} \(host .*", rf"^osft: rank {rank} was ended by.*")
    found = [match.group() for pattern in said if (match := re.search(pattern, text, re.M))]
    return found[0] if found else ""


@contextmanager
def _started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            # Its ranks end with it.
            process.kill()
            process.wait()


def _ranks_in(launcher: subprocess.Popen[bytes], phase: str, rank: int) -> dict[int, int]:
    """Process ids by rank, as soon as `rank` has come to `phase` for the second time."""
    until, ranks = time.monotonic() + START_S, {}
    store, first = None, None
    while time.monotonic() < until:
        if launcher.poll() is not None:
            raise RuntimeError(f"the run ended with {launcher.returncode} before {phase}")
        if len(ranks) < NUM_RANKS:
            ranks = _ranks_of(launcher.pid)
            time.sleep(0.1)
            continue
        store = store or TCPStore("127.0.0.1", _port(ranks[0]), None, False)
        name = f"watchdog/place/{rank}"
        place = json.loads(store.get(name)) if store.check([name]) else {}
        if place.get("phase") == phase:
            first = first or place["number"]
            if place["number"] > first:
                return ranks
        time.sleep(POLL_S)
    raise RuntimeError(f"{phase} did not come within {START_S:g} s")


def _ranks_of(launcher: int) -> dict[int, int]:
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            environment = _environment(int(child))
            if "RANK" in environment:
                found[int(environment["RANK"])] = int(child)
    return found


def _port(pid: int) -> int:
    return int(_environment(pid)["MASTER_PORT"])


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "XZ"
