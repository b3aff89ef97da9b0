"""Sampling held-out problems, and grading one portion of answers while the next is sampled."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from osft_mcore.errors import DataError, GradingError
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.results import Answer, Evaluation, SourceScores, by_problem
from osft_mcore.evaluation.scorers import SCORERS, Grade, Sample, final_answer
from osft_mcore.records import Prompt, Response, Sampling, ground_truth_of

if TYPE_CHECKING:
    # Names torch; scoring does not need it.
    from osft_mcore.rollout.engine import RolloutEngine

EVALUATION_SEED_OFFSET = 1 << 31
"""Added to the run seed: training samples of the same step and row draw other numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Some whole problems of an evaluation, sampled and graded."""

    number: int
    responses: Sequence[Response]
    """On every rank."""
    answers: tuple[Answer, ...] | None
    """None on ranks that do not grade."""


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
        portion: int,
        scorer: str,
        max_ungraded_share: float,
    ) -> None:
        """`problems` by data source; `grader` on the one rank that grades, None on the others.

        `seed` is the run's. `portion`: answers that are sampled in one call of the engine.
        `max_ungraded_share` is the share of answers whose grading may time out or fail. Raises
        DataError if a source is empty or names a problem twice.
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
        self._portion, self._scorer = portion, scorer
        self._max_ungraded_share = max_ungraded_share

    def num_portions(self, temperature: float) -> int:
        """Into which `graded` cuts the work."""
        return len(self._portions(temperature))

    def graded(
        self, step: int, temperature: float, *, skip: Collection[int] = ()
    ) -> Iterator[Portion]:
        """Sample and grade every portion that is not in `skip`, in order.

        One is graded, by another thread and its workers, while the next is sampled. A sample's
        random numbers are its own: how problems are cut into portions changes none. At
        temperature 0 all samples of a problem would be equal, so that one is drawn.
        Collective over the world, `skip` alike on every rank. Raises GradingError as soon as too
        many answers could not be graded.
        """
        sampling = Sampling(
            temperature=temperature,
            top_p=self._top_p,
            num_samples=self._drawn(temperature),
            logprobs=False,
            max_tokens=self._max_tokens,
            seed=self._seed,
            step=step,
        )
        under_way: _UnderWay | None = None
        ungraded: list[Answer] = []
        with ThreadPoolExecutor(max_workers=1) as pool:
            for number, prompts in enumerate(self._portions(temperature)):
                if number in skip:
                    continue
                responses = self._engine.generate(prompts, sampling)
                if under_way is not None:
                    yield self._finished(under_way, ungraded, temperature)
                future = None
                if self._grader is not None:
                    future = pool.submit(self._grade, self._grader, responses)
                under_way = number, responses, future
            if under_way is not None:
                yield self._finished(under_way, ungraded, temperature)

    def evaluation(
        self, step: int, temperature: float, answers: Sequence[Answer]
    ) -> Evaluation | None:
        """The evaluation that has these answers; not collective.

        None if they are not the answers to these problems, or of another number of samples.
        """
        drawn = self._drawn(temperature)
        found = Counter((a.data_source, a.prompt_id, a.ground_truth) for a in answers)
        expected = {
            (source, prompt.prompt_id, prompt.ground_truth): drawn
            for source, prompts in self._problems.items()
            for prompt in prompts
        }
        if found != expected:
            return None
        grouped = by_problem(answers)
        return Evaluation(
            step=step,
            temperature=temperature,
            sources=tuple(
                SourceScores(
                    data_source=source,
                    problems=tuple(grouped[source, prompt.prompt_id] for prompt in prompts),
                    num_asked=self._num_samples,
                    tells_format=self._scorer in SCORERS,
                )
                for source, prompts in self._problems.items()
            ),
        )

    def _drawn(self, temperature: float) -> int:
        return self._num_samples if temperature > 0 else 1

    def _portions(self, temperature: float) -> list[list[Prompt]]:
        prompts = [prompt for group in self._problems.values() for prompt in group]
        size = max(1, self._portion // self._drawn(temperature))
        return [prompts[start : start + size] for start in range(0, len(prompts), size)]

    def _finished(
        self,
        under_way: "_UnderWay",
        ungraded: list[Answer],
        temperature: float,
    ) -> Portion:
        number, responses, future = under_way
        if future is None:
            return Portion(number=number, responses=responses, answers=None)
        answers = future.result()
        ungraded += [answer for answer in answers if answer.status in ("timeout", "error")]
        total = sum(map(len, self._problems.values())) * self._drawn(temperature)
        _refuse_ungraded(ungraded, total, self._max_ungraded_share)
        return Portion(number=number, responses=responses, answers=answers)

    def _grade(self, grader: Grader, responses: Sequence[Response]) -> tuple[Answer, ...]:
        texts = [self._decode(response.token_ids) for response in responses]
        grades = grader.grade(
            [
                Sample(text, response.prompt.ground_truth, len(response.token_ids))
                for response, text in zip(responses, texts, strict=True)
            ]
        )
        return tuple(
            _answer(response, text, grade, self._scorer)
            for response, text, grade in zip(responses, texts, grades, strict=True)
        )


_UnderWay = tuple[int, Sequence[Response], Future[tuple[Answer, ...]] | None]


def read_answers(rows: Sequence[Mapping[str, Any]]) -> tuple[Answer, ...]:
    """Answers as they were kept; () if one of them is none."""
    try:
        return tuple(
            Answer(**{**row, "ground_truth": ground_truth_of(row["ground_truth"])}) for row in rows
        )
    except (KeyError, TypeError):
        return ()


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


def _answer(response: Response, text: str, grade: Grade, scorer: str) -> Answer:
    return Answer(
        data_source=response.prompt.data_source,
        prompt_id=response.prompt.prompt_id,
        sample_index=response.sample_index,
        text=text,
        ground_truth=response.prompt.ground_truth,
        prediction=final_answer(text, scorer),
        num_tokens=len(response.token_ids),
        truncated=response.truncated,
        score=grade.score,
        correct=grade.correct,
        status=grade.status,
        reason=grade.reason,
    )


def _refuse_ungraded(ungraded: Sequence[Answer], num_answers: int, max_share: float) -> None:
    if len(ungraded) <= max_share * num_answers:
        return
    counts = Counter(answer.status for answer in ungraded)
    first = ungraded[0]
    why = f" ({first.reason})" if first.reason else ""
    raise GradingError(
        f"{len(ungraded)} of {num_answers} answers could not be graded "
        f"({counts['timeout']} timeouts, {counts['error']} errors), at most {max_share:.0%} may "
        f"(evaluation.max_ungraded_share). The first: {first.data_source}, problem "
        f"{first.prompt_id}, expected answer {first.ground_truth!r}, {first.status}{why}. "
        "Raise evaluation.grader_timeout_s, or correct the answers in evaluation.files or the "
        "function of evaluation.scorer."
    )
