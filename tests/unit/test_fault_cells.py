"""What becomes of a cell of the table in docs/faults.md whose run does not end as it should."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fault_matrix
import pytest
from faults import cells
from faults.cells import Cell, lose, run_cell
from faults.table import BEGIN, END, as_table

from osft_mcore.parallel.loopback import LOOPBACK, loopback_store

LAUNCHER = """
import os, pathlib, subprocess, sys, time

def state(pid):
    return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]

ranks = [
    subprocess.Popen(["sleep", "600"], env={**os.environ, "RANK": str(rank)}) for rank in range(2)
]
while state(ranks[1].pid) not in "TZ":
    time.sleep(0.01)
ranks[0].kill()
ranks[0].wait()
open(sys.argv[1], "w").write(str(ranks[1].pid))
sys.exit(3)
"""
CELL = Cell(
    launcher="osft", layout="tp2", phase="train", rank=1, fault="SIGKILL", seconds=1.0, code=1,
    told="rank 1 (host a) does not answer",
)  # fmt: skip


@contextmanager
def ranks_at_work(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A store where rank 1 comes to `train` again and again."""
    store, ended = loopback_store(), threading.Event()
    monkeypatch.setenv("MASTER_ADDR", LOOPBACK)
    monkeypatch.setenv("MASTER_PORT", str(store.port))

    def work() -> None:
        number = 1
        while not ended.wait(0.01):
            number += 1
            place = {"phase": "train", "number": number}
            store.set("watchdog/place/1", json.dumps(place))

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_a_frozen_rank_that_outlives_its_launcher_is_a_broken_cell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-S", "-c", LAUNCHER, str(tmp_path / "pid")]
    with ranks_at_work(monkeypatch):
        end = lose(command, tmp_path / "log", "train", 1, "SIGSTOP", limit_s=1.5)
    assert end == cells.End(seconds=1.5, code=3, problem="rank 1 still there after 1.5 s")
    pid, until = int((tmp_path / "pid").read_text()), time.monotonic() + 5.0
    while cells._lives(pid):
        assert time.monotonic() < until, "it was left behind"
        time.sleep(0.01)


def test_a_killed_rank_and_its_launcher_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-S", "-c", LAUNCHER, str(tmp_path / "pid")]
    with ranks_at_work(monkeypatch):
        end = lose(command, tmp_path / "log", "train", 1, "SIGKILL", limit_s=60.0)
    assert (end.code, end.problem) == (3, "")
    assert end.seconds < 30


def test_a_process_that_is_reaped_while_it_is_looked_at_does_not_live(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reaped(_path: Path) -> str:
        raise ProcessLookupError

    assert cells._lives(threading.get_native_id())
    monkeypatch.setattr(Path, "read_text", reaped)
    assert not cells._lives(threading.get_native_id())


def test_a_run_that_ends_before_the_phase_is_a_broken_cell(tmp_path: Path) -> None:
    cell = run_cell(
        tmp_path / "run", ["train.lr=fast"], launcher="osft", layout="tp2", phase="train", rank=0,
        fault="SIGKILL", deadline_s=5.0,
    )  # fmt: skip
    assert (cell.code, cell.problem) == (2, "the run ended with 2 before train")
    assert cell.is_broken(5.0)


def test_whatever_is_broken_about_a_cell_is_told() -> None:
    assert not CELL.is_broken(5.0)
    broken = replace(CELL, code=None, problem="the launcher still there after 65 s")
    for cell in (broken, replace(CELL, told=""), replace(CELL, code=0), replace(CELL, seconds=16)):
        assert cell.is_broken(5.0)
    *_, fine, bad = as_table([CELL, broken], deadline_s=5.0).splitlines()
    assert fine.endswith("| 1.0 s | 1 | rank 1 (host a) does not answer |")
    assert bad.endswith(
        "| none | rank 1 (host a) does not answer; **broken: the launcher still there after "
        "65 s** |"
    )


def test_cells_after_a_broken_one_are_measured_and_a_matrix_that_is_cut_off_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, found = tmp_path / "faults.md", [replace(CELL, problem="did not come"), CELL]
    document.write_text(f"before\n{BEGIN}\n{END}\nafter\n")

    def measured(*_given: object, **_options: object) -> Cell:
        if not found:
            raise KeyboardInterrupt
        return found.pop(0)

    monkeypatch.setattr(fault_matrix, "make_inputs", lambda _folder: [])
    monkeypatch.setattr(fault_matrix, "run_cell", measured)
    monkeypatch.setattr(sys, "argv", ["fault_matrix.py", "--write", str(document)])
    with pytest.raises(KeyboardInterrupt):
        fault_matrix.main()
    text = document.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert text.count("| SIGKILL |") == 2
    assert "did not come" in text
