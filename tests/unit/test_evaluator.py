"""The evaluator on a small engine whose answers are written down."""

import dataclasses
import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.errors import DataError, GradingError
from osft_mcore.evaluation.evaluator import EVALUATION_SEED_OFFSET, Evaluator, read_answers
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.results import Answer, Evaluation, compare, metrics, report
from osft_mcore.evaluation.scorers import Grade, Sample
from osft_mcore.records import Prompt, Response, Sampling

MAX_TOKENS = 12


@dataclass
class ScriptedEngine:
    """Answers sample s of a problem with its s-th scripted text, one token per character."""

    script: dict[str, list[str]]
    samplings: list[Sampling] = field(default_factory=list)
    num_prompts: list[int] = field(default_factory=list)
    last: Sequence[Prompt] = ()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        self.samplings.append(sampling)
        self.num_prompts.append(len(prompts))
        self.last = prompts
        return [
            self._response(prompt, sample, sampling.max_tokens)
            for prompt in prompts
            for sample in range(sampling.num_samples)
        ]

    def _response(self, prompt: Prompt, sample: int, max_tokens: int) -> Response:
        text = self.script[prompt.prompt_id][sample]
        return Response(
            prompt=prompt,
            sample_index=sample,
            token_ids=tuple(map(ord, text[:max_tokens])),
            token_logprobs=(0.0,) * min(len(text), max_tokens),
            truncated=len(text) > max_tokens,
            weight_version=0,
            replica=0,
        )

    def begin_update(self) -> dict[str, Tensor]:
        raise AssertionError("an evaluation changes no weights")

    def finish_update(self, version: int) -> None:
        raise AssertionError("an evaluation changes no weights")


def decode(token_ids: Sequence[int]) -> str:
    return "".join(map(chr, token_ids))


def prompt(source: str, row: int, gold: str) -> Prompt:
    return Prompt(
        row=row,
        prompt_id=f"{source}/{row}",
        data_source=source,
        text="?",
        token_ids=(1,),
        ground_truth=gold,
    )


PROBLEMS = {
    "sums": [prompt("sums", 0, "4"), prompt("sums", 1, "9")],
    "products": [prompt("products", 0, "6")],
}
YES_4, YES_9, NO = r"\boxed{4}", r"\boxed{9}", r"\boxed{0}"
SCRIPT = {
    "sums/0": [YES_4, NO, YES_4, NO],
    "sums/1": [NO, NO, YES_9, "I do not know the answer"],
    "products/0": [NO, NO, NO, "nothing"],
}


@pytest.fixture
def grader() -> Iterator[Grader]:
    with Grader(EvaluationConfig(grader_timeout_s=60.0), MAX_TOKENS) as grader:
        yield grader


def evaluator(
    engine: ScriptedEngine,
    grader: Grader | None,
    problems: dict[str, list[Prompt]] = PROBLEMS,
    num_samples: int = 4,
    portion: int = 1000,
) -> Evaluator:
    return Evaluator(
        engine,
        problems,
        decode,
        grader,
        num_samples=num_samples,
        top_p=0.9,
        max_tokens=MAX_TOKENS,
        seed=7,
        portion=portion,
        scorer="boxed_math",
        max_ungraded_share=0.05,
    )


def result(evaluator: Evaluator, *, step: int = 3, temperature: float = 1.0) -> Evaluation:
    answers: list[Answer] = []
    for portion in evaluator.graded(step, temperature):
        assert portion.answers is not None
        answers += portion.answers
    evaluation = evaluator.evaluation(step, temperature, answers)
    assert evaluation is not None
    return evaluation


def evaluate(script: dict[str, list[str]], grader: Grader) -> Evaluation:
    return result(evaluator(ScriptedEngine(script), grader))


def test_scores_by_hand(grader: Grader) -> None:
    evaluation = evaluate(SCRIPT, grader)
    sums, products = evaluation.sources
    assert (sums.data_source, sums.prompt_ids) == ("sums", ("sums/0", "sums/1"))
    assert sums.pass_values(1) == pytest.approx([0.5, 0.25])
    assert products.pass_values(1) == [0.0]
    # Mean over sources of (mean over problems): (3/8 + 0) / 2, not 3 / 12.
    assert evaluation.pass_at_1 == pytest.approx(3 / 16)
    # n=4: c=2 -> 1 - 1/6, c=1 -> 1 - 3/6.
    assert sums.pass_at(2) == pytest.approx((5 / 6 + 1 / 2) / 2)
    assert sums.pass_at(4) == 1.0


def test_metrics_by_hand(grader: Grader) -> None:
    lengths_sums = [9, 9, 9, 9, 9, 9, 9, 12]
    assert metrics(evaluate(SCRIPT, grader)) == {
        "eval/pass_at_1": pytest.approx(3 / 16),
        "eval/temperature": 1.0,
        "eval/sums/pass@1": pytest.approx(3 / 8),
        "eval/sums/pass@2": pytest.approx(2 / 3),
        "eval/sums/pass@4": 1.0,
        # "4" and "0" twice each, the first one is right; "0" wins against "9".
        "eval/sums/maj@4": pytest.approx(1 / 2),
        "eval/products/maj@4": 0.0,
        "eval/sums/response_length_mean": pytest.approx(sum(lengths_sums) / 8),
        "eval/sums/response_length_min": 9,
        "eval/sums/response_length_max": 12,
        "eval/sums/cut_off_ratio": pytest.approx(1 / 8),
        "eval/sums/score_mean": pytest.approx(3 / 8),
        "eval/sums/no_answer": 1,
        "eval/sums/too_large": 0,
        "eval/sums/timeouts": 0,
        "eval/sums/errors": 0,
        "eval/sums/format_error": pytest.approx(1 / 8),
        "eval/sums/logic_error": pytest.approx(4 / 8),
        "eval/sums/ungraded": 0.0,
        # The one without an answer is the one that was cut off.
        "eval/sums/format_error_given_not_truncated": 0.0,
        "eval/sums/correct_given_parsed": pytest.approx(3 / 7),
        "eval/sums/logic_error_given_parsed": pytest.approx(4 / 7),
        "eval/products/pass@1": 0.0,
        "eval/products/pass@2": 0.0,
        "eval/products/pass@4": 0.0,
        "eval/products/response_length_mean": pytest.approx((3 * 9 + 7) / 4),
        "eval/products/response_length_min": 7,
        "eval/products/response_length_max": 9,
        "eval/products/cut_off_ratio": 0.0,
        "eval/products/score_mean": 0.0,
        "eval/products/no_answer": 1,
        "eval/products/too_large": 0,
        "eval/products/timeouts": 0,
        "eval/products/errors": 0,
        "eval/products/format_error": 0.25,
        "eval/products/logic_error": 0.75,
        "eval/products/ungraded": 0.0,
        "eval/products/format_error_given_not_truncated": 0.25,
        "eval/products/correct_given_parsed": 0.0,
        "eval/products/logic_error_given_parsed": 1.0,
    }


def test_every_answer_is_kept(grader: Grader) -> None:
    answers = evaluate(SCRIPT, grader).answers
    assert [(a.prompt_id, a.sample_index, a.correct) for a in answers] == [
        (prompt_id, sample, text in (YES_4, YES_9))
        for prompt_id, texts in SCRIPT.items()
        for sample, text in enumerate(texts)
    ]
    cut = answers[7]
    assert (cut.text, cut.status, cut.truncated) == ("I do not kno", "no_answer", True)
    assert (cut.ground_truth, cut.num_tokens, cut.data_source) == ("9", MAX_TOKENS, "sums")


def test_sampling_is_one_call_with_seeds_of_its_own(grader: Grader) -> None:
    engine = ScriptedEngine(SCRIPT)
    result(evaluator(engine, grader), temperature=0.7)
    (sampling,) = engine.samplings
    assert sampling == Sampling(
        temperature=0.7,
        top_p=0.9,
        num_samples=4,
        logprobs=False,
        max_tokens=MAX_TOKENS,
        seed=7 + EVALUATION_SEED_OFFSET,
        step=3,
    )


def test_greedy_draws_one_sample_which_all_the_others_would_be(grader: Grader) -> None:
    engine = ScriptedEngine(SCRIPT)
    evaluation = result(evaluator(engine, grader), temperature=0.0)
    assert engine.samplings[0].num_samples == 1
    assert [source.pass_values(1) for source in evaluation.sources] == [[1.0, 0.0], [0.0]]
    found = {name: value for name, value in metrics(evaluation).items() if "pass@" in name}
    sums = {f"eval/sums/pass@{k}": 0.5 for k in (1, 2, 4)}
    assert found == sums | {f"eval/products/pass@{k}": 0.0 for k in (1, 2, 4)}


def test_a_rank_without_a_grader_takes_part_and_returns_none() -> None:
    engine = ScriptedEngine(SCRIPT)
    portions = list(evaluator(engine, None, portion=4).graded(3, 1.0))
    assert [(p.number, p.answers) for p in portions] == [(0, None), (1, None), (2, None)]
    assert [len(portion.responses) for portion in portions] == [4, 4, 4]
    assert len(engine.samplings) == 3


@pytest.mark.parametrize("portion", [1, 8, 11, 12])
def test_portions_change_nothing(grader: Grader, portion: int) -> None:
    """Whole problems, at least one: with 4 samples each 1, 2, 2 and 3 of them."""
    engine = ScriptedEngine(SCRIPT)
    cut = evaluator(engine, grader, portion=portion)
    assert result(cut) == evaluate(SCRIPT, grader)
    sizes = {1: [1, 1, 1], 8: [2, 1], 11: [2, 1], 12: [3]}[portion]
    assert engine.num_prompts == sizes
    assert cut.num_portions(1.0) == len(sizes)


def test_portions_that_are_there_are_left_out(grader: Grader) -> None:
    engine = ScriptedEngine(SCRIPT)
    cut = evaluator(engine, grader, portion=4)
    assert [portion.number for portion in cut.graded(3, 1.0, skip={0, 1})] == [2]
    assert [prompt.prompt_id for prompt in engine.last] == ["products/0"]


def test_one_portion_is_graded_while_the_next_is_sampled(grader: Grader) -> None:
    """The second call of the engine returns only when the first portion's grading has begun."""
    begun = threading.Event()

    class Watched(Grader):
        def grade(self, samples: Sequence[Sample]) -> list[Grade]:
            begun.set()
            return grader.grade(samples)

    class Waiting(ScriptedEngine):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
            if self.samplings:
                assert begun.wait(timeout=60), "grading waited for sampling"
            return super().generate(prompts, sampling)

    watched = Watched(EvaluationConfig(grader_timeout_s=60.0), MAX_TOKENS)
    found = result(evaluator(Waiting(SCRIPT), watched, portion=4))
    assert found == evaluate(SCRIPT, grader)


def test_kept_answers_make_the_same_evaluation(grader: Grader) -> None:
    there = evaluator(ScriptedEngine(SCRIPT), grader)
    found = result(there)
    rows = [json.loads(json.dumps(dataclasses.asdict(answer))) for answer in found.answers]
    assert there.evaluation(3, 1.0, read_answers(rows)) == found
    # One missing, one of another problem, of a greedy pass, of another format.
    assert there.evaluation(3, 1.0, read_answers(rows[1:])) is None
    other = [rows[0] | {"ground_truth": "5"}, *rows[1:]]
    assert there.evaluation(3, 1.0, read_answers(other)) is None
    assert there.evaluation(3, 0.0, read_answers(rows)) is None
    assert read_answers([{"text": "of an earlier version"}]) == ()


def test_a_report_by_hand(grader: Grader) -> None:
    found = report(evaluate(SCRIPT, grader), dropped={"sums": 5}, seed=1)
    assert (found["step"], found["temperature"], found["num_samples"]) == (3, 1.0, 4)
    assert found["pass_at_1"]["value"] == pytest.approx(3 / 16)
    # One problem is redrawn for itself; two are from both the worse to both the better.
    assert found["pass_at_1"]["ci95"] == pytest.approx([1 / 8, 1 / 4])
    assert found["pass@k"]["1"] == found["pass_at_1"]
    assert found["pass@k"]["4"]["value"] == pytest.approx(1 / 2)
    # Nobody has a right product; both sums are solved by four tries.
    assert found["pass@k"]["4"]["ci95"] == pytest.approx([1 / 2, 1 / 2])
    assert found["headline"] == {"pass@1": pytest.approx(3 / 16), "average": pytest.approx(3 / 16)}
    sums = found["benchmarks"]["sums"]
    assert (sums["num_problems"], sums["num_answers"], sums["num_dropped_overlong"]) == (2, 8, 5)
    assert found["benchmarks"]["products"]["num_dropped_overlong"] == 0
    assert [sums["pass@k"][k]["value"] for k in "124"] == pytest.approx([3 / 8, 2 / 3, 1.0])
    assert sums["pass@k"]["1"]["ci95"] == pytest.approx([1 / 4, 1 / 2])
    assert sums["avg@4"]["value"] == pytest.approx(3 / 8)
    assert sums["maj@4"]["value"] == pytest.approx(1 / 2)
    assert [sums["best@k"][k] for k in "124"] == pytest.approx([3 / 8, 2 / 3, 1.0])
    # Of two drawn from 2 right and 2 wrong both are right once in six; never all of four.
    assert [sums["worst@k"][k] for k in "124"] == pytest.approx([3 / 8, 1 / 12, 0.0])
    assert sums["response_length"] == {
        "mean": pytest.approx(75 / 8), "median": 9, "p95": pytest.approx(10.95), "min": 9,
        "max": 12,
    }  # fmt: skip
    assert (sums["no_answer"], sums["timeouts"], sums["cut_off_ratio"]) == (1, 0, 1 / 8)
    json.dumps(found)


def test_gain_is_paired_within_each_source(grader: Grader) -> None:
    better = SCRIPT | {"sums/0": [YES_4] * 4, "sums/1": [YES_9] * 3 + [NO]}
    before, after = evaluate(SCRIPT, grader), evaluate(better, grader)
    found = compare(before, after, k=1, seed=1)
    # Both sums gain 0.5, the product nothing: every resample gives (0.5 + 0) / 2.
    assert found.interval.low == found.interval.high == pytest.approx(0.25)
    assert found.gain == pytest.approx(after.pass_at_1 - before.pass_at_1)
    # Of the four choices of two signs two reach it.
    assert found.p_value == pytest.approx(0.5, abs=0.02)
    assert compare(before, after, k=4, seed=1).gain == 0.0


def test_gain_needs_the_same_problems(grader: Grader) -> None:
    engine = ScriptedEngine(SCRIPT)
    part = result(evaluator(engine, grader, {"sums": PROBLEMS["sums"]}))
    with pytest.raises(ValueError, match="same problems"):
        compare(evaluate(SCRIPT, grader), part, k=1, seed=1)


def test_too_many_ungraded_answers_stop_the_run(grader: Grader) -> None:
    unreadable = "1+" * 2000
    problems = {"sums": [prompt("sums", 0, "4"), prompt("sums", 1, unreadable)]}
    engine = ScriptedEngine({"sums/0": [YES_4], "sums/1": [NO]})
    with pytest.raises(GradingError, match=r"1 of 2 .* 1 errors.*max_ungraded_share.*sums/1.*4000"):
        result(evaluator(engine, grader, problems, num_samples=1))


def test_few_ungraded_answers_are_counted_as_not_correct(grader: Grader) -> None:
    unreadable = "1+" * 2000
    problems = {
        "sums": [*(prompt("sums", row, "4") for row in range(19)), prompt("sums", 19, unreadable)]
    }
    script = {f"sums/{row}": [YES_4] for row in range(20)}
    evaluation = result(evaluator(ScriptedEngine(script), grader, problems, num_samples=1))
    assert evaluation.pass_at_1 == pytest.approx(0.95)
    assert metrics(evaluation)["eval/sums/errors"] == 1


def test_bad_problem_sets_are_reported_together() -> None:
    problems = {"sums": [prompt("sums", 0, "4"), prompt("sums", 0, "5")], "products": []}
    with pytest.raises(DataError) as caught:
        evaluator(ScriptedEngine({}), None, problems)
    assert "sums/0" in str(caught.value)
    assert "products: no problems" in str(caught.value)
