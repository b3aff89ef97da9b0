"""Scoring responses 0 or 1: string comparison first, then algebra in killable processes."""

import selectors
import sys
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Literal, Self

from osft_mcore.errors import GradingError
from osft_mcore.evaluation.answers import last_boxed, same_string, without_dollars
from osft_mcore.evaluation.worker_process import Event, Question, WorkerProcess

MAX_ANSWER_CHARS = 2000
"""Longer answers are compared as strings only. JSON of two such answers fits into a pipe."""

MAX_ASKED_PER_WORKER = 1000
"""Then the worker is replaced: the algebra system's caches only grow."""

MAX_ATTEMPTS = 2
"""Workers that one answer may lose, by any cause but its own timeout, before it is an error."""

MAX_FAILED_STARTS = 3

MAX_CACHED = 100_000

GradeStatus = Literal["ok", "no_answer", "timeout", "error"]


@dataclass(frozen=True, slots=True)
class Grade:
    """The score of one response."""

    correct: bool
    status: GradeStatus
    """`timeout` and `error` mean that nobody knows; they count as not correct."""


GRADE_OF: Mapping[Event, Grade] = MappingProxyType(
    {
        "correct": Grade(correct=True, status="ok"),
        "wrong": Grade(correct=False, status="ok"),
        "unreadable_gold": Grade(correct=False, status="error"),
        "died": Grade(correct=False, status="error"),
        "late": Grade(correct=False, status="timeout"),
    }
)


class Grader:
    """Grades the last boxed answer of responses. One caller at a time; no collective.

    Workers start at the first answer that needs algebra and end with `close`.
    """

    def __init__(self, num_workers: int, timeout_s: float) -> None:
        if num_workers < 1 or timeout_s <= 0:
            raise ValueError(
                f"need num_workers >= 1 and timeout_s > 0, got {num_workers=}, {timeout_s=}"
            )
        self._num_workers = num_workers
        self._timeout_s = timeout_s
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._cache: dict[Question, Grade] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def worker_pids(self) -> tuple[int, ...]:
        """Process ids of the running workers."""
        return tuple(worker.pid for worker in self._workers)

    def grade(self, pairs: Sequence[tuple[str, str]]) -> list[Grade]:
        """Score (response text, ground truth) pairs, in order.

        Takes at most about `timeout_s` per distinct hard answer and worker. Raises GradingError
        if no worker can be started.
        """
        drafts = [_grade_as_string(response, gold) for response, gold in pairs]
        questions = {draft: None for draft in drafts if isinstance(draft, Question)}
        new = [question for question in questions if question not in self._cache]
        if len(self._cache) + len(new) > MAX_CACHED:
            self._cache.clear()
            new = list(questions)
        self._cache |= self._ask_workers(new)
        return [self._cache[draft] if isinstance(draft, Question) else draft for draft in drafts]

    def close(self) -> None:
        """End the workers; a later `grade` starts new ones."""
        while self._workers:
            self._workers.pop().kill()

    def _ask_workers(self, questions: Sequence[Question]) -> dict[Question, Grade]:
        waiting = deque(questions)
        losses: Counter[Question] = Counter()
        grades: dict[Question, Grade] = {}
        try:
            while len(grades) < len(questions):
                self._hand_out(waiting)
                for worker, event in self._next_events():
                    question = worker.question
                    self._update(worker, event)
                    if question is None:
                        continue
                    losses[question] += event == "died"
                    if event == "died" and losses[question] < MAX_ATTEMPTS:
                        waiting.append(question)
                    else:
                        grades[question] = GRADE_OF[event]
        finally:
            # After an interrupt a late verdict would be taken for the next question's.
            for worker in [worker for worker in self._workers if worker.question is not None]:
                self._remove(worker)
        return grades

    def _hand_out(self, waiting: deque[Question]) -> None:
        """Give waiting questions to idle workers; start workers for the rest."""
        for worker in self._workers:
            if waiting and not worker.pending:
                worker.ask(waiting.popleft())
        num_free = sum(worker.question is None for worker in self._workers)
        num_missing = min(len(waiting) - num_free, self._num_workers - len(self._workers))
        self._workers += [WorkerProcess(self._timeout_s) for _ in range(num_missing)]

    def _next_events(self) -> list[tuple[WorkerProcess, Event]]:
        """Sleep until a worker speaks, dies or is late."""
        deadline = min(worker.deadline for worker in self._workers if worker.pending)
        # poll, not select: beside a rollout engine descriptors pass 1024.
        with selectors.PollSelector() as selector:
            for worker in self._workers:
                selector.register(worker, selectors.EVENT_READ)
            selector.select(max(0.0, deadline - time.monotonic()))
        heard = [(worker, worker.listen()) for worker in self._workers]
        return [(worker, event) for worker, event in heard if event is not None]

    def _update(self, worker: WorkerProcess, event: Event) -> None:
        if event == "ready":
            worker.ready = True
            self._failed_starts = 0
        elif event in ("died", "late"):
            self._remove(worker)
            self._failed_starts += not worker.ready
            if self._failed_starts == MAX_FAILED_STARTS:
                raise GradingError(
                    f"{MAX_FAILED_STARTS} grading workers in a row ended before they were ready. "
                    "Is math-verify installed, and 1 GiB of memory free? The reason is printed by: "
                    f"{sys.executable} -m osft_mcore.evaluation.grading_worker 5 < /dev/null"
                )
        else:
            worker.question = None
            if worker.num_asked >= MAX_ASKED_PER_WORKER:
                self._remove(worker)

    def _remove(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        worker.kill()


def _grade_as_string(response: str, ground_truth: str) -> Grade | Question:
    """The grade if spelling decides it, else the question to put to a worker."""
    answer = last_boxed(response)
    if answer is None:
        return Grade(correct=False, status="no_answer")
    gold = last_boxed(ground_truth) or ground_truth
    if max(len(answer), len(gold)) > MAX_ANSWER_CHARS:
        same: bool | None = answer.strip() == gold.strip()
        # A long answer to a short question is wrong; a long gold answer is beyond this grader.
        if not same and len(gold) > MAX_ANSWER_CHARS:
            return GRADE_OF["unreadable_gold"]
    else:
        same = same_string(answer, gold)
    if same is None:
        return Question(answer=without_dollars(answer), gold=without_dollars(gold))
    return GRADE_OF["correct" if same else "wrong"]
