"""Sampling held-out problems, grading the answers, and summing up per data source."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from osft_mcore.errors import DataError, GradingError
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.pass_at_k import ks_for, pass_at_k
from osft_mcore.evaluation.scorers import Grade, GradeStatus, Sample
from osft_mcore.evaluation.statistics import Interval, stratified_ci
from osft_mcore.records import Prompt, Response, Sampling

if TYPE_CHECKING:
    # Names torch; scoring does not need it.
    from osft_mcore.rollout.engine import RolloutEngine

EVALUATION_SEED_OFFSET = 1 << 31
"""Added to the run seed: training samples of the same step and row draw other numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One graded response, as kept in the run folder."""

    data_source: str
    prompt_id: str
    sample_index: int
    text: str
    ground_truth: str
    num_tokens: int
    truncated: bool
    score: float
    correct: bool
    """The score is above 0."""
    status: GradeStatus
    reason: str = ""
    """Why there is no grade."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceScores:
    """The scores of one data source."""

    data_source: str
    prompt_ids: tuple[str, ...]
    num_correct: tuple[int, ...]
    """Correct samples per problem, in the order of `prompt_ids`."""
    num_samples: int
    """Samples per problem."""
    response_length_mean: float
    """In tokens, as the two below where they apply."""
    response_length_max: int
    cut_off_ratio: float
    """Share of the responses that hit the token limit."""
    score_mean: float
    num_no_answer: int
    num_too_large: int
    num_timeouts: int
    num_errors: int

    @property
    def fractions_correct(self) -> tuple[float, ...]:
        """Share of correct samples per problem, in the order of `prompt_ids`."""
        return tuple(count / self.num_samples for count in self.num_correct)

    def pass_at(self, k: int) -> float:
        """Unbiased pass@k, mean over problems; k <= num_samples."""
        scores = [pass_at_k(self.num_samples, count, k) for count in self.num_correct]
        return sum(scores) / len(scores)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One pass over all held-out problems."""

    step: int
    temperature: float
    sources: tuple[SourceScores, ...]
    answers: tuple[Answer, ...]

    @property
    def pass_at_1(self) -> float:
        """Mean over data sources of the mean over their problems; sources weigh the same."""
        return sum(source.pass_at(1) for source in self.sources) / len(self.sources)


class Evaluator:
    """Scores whatever weights the engine holds on a fixed set of problems."""

    def __init__(
        self,
        engine: "RolloutEngine",
        problems: Mapping[str, Sequence[Prompt]],
        decode: Callable[[Sequence[int]], str],
        grader: Grader | None,
        *,
        num_samples: int,
        top_p: float,
        max_tokens: int,
        seed: int,
        max_ungraded_share: float,
    ) -> None:
        """`problems` by data source; `grader` on the one rank that grades, None on the others.

        `seed` is the run's. `max_ungraded_share` is the share of answers whose grading may time out
        or fail. Raises DataError if a source is empty or names a problem twice.
        """
        check_problems(problems)
        self._engine = engine
        self._problems = {source: tuple(prompts) for source, prompts in problems.items()}
        self._decode = decode
        self._grader = grader
        self._num_samples = num_samples
        self._top_p = top_p
        self._max_tokens = max_tokens
        self._seed = seed + EVALUATION_SEED_OFFSET
        self._max_ungraded_share = max_ungraded_share

    def run(self, step: int, temperature: float) -> Evaluation | None:
        """Sample and grade every problem. Collective over the world; None without a grader.

        At temperature 0 all samples of a problem would be equal, so that one is drawn.
        Raises GradingError if too many answers could not be graded.
        """
        num_samples = self._num_samples if temperature > 0 else 1
        sampling = Sampling(
            temperature=temperature,
            top_p=self._top_p,
            num_samples=num_samples,
            logprobs=False,
            max_tokens=self._max_tokens,
            seed=self._seed,
            step=step,
        )
        prompts = [prompt for group in self._problems.values() for prompt in group]
        responses = self._engine.generate(prompts, sampling)
        if self._grader is None:
            return None
        answers = self._grade(self._grader, responses)
        _refuse_ungraded(answers, self._max_ungraded_share)
        return self._evaluation(step, temperature, answers, num_samples)

    def recall(
        self, step: int, temperature: float, rows: Sequence[Mapping[str, Any]]
    ) -> Evaluation | None:
        """The evaluation whose answers, as dicts, were kept; not collective.

        None if they are not the answers to these problems, or of another number of samples.
        """
        num_samples = self._num_samples if temperature > 0 else 1
        try:
            answers = tuple(Answer(**row) for row in rows)
        except TypeError:
            return None
        found = Counter((a.data_source, a.prompt_id, a.ground_truth) for a in answers)
        expected = {
            (source, prompt.prompt_id, prompt.ground_truth): num_samples
            for source, prompts in self._problems.items()
            for prompt in prompts
        }
        if found != expected:
            return None
        return self._evaluation(step, temperature, answers, num_samples)

    def _evaluation(
        self, step: int, temperature: float, answers: tuple[Answer, ...], num_samples: int
    ) -> Evaluation:
        return Evaluation(
            step=step,
            temperature=temperature,
            sources=tuple(
                _sum_up(source, group, answers, num_samples)
                for source, group in self._problems.items()
            ),
            answers=answers,
        )

    def _grade(self, grader: Grader, responses: Sequence[Response]) -> tuple[Answer, ...]:
        texts = [self._decode(response.token_ids) for response in responses]
        grades = grader.grade(
            [
                Sample(text, response.prompt.ground_truth, len(response.token_ids))
                for response, text in zip(responses, texts, strict=True)
            ]
        )
        return tuple(
            _answer(response, text, grade)
            for response, text, grade in zip(responses, texts, grades, strict=True)
        )


def metrics(evaluation: Evaluation) -> dict[str, float]:
    """What one evaluation adds to the run's metrics."""
    values = {
        "eval/pass_at_1": evaluation.pass_at_1,
        "eval/temperature": evaluation.temperature,
    }
    for source in evaluation.sources:
        prefix = f"eval/{source.data_source}"
        values |= {f"{prefix}/pass@{k}": source.pass_at(k) for k in ks_for(source.num_samples)}
        values |= {
            f"{prefix}/response_length_mean": source.response_length_mean,
            f"{prefix}/response_length_max": source.response_length_max,
            f"{prefix}/cut_off_ratio": source.cut_off_ratio,
            f"{prefix}/score_mean": source.score_mean,
            f"{prefix}/no_answer": source.num_no_answer,
            f"{prefix}/too_large": source.num_too_large,
            f"{prefix}/timeouts": source.num_timeouts,
            f"{prefix}/errors": source.num_errors,
        }
    return values


def gain_ci(before: Evaluation, after: Evaluation, *, seed: int, level: float = 0.95) -> Interval:
    """Interval of after.pass_at_1 - before.pass_at_1, paired by problem, within each source."""
    olds, news = before.sources, after.sources
    if [old.prompt_ids for old in olds] != [new.prompt_ids for new in news]:
        raise ValueError("a gain needs two evaluations of the same problems in the same order")
    gains = [
        [b - a for a, b in zip(old.fractions_correct, new.fractions_correct, strict=True)]
        for old, new in zip(olds, news, strict=True)
    ]
    return stratified_ci(gains, seed=seed, level=level)


def check_problems(problems: Mapping[str, Sequence[Prompt]]) -> None:
    """Raise DataError if a source is empty or names a problem twice."""
    found = [] if problems else ["no evaluation problems: expected at least one data source"]
    for source, prompts in problems.items():
        assert all(prompt.data_source == source for prompt in prompts), (
            f"{source}: problems must be grouped by their own data source"
        )
        if not prompts:
            found.append(f"{source}: no problems, expected at least one (evaluation.files)")
        counts = Counter(prompt.prompt_id for prompt in prompts)
        twice = [prompt_id for prompt_id, count in counts.items() if count > 1]
        if twice:
            found.append(
                f"{source}: {len(twice)} problem ids are used more than once, such as "
                f"{twice[0]!r}; ids must be unique within a data source (evaluation.files)"
            )
    if found:
        raise DataError("\n".join(found))


def _answer(response: Response, text: str, grade: Grade) -> Answer:
    return Answer(
        data_source=response.prompt.data_source,
        prompt_id=response.prompt.prompt_id,
        sample_index=response.sample_index,
        text=text,
        ground_truth=response.prompt.ground_truth,
        num_tokens=len(response.token_ids),
        truncated=response.truncated,
        score=grade.score,
        correct=grade.correct,
        status=grade.status,
        reason=grade.reason,
    )


def _refuse_ungraded(answers: Sequence[Answer], max_share: float) -> None:
    ungraded = [answer for answer in answers if answer.status in ("timeout", "error")]
    if len(ungraded) <= max_share * len(answers):
        return
    counts = Counter(answer.status for answer in ungraded)
    first = ungraded[0]
    why = f" ({first.reason})" if first.reason else ""
    raise GradingError(
        f"{len(ungraded)} of {len(answers)} answers could not be graded "
        f"({counts['timeout']} timeouts, {counts['error']} errors), at most {max_share:.0%} may "
        f"(evaluation.max_ungraded_share). The first: {first.data_source}, problem "
        f"{first.prompt_id}, expected answer {first.ground_truth!r}, {first.status}{why}. "
        "Raise evaluation.grader_timeout_s, or correct the answers in evaluation.files or the "
        "function of evaluation.scorer."
    )


def _sum_up(
    data_source: str, prompts: Sequence[Prompt], answers: Sequence[Answer], num_samples: int
) -> SourceScores:
    own = [answer for answer in answers if answer.data_source == data_source]
    assert len(own) == len(prompts) * num_samples, (
        f"{data_source}: {len(own)} responses for {len(prompts)} problems x {num_samples} samples"
    )
    correct = Counter(answer.prompt_id for answer in own if answer.correct)
    statuses = Counter(answer.status for answer in own)
    lengths = [answer.num_tokens for answer in own]
    return SourceScores(
        data_source=data_source,
        prompt_ids=tuple(prompt.prompt_id for prompt in prompts),
        num_correct=tuple(correct[prompt.prompt_id] for prompt in prompts),
        num_samples=num_samples,
        response_length_mean=sum(lengths) / len(lengths),
        response_length_max=max(lengths),
        cut_off_ratio=sum(answer.truncated for answer in own) / len(own),
        score_mean=sum(answer.score for answer in own) / len(own),
        num_no_answer=statuses["no_answer"],
        num_too_large=statuses["too_large"],
        num_timeouts=statuses["timeout"],
        num_errors=statuses["error"],
    )
