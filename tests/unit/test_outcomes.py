"""What became of answers: four rates that add up, and shares of a part with their intervals."""

from itertools import product

import numpy as np
import pytest

from osft_mcore.evaluation.outcomes import Kind, outcome_of, rates
from osft_mcore.evaluation.results import Answer, Evaluation, SourceScores, metrics, report
from osft_mcore.evaluation.scorers import (
    Grade,
    GradeStatus,
    Sample,
    ScorerOptions,
    boxed_math,
    boxed_numeric,
    gsm8k,
)
from osft_mcore.evaluation.statistics import bootstrap_ci, ratio_ci

RIGHT, WRONG = Kind("correct", False), Kind("logic_error", False)
NO_FORMAT, UNKNOWN = Kind("format_error", False), Kind("ungraded", False)
CUT = Kind("format_error", True)
PROBLEMS = ((RIGHT, WRONG, CUT), (UNKNOWN, WRONG, NO_FORMAT), (CUT, CUT, CUT))
OPTIONS = ScorerOptions(max_tokens=10, overlong_buffer_tokens=0)


@pytest.mark.parametrize(
    ("grade", "outcome"),
    [
        (Grade(1.0, "ok"), "correct"),
        (Grade(0.0, "ok"), "logic_error"),
        (Grade(-1.0, "no_answer"), "format_error"),
        (Grade(0.0, "too_large"), "ungraded"),
        (Grade(0.0, "timeout"), "ungraded"),
        (Grade(0.0, "error"), "ungraded"),
    ],
)
def test_every_grade_is_one_of_four(grade: Grade, outcome: str) -> None:
    assert outcome_of(grade) == outcome


def test_rates_by_hand() -> None:
    found = {name: rate.value for name, rate in rates(PROBLEMS, tells_format=True).items()}
    assert found == {
        "correct": pytest.approx(1 / 9),
        "format_error": pytest.approx(5 / 9),
        "logic_error": pytest.approx(2 / 9),
        "ungraded": pytest.approx(1 / 9),
        # Of five that are not truncated, the one that is ungraded among them.
        "format_error_given_not_truncated": pytest.approx(1 / 5),
        # The ungraded one is none of them.
        "correct_given_parsed": pytest.approx(1 / 3),
        "logic_error_given_parsed": pytest.approx(2 / 3),
    }


def test_whatever_becomes_of_answers_the_four_rates_add_up() -> None:
    rng = np.random.default_rng(0)
    kinds = (RIGHT, WRONG, NO_FORMAT, UNKNOWN, CUT)
    for _ in range(20):
        problems = [[kinds[i] for i in rng.integers(5, size=4)] for _ in range(6)]
        found = rates(problems, tells_format=True)
        four = [found[name].value for name in ("correct", "format_error", "logic_error")]
        assert sum(value or 0 for value in four) + (found["ungraded"].value or 0) == (
            pytest.approx(1)
        )


def test_a_scorer_that_only_gives_numbers_tells_no_format_errors() -> None:
    assert list(rates(PROBLEMS, tells_format=False)) == ["correct", "ungraded"]


def test_the_interval_of_a_ratio_redraws_problems_and_adds_up_both_sums() -> None:
    over, under = [1.0, 0.0, 4.0, 2.0], [2.0, 0.0, 4.0, 3.0]
    ratios = [
        sum(over[i] for i in draw) / sum(under[i] for i in draw)
        for draw in product(range(4), repeat=4)
        if any(under[i] for i in draw)
    ]
    found = ratio_ci(over, under, seed=1, num_resamples=200_000, level=0.8)
    assert found is not None
    for bound, tail in ((found.low, 0.1), (found.high, 0.9)):
        below = np.mean([ratio < bound - 1e-9 for ratio in ratios])
        up_to = np.mean([ratio < bound + 1e-9 for ratio in ratios])
        assert below - 0.003 <= tail <= up_to + 0.003


def test_with_equal_denominators_it_is_the_interval_of_a_mean() -> None:
    values = np.random.default_rng(0).integers(5, size=300).tolist()
    ratio = ratio_ci(values, [4] * 300, seed=7)
    mean = bootstrap_ci([value / 4 for value in values], seed=7)
    assert ratio is not None
    assert (ratio.low, ratio.high) == (pytest.approx(mean.low), pytest.approx(mean.high))


def test_of_nothing_there_is_no_ratio() -> None:
    assert ratio_ci([0, 0], [0, 0], seed=1) is None


def answer(problem: int, *, status: GradeStatus, score: float = 0.0, cut: bool = False) -> Answer:
    return Answer(
        data_source="sums", prompt_id=f"p{problem}", sample_index=0, text="", ground_truth="4",
        prediction="", num_tokens=7, truncated=cut, score=score, correct=score > 0, status=status,
    )  # fmt: skip


def evaluation(*answers: Answer, tells_format: bool = True) -> Evaluation:
    problems = tuple((answer,) for answer in answers)
    source = SourceScores(
        data_source="sums", problems=problems, num_asked=1, tells_format=tells_format
    )
    return Evaluation(step=0, temperature=1.0, sources=(source,))


def test_a_result_has_every_rate_with_its_interval() -> None:
    found = evaluation(
        answer(0, status="ok", score=1.0), answer(1, status="ok"),
        answer(2, status="no_answer", cut=True), answer(3, status="timeout"),
    )  # fmt: skip
    benchmark = report(found, dropped={}, seed=1)["benchmarks"]["sums"]
    outcomes = benchmark["outcomes"]
    four = ("correct", "format_error", "logic_error", "ungraded")
    assert [outcomes[name]["value"] for name in four] == [0.25] * 4
    assert outcomes["correct_given_parsed"]["value"] == 0.5
    for rate in (*outcomes.values(), {"value": 0.25, "ci95": benchmark["cut_off_ratio_ci95"]}):
        low, high = rate["ci95"]
        assert 0 <= low <= rate["value"] <= high <= 1
    assert outcomes["correct"]["ci95"] == pytest.approx(benchmark["pass@k"]["1"]["ci95"])


def test_a_share_of_nothing_is_null_in_the_result_and_absent_from_the_metrics() -> None:
    found = evaluation(answer(0, status="no_answer", cut=True), answer(1, status="error"))
    outcomes = report(found, dropped={}, seed=1)["benchmarks"]["sums"]["outcomes"]
    assert outcomes["correct_given_parsed"] == {"value": None, "ci95": None}
    names = set(metrics(found))
    assert "eval/sums/logic_error_given_parsed" not in names
    assert {"eval/sums/format_error", "eval/sums/ungraded"} <= names


def test_metrics_of_a_scorer_from_a_file_claim_nothing_about_the_format() -> None:
    found = metrics(evaluation(answer(0, status="ok"), tells_format=False))
    assert {name for name in found if "error" in name} == {"eval/sums/errors"}


@pytest.mark.parametrize(
    ("scorer", "text"),
    [
        (boxed_math, r"so \boxed{ }"),
        (boxed_numeric, r"so \boxed{seven}"),
        (gsm8k, "so #### ,"),
        (gsm8k, "so 7"),
    ],
)
def test_what_holds_no_final_answer_is_a_format_error(scorer: object, text: str) -> None:
    assert callable(scorer)
    grade = scorer(Sample(text, "7"), OPTIONS)
    assert outcome_of(grade) == "format_error"
