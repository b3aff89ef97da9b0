"""The benchmark of the loss compares like with like, and its figures are right."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from loss_benchmark.cases import Case, make_cases
from loss_benchmark.measure import Pass, check_losses, weighed
from loss_benchmark.ranks import on_ranks
from loss_benchmark.rows import growth_lines, make_rows, table_head, table_line

TOOL = Path(__file__).parents[2] / "tools" / "bench_loss.py"
MIB = 2**20
NUM_TOKENS, VOCAB = 320, 32768
"""Of logits 40 MiB: little to compute, and far more than the noise of a process."""


def test_the_tool_holds_ours_against_every_baseline() -> None:
    sizes = (
        f"--tokens {NUM_TOKENS} --vocab {VOCAB} --hidden 32 --dtype fp32 --rounds 2 --json".split()
    )
    shown = subprocess.run(
        [sys.executable, str(TOOL), *sizes],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert shown.returncode == 0, shown.stderr
    rows = {(row["tp"], row["baseline"]): row for row in json.loads(shown.stdout)}
    assert {(1, "megatron"), (1, "torch")} <= rows.keys()
    for (tp, _), row in rows.items():
        assert (row["num_tokens"], row["vocab"], row["hidden"]) == (NUM_TOKENS, VOCAB, 32)
        assert row["loss"] == pytest.approx(row["loss_baseline"], rel=1e-5)
        assert row["time_ratio"] > 0
        assert row["memory_ratio"] > 0
        assert row["cpu_ratio"] > 0
        assert row["spread"] >= 1
        if row["baseline"] == "megatron":
            # Its logits, which become their own gradient.
            logits = NUM_TOKENS * VOCAB // tp * 4
            assert row["peak_bytes_baseline"] == pytest.approx(logits, abs=12 * MIB)


def test_the_loss_needs_two_chunks_of_logits_and_no_more() -> None:
    """Whole logits would be two chunks already, and their gradient two more."""
    case = Case(num_tokens=4096, vocab=16384, hidden=32, tp=1, dtype="fp32", rounds=1, baselines=())
    found = on_ranks(case.tp, partial(weighed, case, "ours"))
    assert 0.9 <= found["peak_bytes"] / (2 * 128 * MIB) <= 1.1


@pytest.mark.parametrize("loss", [10.0002, float("nan")])
def test_a_loss_that_differs_is_an_error(loss: float) -> None:
    check_losses({"ours": 10.0, "torch": 10.00005}, tolerance=1e-5)
    with pytest.raises(ArithmeticError, match=r"10\.0 by ours and .* by torch, .* agree to 1e-05"):
        check_losses({"ours": 10.0, "torch": loss}, tolerance=1e-5)


CASE = Case(
    num_tokens=1024, vocab=1000, hidden=8, tp=1, dtype="fp32", rounds=3, baselines=("megatron",)
)


def passes(way: str, *seconds: float, peak: int, loss: float = 7.0) -> list[Pass]:
    """Of which the last is weighed."""
    times = [Pass(way=way, seconds=s, cpu_seconds=2 * s, loss=loss) for s in seconds]
    return [*times[:-1], dataclasses.replace(times[-1], peak_bytes=peak)]


OURS = passes("ours", 1.0, 3.0, 2.0, peak=2 * MIB)


def test_a_row_compares_medians_and_peaks() -> None:
    (row,) = make_rows(CASE, OURS + passes("megatron", 4.0, 5.0, 16.0, peak=8 * MIB))
    assert (row.seconds, row.seconds_baseline, row.time_ratio) == (2.0, 5.0, 0.4)
    assert (row.cpu_ratio, row.spread) == (0.4, 4.0)
    assert (row.peak_bytes, row.peak_bytes_baseline, row.memory_ratio) == (2 * MIB, 8 * MIB, 0.25)
    shown = " ".join(table_line(row).split())
    assert shown == "1024 8 1 3 megatron 2.000 5.000 0.40 4.00 0.40 2 8 0.250"
    assert len(table_line(row)) == len(table_head().splitlines()[1])
    longer = dataclasses.replace(row, num_tokens=8192, peak_bytes=3 * MIB)
    assert growth_lines([longer, row]) == [
        "hidden 8, tp 1: 8 x the tokens, 1.50 x the peak of ours"
    ]


def test_passes_that_cannot_be_compared_make_no_row() -> None:
    with pytest.raises(ArithmeticError, match="by megatron"):
        make_rows(CASE, OURS + passes("megatron", 1.0, peak=1, loss=7.1))
    with pytest.raises(ValueError, match="raise --tokens or --vocab"):
        make_rows(CASE, OURS + passes("megatron", 1.0, peak=-1))


def test_cases_are_what_was_asked_for() -> None:
    make = partial(
        make_cases,
        tokens=None, hidden=None, dtype=None, rounds=None, baselines=None, full=False, vocab=96,
    )  # fmt: skip
    (case,) = make(tokens=[10], hidden=[4], tps=[1], baselines=["torch"], rounds=7)
    assert (case.num_tokens, case.hidden, case.tp, case.rounds) == (10, 4, 1, 7)
    assert case.baselines == ("torch",)
    full = make(tps=[1], full=True)
    assert {(at.num_tokens, at.hidden) for at in full} == {
        (tokens, hidden) for tokens in (1024, 4096, 8192) for hidden in (896, 3584)
    }
    with pytest.raises(ValueError, match="a vocabulary of 96 over 5 ranks"):
        dataclasses.replace(case, tp=5)
    with pytest.raises(ValueError, match="nothing to measure"):
        make(tps=[2], baselines=["torch"])
