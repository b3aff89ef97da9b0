"""The benchmark of the grader grades the same answers both ways."""

import json
import subprocess
import sys
from pathlib import Path

from grading_benchmark.answers import ordinary_pairs

TOOL = Path(__file__).parents[2] / "tools" / "bench_grading.py"


def run(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(TOOL), *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def test_answers_are_the_same_for_a_seed_and_mostly_numbers() -> None:
    pairs = ordinary_pairs(400, seed=1)
    assert pairs == ordinary_pairs(400, seed=1) != ordinary_pairs(400, seed=2)
    assert 0.4 < sum(gold.lstrip("-").isdigit() for _, gold in pairs) / 400 < 0.8


def test_the_tool_grades_the_same_answers_both_ways() -> None:
    shown = run("--answers", "60", "--rounds", "1", "--json")
    assert shown.returncode == 0, shown.stderr
    result = json.loads(shown.stdout)
    assert result["speedup"] == result["inline_s"] / result["grader_s"]
    assert 0.5 < result["share_by_spelling"] < 1
    assert result["num_ungraded"] == 0
    # math-verify does not take 10% for 10.
    assert 20 < result["num_right_inline"] <= result["num_right"] < 40


def test_sizes_below_one_are_refused() -> None:
    refused = run("--answers", "0")
    assert refused.returncode == 2
    assert "expected at least 1" in refused.stdout
