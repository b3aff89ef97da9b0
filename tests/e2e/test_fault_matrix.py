"""A few cells of the table in docs/faults.md: real ranks, real engine, real signals."""

from pathlib import Path

import pytest
from faults.cells import Cell, Fault, Launcher, make_inputs, run_cell
from program import no_process_left

DEADLINE_S = 8.0
# Nothing that takes long to start and is not in these cells.
SMALL = [
    "train.prompts_per_step=16", "train.prompts_per_update=16", "evaluation.files=[]",
    "evaluation.every=0", "checkpoint.every=0",
]  # fmt: skip
# What is waited for has limits of its own.
pytestmark = pytest.mark.timeout(600)


def run(folder: Path, launcher: Launcher, layout: str, phase: str, rank: int, fault: Fault) -> Cell:
    inputs = [*make_inputs(folder / "data"), *SMALL]
    with no_process_left():
        cell = run_cell(
            folder / "run", inputs, launcher=launcher, layout=layout, phase=phase, rank=rank,
            fault=fault, deadline_s=DEADLINE_S,
        )  # fmt: skip
    log = (folder / "run" / "log").read_text(encoding="utf-8", errors="replace")
    assert not cell.is_broken(DEADLINE_S), f"{cell}\n{log[-4000:]}"
    assert cell.told.startswith((f"rank {rank} (host ", f"osft: rank {rank} was ended by"))
    return cell


def test_a_killed_rank_ends_the_run_at_once(tmp_path: Path) -> None:
    cell = run(tmp_path, "osft", "tp2", "train", 1, "SIGKILL")
    assert cell.seconds < DEADLINE_S, "the others need no deadline to see it"


def test_torchrun_does_not_wait_for_a_frozen_rank(tmp_path: Path) -> None:
    """It would, for half a minute, before it kills what does not heed SIGTERM.

    `osft` on frozen ranks: test_watchdog.py.
    """
    cell = run(tmp_path, "torchrun", "pp2", "rollout", 1, "SIGSTOP")
    assert cell.code == 1
    assert cell.seconds > DEADLINE_S / 2, "nothing but the deadline can tell"
