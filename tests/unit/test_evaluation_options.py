"""What evaluation's options name: benchmarks by name, and sweeps that keep both ends."""

from typing import Any

import pytest

from osft_mcore.config.check_evaluation import evaluation_problems
from osft_mcore.config.evaluation import benchmark_files, sweep, temperatures
from osft_mcore.config.schema import DataConfig, RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        ("0:1.2:0.1", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)),
        ("0:0.3:0.1", (0, 0.1, 0.2, 0.3)),
        ("0.1:0.7:0.1", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)),
        ("1:1:0.5", (1.0,)),
        ("0.6:1.6:0.3", None),
    ],
)
def test_a_sweep_keeps_both_ends(text: str, expected: tuple[float, ...] | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"steps of 0.3 from 0.6 miss 1.6"):
            sweep(text)
    else:
        assert sweep(text) == expected


def test_the_paper_sweep_has_17_temperatures() -> None:
    assert len(sweep("0:1.6:0.1")) == 17
    assert sweep("0:1.6:0.1")[-1] == 1.6


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("1", "expected first:last:step"),
        ("0:1:x", "expected first:last:step"),
        ("0:1", "expected first:last:step"),
        ("1:0:0.1", "0 <= first <= last"),
        ("-1:1:0.5", "0 <= first <= last"),
        ("0:1:0", "more than 0"),
        ("0:inf:1", "0 <= first <= last"),
        ("0:1:0.001", "more than 100"),
    ],
)
def test_what_is_no_sweep_is_named(text: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        sweep(text)


def test_temperatures_come_once_and_in_order() -> None:
    evaluation = EvaluationConfig(
        temperature=1.0, baseline_temperatures=(0.6, 1.0), sweep="0:1:0.5"
    )
    assert temperatures(evaluation, baseline=True) == (1.0, 0.6, 0.0, 0.5)
    assert temperatures(evaluation, baseline=False) == (1.0, 0.0, 0.5)


@pytest.mark.parametrize(
    "given",
    [
        {"temperature": 0.7000001},
        {"baseline_temperatures": (0.5, 0.7000001)},
        {"sweep": "0.7000001:0.7000001:1"},
    ],
)
def test_temperatures_that_would_share_a_file_are_refused(given: dict[str, Any]) -> None:
    config = RunConfig(evaluation=EvaluationConfig(**given))
    [problem] = evaluation_problems(config, "evaluate")
    assert problem.startswith(f"evaluation.{next(iter(given))}: found 0.7000001, expected at most")
    usual = EvaluationConfig(temperature=0.7, baseline_temperatures=(0.123456,), sweep="0:1.6:0.1")
    assert list(evaluation_problems(RunConfig(evaluation=usual), "evaluate")) == []


def test_a_bare_name_is_a_benchmark() -> None:
    config = RunConfig(
        data=DataConfig(folder="sets"),
        evaluation=EvaluationConfig(
            files=("math500", "gsm8k", "own.parquet", "./aime", "a/b.parquet")
        ),
    )
    assert benchmark_files(config) == (
        "sets/math500.parquet", "sets/gsm8k_test.parquet", "own.parquet", "./aime", "a/b.parquet",
    )  # fmt: skip
