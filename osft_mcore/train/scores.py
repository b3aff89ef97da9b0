"""How a training run gets its scores: by itself while it waits, or from a process beside it."""

import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.export import export_hf
from osft_mcore.config.schema import RunConfig
from osft_mcore.errors import Stopped
from osft_mcore.evaluation.results import Evaluation
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import ASKED
from osft_mcore.parallel.groups import all_gather_json
from osft_mcore.train.evaluator_process import EvaluatorProcess
from osft_mcore.train.resume import ResumePoint
from osft_mcore.train.score_files import answers_file
from osft_mcore.train.scoring import Scoring
from osft_mcore.train.snapshots import (
    At,
    Entry,
    announce_end,
    clear,
    end_announced,
    entry_folder,
    failure,
    is_waiting,
    publish,
    snapshots_folder,
    told,
    waiting,
    withdraw,
)

POLL_S: Final = 0.1
REMIND_S: Final = 60.0
ENDED: Final = "the evaluator had ended"
NOT_KEPT: Final = "its weights did not outlive an earlier start of the run"


class Scores(Protocol):
    """Where the scores of a run come from. Every rank has one and calls every method."""

    @property
    def unscored(self) -> Mapping[At, str]:
        """Evaluations that were due and will not come, and why; on the rank that grades."""
        ...

    def ask(self, step: int, temperature: float, *, exported: Path | None = None) -> None:
        """Have the weights that the actor holds now scored as those of `step`; `exported` has them
        too, if it is given. Collective."""

    def drain(self) -> None:
        """Tell what has been found since. Waits for nothing."""

    def finish(self, hurry: Callable[[], str]) -> None:
        """Nothing more will be asked: wait for what was, until `hurry` says why not any longer."""

    def recall(self, step: int, temperature: float) -> Evaluation | None:
        """What was found, on the rank that grades; None if it is not there."""


@dataclass(frozen=True, slots=True)
class InlineScores:
    """The run's own engine samples, and training waits."""

    scoring: Scoring | None
    unscored: Mapping[At, str] = field(default_factory=dict)

    def ask(self, step: int, temperature: float, *, exported: Path | None = None) -> None:
        """Score, and tell."""
        if self.scoring is not None:
            self.scoring.score(step, temperature)

    def drain(self) -> None:
        """Everything has been told."""

    def finish(self, hurry: Callable[[], str]) -> None:
        """Nothing is left."""

    def recall(self, step: int, temperature: float) -> Evaluation | None:
        """From the run folder."""
        return _recall(self.scoring, step, temperature)


@dataclass(slots=True, kw_only=True)
class AsyncScores:
    """The evaluator takes snapshots of the weights; files are all that the two share."""

    config: RunConfig
    num_steps: int
    scoring: Scoring
    actor: Actor
    queue: Path
    console: Console
    evaluator: EvaluatorProcess | None
    """On rank 0; None once it was found to have ended."""
    pending: list[At]
    """Asked for and not told of, in order; on rank 0."""
    unscored: dict[At, str]
    num_asked: int
    """By this start; on rank 0."""

    @property
    def _leads(self) -> bool:
        return self.scoring.folder.writer

    def ask(self, step: int, temperature: float, *, exported: Path | None = None) -> None:
        """Leave the weights to the evaluator, or say why not; training goes on in either case."""
        at = (step, temperature)
        with self.scoring.clock("evaluate"):
            alone = step > 0 and exported is None
            refusal = self._refusal(at, alone=alone) if self._leads else ""
            # All export, or none.
            refusal = all_gather_json(refusal, self.scoring.context)[0]
            weights = exported
            if alone and not refusal:
                weights = entry_folder(self.queue, at)
                refusal = self._export(weights)
            if self._leads:
                self._asked(at, weights, refusal)

    def drain(self) -> None:
        """Tell of what the evaluator has left, and once if it has ended."""
        if not self._leads:
            return
        # Before looking for its results: it may leave one, and end.
        ended = self.evaluator.ended() if self.evaluator is not None else ""
        while self.pending and self._settled(self.pending[0]):
            self.pending.pop(0)
        if not ended:
            return
        self.evaluator = None
        # With nothing left to do it ends by itself, once it was told that nothing will come.
        if self.pending or not end_announced(self.queue):
            self.unscored |= dict.fromkeys(self.pending, ENDED)
            self.pending.clear()
            self.console.say(
                f"the evaluator has ended ({ended}); training goes on, and weights are not scored "
                "any more"
            )

    def _settled(self, at: At) -> bool:
        """Its scores were told, or that there will be none."""
        if self.scoring.tell_answered(*at):
            return True
        if reason := failure(self.queue, at):
            self._left_out(at, reason)
        return bool(reason)

    def _left_out(self, at: At, reason: str) -> None:
        self.unscored[at] = reason
        self.console.say(f"step {at[0]}, temperature {at[1]:g} is not scored: {reason}")

    def finish(self, hurry: Callable[[], str]) -> None:
        """Wait, at most evaluation.wait_minutes; then nothing is left of the snapshots."""
        # On every rank: only one has something to wait for, but phases are the same everywhere.
        with self.scoring.clock("wait"):
            if self._leads:
                self._wait(hurry)

    def _wait(self, hurry: Callable[[], str]) -> None:
        announced = self._announce_end()
        limit = 60 * self.config.evaluation.wait_minutes
        began = reminded = time.monotonic()
        while True:
            self.drain()
            why = hurry()
            if not why and time.monotonic() - began >= limit:
                why = f"not there after evaluation.wait_minutes = {limit / 60:g}"
            if why or not self.pending:
                break
            if reminded == began or time.monotonic() - reminded >= REMIND_S:
                reminded = time.monotonic()
                self._say_waiting(limit - (reminded - began))
            time.sleep(POLL_S)
        if self.evaluator is not None:
            if announced and not self.pending:
                self.evaluator.leave()
            self.evaluator.end()
        self.unscored |= dict.fromkeys(self.pending, why)
        try:
            clear(self.queue)
        except OSError as error:
            self.console.say(f"{self.queue} cannot be removed: {error.strerror}")

    def recall(self, step: int, temperature: float) -> Evaluation | None:
        """From the run folder."""
        return _recall(self.scoring, step, temperature)

    def _refusal(self, at: At, *, alone: bool) -> str:
        """Why this is not asked for; empty if it is. `alone`: the weights are for it alone."""
        self.drain()
        if self.evaluator is None:
            return ENDED
        there = sum(step > 0 and is_waiting(self.queue, (step, tau)) for step, tau in self.pending)
        # The last one is worth the room: nothing comes after it.
        if alone and at[0] < self.num_steps and there >= self.config.evaluation.max_waiting:
            return f"as many weights wait already as evaluation.max_waiting = {there} allows"
        return ""

    def _export(self, folder: Path) -> str:
        """Why it failed, on rank 0; empty if it did not. Collective."""
        try:
            export_hf(
                self.actor,
                folder,
                max_shard_bytes=self.config.checkpoint.max_shard_bytes,
                bucket_bytes=self.config.sync.bucket_bytes,
            )
        except OSError as error:
            return f"its weights could not be written to {folder}: {error.strerror}"
        finally:
            self.actor.rest()
        return ""

    def publish(self, at: At, weights: Path | None) -> None:
        """Let the evaluator have it; `weights` None: those that the run started from. On rank 0.

        Raises OSError if it cannot be written.
        """
        step, tau = at
        # A start before this one may have scored it, as the closing evaluation.
        (self.scoring.folder.path / answers_file(step, tau)).unlink(missing_ok=True)
        self.num_asked += 1
        path = "" if weights is None else str(weights.resolve())
        entry = Entry(step=step, temperature=tau, number=self.num_asked, weights=path)
        publish(self.queue, entry)
        self.pending.append(at)

    def _asked(self, at: At, weights: Path | None, refusal: str) -> None:
        step, tau = at
        try:
            if not refusal:
                self.publish(at, weights)
        except OSError as error:
            refusal = f"{self.queue} cannot be written: {error.strerror}"
        row = {"step": step, "temperature": tau, "refusal": refusal}
        self.scoring.folder.append_line(ASKED, row)
        if refusal:
            with suppress(OSError):
                withdraw(self.queue, at)
            self._left_out(at, refusal)

    def _announce_end(self) -> bool:
        """False if it cannot be written: then the evaluator does not end by itself."""
        try:
            announce_end(self.queue)
        except OSError as error:
            self.console.say(
                f"{self.queue} cannot be written: {error.strerror}; the evaluator is ended once "
                "nothing is waited for"
            )
            return False
        return True

    def _say_waiting(self, left_s: float) -> None:
        steps = ", ".join(dict.fromkeys(str(step) for step, _ in self.pending))
        self.console.say(
            f"waiting for the scores of step {steps}, for at most {left_s / 60:.1f} minutes"
        )


@contextmanager
def open_scores(
    config: RunConfig,
    scoring: Scoring | None,
    actor: Actor,
    console: Console,
    point: ResumePoint | None,
    num_steps: int,
) -> Iterator[Scores]:
    """As evaluation.mode says; an evaluator ends with this. To be entered in the main thread."""
    queue = snapshots_folder(config)
    if scoring is None or config.evaluation.mode == "inline":
        if actor.context.rank == 0 and (lost := _cleared(queue)):
            steps = ", ".join(str(entry.step) for entry in lost)
            console.say(f"step {steps} will not be scored: evaluation.mode is not async any more")
        yield InlineScores(scoring)
        return
    scores = AsyncScores(
        config=config, num_steps=num_steps, scoring=scoring, actor=actor, queue=queue,
        console=console, evaluator=None, pending=[], unscored={}, num_asked=0,
    )  # fmt: skip
    if not scoring.folder.writer:
        yield scores
        return
    _go_on(scores, point.step if point else 0)
    scores.evaluator = evaluator = EvaluatorProcess(config)
    console.say(f"evaluation: process {evaluator.pid}, which says more in {evaluator.log}")
    try:
        yield scores
    except Stopped:
        if num := sum(entry.step > 0 for entry in waiting(queue)):
            console.say(f"weights that wait to be scored when the run goes on: {num}, in {queue}")
        raise
    finally:
        evaluator.end()


def _go_on(scores: AsyncScores, num_done: int) -> None:
    """Take up what earlier starts have asked for and not told of; without one there is nothing."""
    folder, queue = scores.scoring.folder, scores.queue
    rows = folder.read_lines("evaluations.jsonl") if num_done else []
    known = {(row.get("step"), row.get("eval/temperature")) for row in rows}
    asked = {
        (row["step"], row["temperature"]): row["refusal"]
        for row in (folder.read_lines(ASKED) if num_done else ())
    }
    # The last one is asked for again.
    untold = [at for at in asked if at not in known and at[0] < scores.num_steps]
    _cleared(queue, keep=[at for at in untold if at[0] > 0])
    for at in untold:
        answered = (folder.path / answers_file(*at)).is_file()
        if at[0] == 0 and not answered:
            with told(queue):
                scores.publish(at, None)
        elif answered or is_waiting(queue, at):
            scores.pending.append(at)
        else:
            scores.unscored[at] = asked[at] or NOT_KEPT


def _cleared(queue: Path, *, keep: Collection[At] = ()) -> list[Entry]:
    with told(queue):
        return clear(queue, keep=keep)


def _recall(scoring: Scoring | None, step: int, temperature: float) -> Evaluation | None:
    if scoring is None or not scoring.folder.writer:
        return None
    return scoring.recall(step, temperature)
