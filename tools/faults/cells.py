"""One fault in one run: start it, wait for the phase, signal the rank, wait for the end."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from osft_mcore.data.arithmetic import ArithmeticTask, TinyModel, write_arithmetic

Fault = Literal["SIGKILL", "SIGSTOP"]
Launcher = Literal["osft", "torchrun"]
LAUNCHERS: Final[dict[Launcher, tuple[str, ...]]] = {
    "osft": (),
    "torchrun": ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
}
"""What comes between Python and the program."""
FAULTS: Final[tuple[Fault, ...]] = ("SIGKILL", "SIGSTOP")
PHASES: Final = ("rollout", "train", "sync", "evaluate", "save")
LAYOUTS: Final = {
    "tp2": ("parallel.tp=2", "rollout.tp=2"),
    "pp2": ("parallel.pp=2", "rollout.tp=2"),
}
NUM_RANKS: Final = 2
AFTER_DEADLINE_S: Final = 10.0
"""The promise: by then no process of the run is left."""
GIVE_UP_S: Final = 60.0
"""After the deadline: what is left of the run then is killed."""
START_S: Final = 180.0
TASK: Final = ArithmeticTask(num_sft=16, num_train=4096, num_eval=128)
POLL_S: Final = 0.0005
"""Phases are short."""
END_POLL_S: Final = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A fault, and what came of it."""

    launcher: Launcher
    layout: str
    phase: str
    rank: int
    fault: Fault
    seconds: float
    """From the signal until no process of the run is left."""
    code: int | None
    """None: the launcher did not end."""
    told: str
    """The line that names the rank; empty if none does."""
    problem: str = ""
    """Why there is nothing to see, or no end."""

    def is_broken(self, deadline_s: float) -> bool:
        """Whether a promise was: the end comes in time, as a failure, and says who was lost."""
        late = self.seconds > deadline_s + AFTER_DEADLINE_S
        return late or self.code == 0 or not self.told or bool(self.problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """Of a run that has lost a rank; as in `Cell`."""

    seconds: float
    code: int | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """A launcher, and its ranks once they are known: a frozen one may outlive it."""

    launcher: subprocess.Popen[bytes]
    ranks: dict[int, int] = field(default_factory=dict)
    """Process ids."""


def make_inputs(folder: Path) -> list[str]:
    """A tiny model with random weights, sums to answer, and the options of the runs."""
    files = write_arithmetic(folder, TASK, TinyModel())
    return [
        f"model.path={files.model}", "model.init=random", "model.dtype=fp32",
        f"data.train={folder / 'train.parquet'}",
        f"evaluation.files=[{folder / 'eval.parquet'}]",
        "evaluation.every=1", "evaluation.max_problems=64", "evaluation.num_samples=2",
        "evaluation.before=false", "train.steps=1000", "train.prompts_per_step=64",
        "train.prompts_per_update=32", "train.micro_batch_size=8", "rollout.max_prompt_tokens=32",
        "rollout.max_response_tokens=64", "rollout.kv_cache_gib=0.1", "checkpoint.every=1",
        "checkpoint.async=false", "report.at_end=false", "report.every_minutes=0",
    ]  # fmt: skip


def run_cell(
    folder: Path,
    inputs: Sequence[str],
    *,
    launcher: Launcher,
    layout: str,
    phase: str,
    rank: int,
    fault: Fault,
    deadline_s: float,
) -> Cell:
    """Start a run of the options `inputs` in `folder`, and lose `rank` in `phase`.

    `deadline_s` is the limit of every phase. If the run ends before, or the phase does not come,
    or the run does not end, that is the cell's problem.
    """
    limits = [f"deadlines.{name}={deadline_s / 60}" for name in PHASES]
    command = [
        sys.executable, *LAUNCHERS[launcher], "-m", "osft_mcore.cli", "train",
        f"output_dir={folder}", *inputs, *LAYOUTS[layout], *limits,
        f"checkpoint.timeout_minutes={deadline_s / 120}",
    ]  # fmt: skip
    folder.mkdir(parents=True)
    log = folder / "log"
    end = lose(command, log, phase, rank, fault, limit_s=deadline_s + GIVE_UP_S)
    told = _naming(log.read_text(encoding="utf-8", errors="replace"), rank)
    return Cell(
        launcher=launcher, layout=layout, phase=phase, rank=rank, fault=fault, told=told,
        seconds=end.seconds, code=end.code, problem=end.problem,
    )  # fmt: skip


def lose(
    command: Sequence[str], log: Path, phase: str, rank: int, fault: Fault, *, limit_s: float
) -> End:
    """Start a run, signal `rank` in `phase`, and wait for the end, for at most `limit_s`.

    No process is left of it then.
    """
    with _started(command, log) as run:
        try:
            _wait_for_phase(run, phase, rank)
            os.kill(run.ranks[rank], getattr(signal, fault))
        except (OSError, RuntimeError) as error:
            return End(seconds=0.0, code=run.launcher.poll(), problem=str(error))
        began = time.monotonic()
        while left := _left(run):
            if time.monotonic() - began > limit_s:
                problem = f"{' and '.join(left)} still there after {limit_s:g} s"
                return End(seconds=limit_s, code=run.launcher.poll(), problem=problem)
            time.sleep(END_POLL_S)
        return End(seconds=time.monotonic() - began, code=run.launcher.poll())


def _left(run: Run) -> list[str]:
    """What has not ended yet."""
    launcher = ["the launcher"] if run.launcher.poll() is None else []
    return launcher + [f"rank {rank}" for rank, pid in run.ranks.items() if _lives(pid)]


def _naming(text: str, rank: int) -> str:
    """The first line that says what became of the rank."""
    said = (rf"^rank {rank} \(host .*", rf"^osft: rank {rank} was ended by.*")
    found = [match.group() for pattern in said if (match := re.search(pattern, text, re.M))]
    return found[0] if found else ""


@contextmanager
def _started(command: Sequence[str], log: Path) -> Iterator[Run]:
    with log.open("wb") as out:
        run = Run(launcher=subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT))
        try:
            yield run
        finally:
            # Ranks of `osft` end with it; torchrun's do not.
            if run.launcher.poll() is None:
                run.ranks.update(_ranks_of(run.launcher.pid))
            run.launcher.kill()
            run.launcher.wait()
            for rank, pid in run.ranks.items():
                # By now the number may be another process's.
                if _environment(pid).get("RANK") == str(rank):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)


def _wait_for_phase(run: Run, phase: str, rank: int) -> None:
    """Until `rank` has come to `phase` for the second time; the run's ranks are known then.

    Raises RuntimeError if it does not.
    """
    until, store, first = time.monotonic() + START_S, None, None
    while time.monotonic() < until:
        if run.launcher.poll() is not None:
            raise RuntimeError(f"the run ended with {run.launcher.returncode} before {phase}")
        if len(run.ranks) < NUM_RANKS:
            run.ranks.update(_ranks_of(run.launcher.pid))
            time.sleep(0.1)
            continue
        store = store or _store(run.ranks[0])
        name = f"watchdog/place/{rank}"
        place = json.loads(store.get(name)) if store.check([name]) else {}
        if place.get("phase") == phase:
            first = first or place["number"]
            if place["number"] > first:
                return
        time.sleep(POLL_S)
    raise RuntimeError(f"{phase} did not come within {START_S:g} s")


def _ranks_of(launcher: int) -> dict[int, int]:
    found = {}
    with suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{launcher}/task").iterdir():
            for child in (task / "children").read_text().split():
                environment = _environment(int(child))
                if "RANK" in environment:
                    found[int(environment["RANK"])] = int(child)
    return found


def _store(pid: int) -> TCPStore:
    """Where the ranks make themselves known."""
    environment = _environment(pid)
    return TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), None, False)


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in entries if "=" in entry)


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        # The latter if it is reaped between opening and reading.
        return False
    return state not in "XZ"
