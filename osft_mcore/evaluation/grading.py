"""Scoring responses: spelling first, then algebra or a user's function in killable processes."""

import os
import selectors
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from osft_mcore.config.schema_evaluation import EvaluationConfig
from osft_mcore.errors import GradingError
from osft_mcore.evaluation.judges import Reply
from osft_mcore.evaluation.scorers import (
    SCORERS,
    Grade,
    Question,
    Sample,
    ScorerOptions,
    from_file,
)
from osft_mcore.evaluation.worker_process import START_TIMEOUT_S, WorkerProcess

MAX_ATTEMPTS = 2
"""Workers that one answer may lose, by any cause but its own timeout, before it is an error."""

MAX_FAILED_STARTS = 3

MAX_CACHED = 100_000


class Grader:
    """Scores responses by `evaluation.scorer`. Safe to call from several threads; no collective.

    Workers start at the first answer that spelling does not decide, and end with `close`.
    """

    def __init__(self, config: EvaluationConfig, max_response_tokens: int) -> None:
        self._scorer = SCORERS.get(config.scorer, from_file)
        self._options = ScorerOptions(
            max_tokens=max_response_tokens,
            overlong_buffer_tokens=config.overlong_buffer_tokens,
        )
        self._judge = config.scorer if config.scorer in SCORERS else _absolute(config.scorer)
        self._config = config
        self._workers: list[WorkerProcess] = []
        self._failed_starts = 0
        self._cache: dict[Question, Grade] = {}
        self._lock = threading.Lock()
        self._owner = os.getpid()

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
        """Process ids of the running workers; each has a child that judges."""
        return tuple(worker.pid for worker in self._workers)

    def grade(self, samples: Sequence[Sample]) -> list[Grade]:
        """Score responses, in order.

        Takes at most about `evaluation.grader_timeout_s` per distinct hard answer and worker.
        Raises GradingError if no worker can be started.
        """
        drafts = [self._scorer(sample, self._options) for sample in samples]
        questions = {draft: None for draft in drafts if isinstance(draft, Question)}
        self._leave_workers_of_another_process()
        with self._lock:
            new = [question for question in questions if question not in self._cache]
            if len(self._cache) + len(new) > MAX_CACHED:
                self._cache.clear()
                new = list(questions)
            self._cache |= self._ask_workers(new)
            return [
                self._cache[draft] if isinstance(draft, Question) else draft for draft in drafts
            ]

    def check(self) -> None:
        """Raise GradingError if the workers cannot load a scorer from a file."""
        if self._scorer is from_file:
            with self._lock:
                self._workers.append(self._new_worker())
                while not self._workers[0].ready:
                    for worker, reply in self._replies():
                        self._update(worker, reply)
                    if not self._workers:
                        self._workers.append(self._new_worker())

    def close(self) -> None:
        """End the workers; a later `grade` starts new ones."""
        self._leave_workers_of_another_process()
        while self._workers:
            self._workers.pop().kill()

    def _leave_workers_of_another_process(self) -> None:
        """In a forked copy: two that read one worker's replies would mix them up."""
        if self._owner != os.getpid():
            self._owner, self._lock = os.getpid(), threading.Lock()
            while self._workers:
                self._workers.pop().abandon()

    def _ask_workers(self, questions: Sequence[Question]) -> dict[Question, Grade]:
        waiting = deque(questions)
        losses: Counter[Question] = Counter()
        grades: dict[Question, Grade] = {}
        try:
            while len(grades) < len(questions):
                self._hand_out(waiting)
                for worker, reply in self._replies():
                    question = worker.question
                    self._update(worker, reply)
                    if question is None:
                        continue
                    lost = reply["kind"] in ("died", "gone")
                    losses[question] += lost
                    if lost and losses[question] < MAX_ATTEMPTS:
                        waiting.append(question)
                    else:
                        grades[question] = _grade(reply)
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
        room = self._config.grader_workers - len(self._workers)
        num_missing = min(len(waiting) - num_free, room)
        self._workers += [self._new_worker() for _ in range(num_missing)]

    def _new_worker(self) -> WorkerProcess:
        return WorkerProcess(
            self._judge,
            timeout_s=self._config.grader_timeout_s,
            memory_bytes=int(self._config.grader_memory_gib * 2**30),
        )

    def _replies(self) -> list[tuple[WorkerProcess, Reply]]:
        """Sleep until a worker speaks, dies or is late."""
        # Two lines may have come at once: then nothing would wake this up for the second.
        if heard := self._heard():
            return heard
        deadline = min(worker.deadline for worker in self._workers if worker.pending)
        # poll, not select: beside a rollout engine descriptors pass 1024.
        with selectors.PollSelector() as selector:
            for worker in self._workers:
                selector.register(worker, selectors.EVENT_READ)
            selector.select(max(0.0, deadline - time.monotonic()))
        return self._heard()

    def _heard(self) -> list[tuple[WorkerProcess, Reply]]:
        heard = [(worker, worker.listen()) for worker in self._workers]
        return [(worker, reply) for worker, reply in heard if reply is not None]

    def _update(self, worker: WorkerProcess, reply: Reply) -> None:
        match reply["kind"]:
            case "ready":
                worker.ready = worker.has_loaded = True
                self._failed_starts = 0
            case "unusable":
                raise GradingError(
                    f"evaluation.scorer: found {self._config.scorer!r}, expected a function in a "
                    f"Python file: {reply['reason']}"
                )
            case "gone" | "stuck":
                self._remove(worker)
                self._failed_starts += not worker.ready
                if reply["kind"] == "stuck" and self._scorer is from_file and not worker.has_loaded:
                    # Another one would hang as long.
                    raise GradingError(
                        f"evaluation.scorer: importing {self._file!r} has not ended after "
                        f"{START_TIMEOUT_S:g} s; expected a file that defines a function and is "
                        "done: nothing in it may wait, or compute for long, while it is imported"
                    )
                if self._failed_starts == MAX_FAILED_STARTS:
                    raise GradingError(self._why_no_worker_starts())
            case _:
                worker.expect_more(ready=not reply["last"])

    def _why_no_worker_starts(self) -> str:
        memory = self._config.grader_memory_gib
        likely = "Is math-verify not installed"
        if self._scorer is from_file:
            likely = f"Does {self._file!r} (evaluation.scorer) end who imports it"
        return (
            f"{MAX_FAILED_STARTS} grading workers in a row were not ready: they ended, or took "
            f"{START_TIMEOUT_S:g} s. {likely}, or is evaluation.grader_memory_gib = {memory:g} too "
            "little? "
            f"The reason is printed by: {sys.executable} -m osft_mcore.evaluation.grading_worker "
            f"--scorer={self._judge} --timeout-s=5 --memory-bytes={int(memory * 2**30)} "
            "< /dev/null"
        )

    @property
    def _file(self) -> str:
        """Of a scorer that is in one."""
        return self._judge.rpartition(":")[0]

    def _remove(self, worker: WorkerProcess) -> None:
        self._workers.remove(worker)
        worker.kill()


def _grade(reply: Reply) -> Grade:
    match reply["kind"]:
        case "scored":
            return Grade(reply["score"], "ok")
        case "late" | "stuck":
            return Grade(0.0, "timeout")
        case "died" | "gone":
            return Grade(0.0, "error", "the worker died, twice")
        case _:
            return Grade(0.0, "error", reply["reason"])


def _absolute(scorer: str) -> str:
    path, _, name = scorer.rpartition(":")
    return f"{Path(path).resolve()}:{name}"
