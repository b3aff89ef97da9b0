"""Verdicts of the reference verifier, and of the benchmarks' own answers."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.scorers import Sample

ORACLE = json.loads((Path(__file__).parents[1] / "golden" / "verifier_oracle.json").read_text())
"""50 pairs that a verifier in three stages was run on, with and without math-verify."""

BENCHMARKS = Path(__file__).resolve().parents[3] / "shared" / "data" / "benchmarks"
"""Beside a checkout; may not be passed on with it."""
ROWS = {
    "math500": 500,
    "amc23": 40,
    "amc": 83,
    "aime": 30,
    "aime25": 30,
    "olympiadbench": 675,
    "minerva": 272,
}


def sample(pair: dict[str, object]) -> Sample:
    response, gold = str(pair["response"]), pair["gt"]
    if response.endswith("..."):
        # The file abridges this pair: an equal long run of ones, in a box that is closed.
        response, gold = rf"\boxed{{{'1' * 300}}}", "1" * 300
    return Sample(response, gold)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("scorer", "key"), [("boxed_math", "score"), ("boxed_math_fast", "score_fast")]
)
def test_the_reference_verdicts(scorer: str, key: str) -> None:
    config = EvaluationConfig(grader_workers=2, grader_timeout_s=60.0, scorer=scorer)
    with Grader(config, max_response_tokens=100) as grader:
        grades = grader.grade([sample(pair) for pair in ORACLE])
    assert len(grades) == 50
    assert [
        (pair, grade)
        for pair, grade in zip(ORACLE, grades, strict=True)
        if grade.score != pair[key] or grade.status not in ("ok", "no_answer")
    ] == []


@pytest.mark.parametrize("name", ROWS)
def test_every_expected_answer_of_a_benchmark_is_right(name: str) -> None:
    file = BENCHMARKS / f"{name}.parquet"
    if not file.is_file():
        pytest.skip("the benchmark files may not be passed on, and are not beside this checkout")
    golds = [row["ground_truth"] for row in pq.read_table(file)["reward_model"].to_pylist()]
    assert len(golds) == ROWS[name]
    for scorer in ("boxed_math", "boxed_math_fast"):
        with Grader(EvaluationConfig(scorer=scorer), max_response_tokens=100) as grader:
            grades = grader.grade([Sample(rf"It is \boxed{{{gold}}}.", gold) for gold in golds])
            wrong = [gold for gold, grade in zip(golds, grades, strict=True) if grade.score != 1]
            assert wrong == []
            # So it is at no cost.
            assert grader.worker_pids == ()
