"""The report's table of what became of answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from run_folders import add_result, write_run

from osft_mcore.report.outcomes import COLUMNS, outcome_rows
from osft_mcore.report.page import page
from osft_mcore.report.run import read_runs
from osft_mcore.report.scores import results_of

HALF = {"value": 0.5, "ci95": [0.25, 0.75]}
NONE = {"value": None, "ci95": None}
ADDED = {
    "outcomes": {
        "correct": HALF, "format_error": {"value": 0.125, "ci95": [0.0, 0.25]},
        "logic_error": HALF, "correct_given_parsed": NONE,
    },
    "cut_off_ratio": 0.0625, "cut_off_ratio_ci95": [0.03125, 0.09375],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scored after steps 0, 2 and 4, of which 2 is of a version that kept no rates."""
    folder = write_run(tmp_path / "run")
    for step in (0, 2, 4):
        add_result(folder, step, 1.0, (0.5, 0.4, 0.6))
    for step in (0, 4):
        change(folder, step, ADDED, shots={"count": 3})
    return folder


def change(folder: Path, step: int, added: dict[str, Any], **top: Any) -> None:
    file = folder / "evaluations" / f"step_{step}_temperature_1.json"
    found = json.loads(file.read_text()) | top
    found["benchmarks"]["sums"] |= added
    file.write_text(json.dumps(found))


def test_the_first_and_the_last_step_are_shown(folder: Path) -> None:
    (run,) = read_runs([folder])
    rows = outcome_rows(run, results_of(run))
    assert [(row.benchmark, row.step, row.shots) for row in rows] == [
        ("sums", 0, 3), ("sums", 4, 3),
    ]  # fmt: skip
    figures = dict(zip(COLUMNS, rows[0].figures, strict=True))
    correct, cut = figures["correct"], figures["cut_off_ratio"]
    assert correct is not None
    assert cut is not None
    assert (correct.value, correct.low, correct.high) == (0.5, 0.25, 0.75)
    assert (cut.value, cut.low, cut.high) == (0.0625, 0.03125, 0.09375)
    # Nothing could count, and not recorded.
    assert figures["correct_given_parsed"] is figures["ungraded"] is None


def test_the_page_has_the_table(folder: Path) -> None:
    text = page(read_runs([folder]))
    table = text.split('<table class="outcomes">')[1].split("</table>")[0]
    assert "12.5% <small>0% to 25%</small>" in table
    assert table.count("<tr>") == 3


def test_a_run_without_rates_has_no_table_and_a_damaged_one_no_error(folder: Path) -> None:
    for step in (0, 4):
        change(folder, step, {"outcomes": [], "cut_off_ratio_ci95": "none"}, shots="three")
    assert "What became of the answers" not in page(read_runs([folder]))
    change(folder, 0, {"outcomes": {"correct": {"value": "x"}, "ungraded": 7}})
    assert "What became of the answers" in page(read_runs([folder]))
