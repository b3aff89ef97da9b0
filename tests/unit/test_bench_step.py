"""The benchmark of the update compares the same work, and draws lengths with a long tail."""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from step_benchmark.measure import lengths

TOOL = Path(__file__).parents[2] / "tools" / "bench_step.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_lengths_have_a_long_tail() -> None:
    found = sorted(lengths(400, median=100, longest=1024, seed=1))
    assert found[-1] == 1024
    assert statistics.median(found) == pytest.approx(100, rel=0.2)
    assert sum(found[-40:]) > 0.3 * sum(found)


def test_the_tool_times_the_same_update_each_way() -> None:
    sizes = "--sequences 16 --median 12 --longest 96 --prompt 4 --budget 128 --rounds 2"
    shown = run(*sizes.split(), "--json")
    assert shown.returncode == 0, shown.stderr
    rows: list[dict[str, Any]] = json.loads(shown.stdout)
    assert [row["baseline"] for row in rows] == ["longest of the batch", "longest of its four"]
    for row in rows:
        assert row["longest"] == 100
        assert row["loss_difference"] < 1e-6
        assert row["speedup"] == pytest.approx(row["baseline_seconds"] / row["seconds"])
        assert row["padding_share"] < row["baseline_padding_share"]
    tokens, positions = rows[0]["num_tokens"], 16 * 100
    assert rows[0]["baseline_padding_share"] == pytest.approx(1 - tokens / positions)


def test_sizes_that_cannot_be_are_refused() -> None:
    for options, problem in (
        (("--sequences", "50"), "multiple of 4"),
        (("--rounds", "0"), "below 1"),
    ):
        shown = run(*options)
        assert shown.returncode == 2
        assert problem in shown.stdout


def test_a_budget_below_the_longest_sequence_is_refused() -> None:
    shown = run("--prompt", "10", "--longest", "100", "--budget", "109")
    assert shown.returncode == 2
    assert "--budget: found 109, a sequence has up to 110" in shown.stdout
