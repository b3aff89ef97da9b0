"""The evaluator on a small engine whose answers are written down."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
from torch import Tensor

from osft_mcore.config.schema import EvaluationConfig
from osft_mcore.errors import DataError, GradingError
from osft_mcore.evaluation.evaluator import (
    EVALUATION_SEED_OFFSET,
    Evaluation,
    Evaluator,
    gain_ci,
    metrics,
)
from osft_mcore.evaluation.grading import Grader
from osft_mcore.records import Prompt, Response, Sampling

MAX_TOKENS = 12


@dataclass
class ScriptedEngine:
    """Answers sample s of a problem with its s-th scripted text, one token per character."""

    script: dict[str, list[str]]
    samplings: list[Sampling] = field(default_factory=list)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        self.samplings.append(sampling)
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
        max_ungraded_share=0.05,
    )


def evaluate(script: dict[str, list[str]], grader: Grader) -> Evaluation:
    evaluation = evaluator(ScriptedEngine(script), grader).run(step=3, temperature=1.0)
    assert evaluation is not None
    return evaluation


def test_scores_by_hand(grader: Grader) -> None:
    evaluation = evaluate(SCRIPT, grader)
    sums, products = evaluation.sources
    assert (sums.data_source, sums.prompt_ids) == ("sums", ("sums/0", "sums/1"))
    assert sums.num_correct == (2, 1)
    assert sums.fractions_correct == (0.5, 0.25)
    assert products.num_correct == (0,)
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
        "eval/sums/response_length_mean": pytest.approx(sum(lengths_sums) / 8),
        "eval/sums/response_length_max": 12,
        "eval/sums/cut_off_ratio": pytest.approx(1 / 8),
        "eval/sums/score_mean": pytest.approx(3 / 8),
        "eval/sums/no_answer": 1,
        "eval/sums/too_large": 0,
        "eval/sums/timeouts": 0,
        "eval/sums/errors": 0,
        "eval/products/pass@1": 0.0,
        "eval/products/pass@2": 0.0,
        "eval/products/pass@4": 0.0,
        "eval/products/response_length_mean": pytest.approx((3 * 9 + 7) / 4),
        "eval/products/response_length_max": 9,
        "eval/products/cut_off_ratio": 0.0,
        "eval/products/score_mean": 0.0,
        "eval/products/no_answer": 1,
        "eval/products/too_large": 0,
        "eval/products/timeouts": 0,
        "eval/products/errors": 0,
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
    evaluator(engine, grader).run(step=3, temperature=0.7)
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


def test_greedy_draws_one_sample(grader: Grader) -> None:
    engine = ScriptedEngine(SCRIPT)
    evaluation = evaluator(engine, grader).run(step=0, temperature=0.0)
    assert evaluation is not None
    assert engine.samplings[0].num_samples == 1
    assert [source.num_correct for source in evaluation.sources] == [(1, 0), (0,)]
    assert {name for name in metrics(evaluation) if "pass@" in name} == {
        "eval/sums/pass@1",
        "eval/products/pass@1",
    }


def test_a_rank_without_a_grader_takes_part_and_returns_none() -> None:
    engine = ScriptedEngine(SCRIPT)
    assert evaluator(engine, None).run(step=3, temperature=1.0) is None
    assert len(engine.samplings) == 1


def test_gain_is_paired_within_each_source(grader: Grader) -> None:
    better = SCRIPT | {"sums/0": [YES_4] * 4, "sums/1": [YES_9] * 3 + [NO]}
    before, after = evaluate(SCRIPT, grader), evaluate(better, grader)
    interval = gain_ci(before, after, seed=1)
    # Both sums gain 0.5, the product nothing: every resample gives (0.5 + 0) / 2.
    assert interval.low == interval.high == pytest.approx(0.25)
    assert after.pass_at_1 - before.pass_at_1 == pytest.approx(0.25)


def test_gain_needs_the_same_problems(grader: Grader) -> None:
    engine = ScriptedEngine(SCRIPT)
    part = evaluator(engine, grader, {"sums": PROBLEMS["sums"]}).run(step=3, temperature=1.0)
    assert part is not None
    with pytest.raises(ValueError, match="same problems"):
        gain_ci(evaluate(SCRIPT, grader), part, seed=1)


def test_too_many_ungraded_answers_stop_the_run(grader: Grader) -> None:
    unreadable = "1+" * 2000
    problems = {"sums": [prompt("sums", 0, "4"), prompt("sums", 1, unreadable)]}
    engine = ScriptedEngine({"sums/0": [YES_4], "sums/1": [NO]})
    with pytest.raises(GradingError, match=r"1 of 2 .* 1 errors.*max_ungraded_share.*sums/1.*4000"):
        evaluator(engine, grader, problems, num_samples=1).run(step=0, temperature=1.0)


def test_few_ungraded_answers_are_counted_as_not_correct(grader: Grader) -> None:
    unreadable = "1+" * 2000
    problems = {
        "sums": [*(prompt("sums", row, "4") for row in range(19)), prompt("sums", 19, unreadable)]
    }
    script = {f"sums/{row}": [YES_4] for row in range(20)}
    evaluation = evaluator(ScriptedEngine(script), grader, problems, num_samples=1).run(
        step=0, temperature=1.0
    )
    assert evaluation is not None
    assert evaluation.pass_at_1 == pytest.approx(0.95)
    assert metrics(evaluation)["eval/sums/errors"] == 1


def test_bad_problem_sets_are_reported_together() -> None:
    problems = {"sums": [prompt("sums", 0, "4"), prompt("sums", 0, "5")], "products": []}
    with pytest.raises(DataError) as caught:
        evaluator(ScriptedEngine({}), None, problems)
    assert "sums/0" in str(caught.value)
    assert "products: no problems" in str(caught.value)
