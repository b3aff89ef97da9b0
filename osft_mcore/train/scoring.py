"""Scoring on held-out problems, and what the run folder keeps of it."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.probe import Probe
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.evaluation.evaluator import Evaluator, read_answers
from osft_mcore.evaluation.grading import Grader
from osft_mcore.evaluation.results import METRICS, Answer, Evaluation, metrics, report
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext, all_gather_json, wait_for_all
from osft_mcore.records import Response
from osft_mcore.rollout.engine import RolloutEngine
from osft_mcore.train.inputs import HeldOut
from osft_mcore.train.probe import first_answers, probe_answers, with_probes
from osft_mcore.train.resume import read_json
from osft_mcore.train.score_files import (
    answers_file,
    portion_file,
    portions_folder,
    result_file,
)


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """An evaluator, and where its results go. Every rank has one."""

    evaluator: Evaluator
    context: ParallelContext
    held_out: HeldOut
    folder: RunFolder
    metrics: MetricsLog
    console: Console
    clock: Clock
    seed: int
    actor: Actor | None = None
    """Looks at the answers to `num_probed` problems of each source; None where nothing trains."""
    num_probed: int = 0

    def score(self, step: int, temperature: float) -> Evaluation | None:
        """Score the held-out problems, tell and keep what is found; None on ranks that do not
        grade. Collective."""
        found = self.answer(step, temperature)
        if found is not None:
            self.tell_answered(step, temperature)
        return found

    def answer(self, step: int, temperature: float) -> Evaluation | None:
        """The same without telling: for a process whose files another one tells of. Collective."""
        answers: list[Answer] = []
        first: list[Response] = []
        with self.clock("evaluate"):
            for portion in self.evaluator.graded(step, temperature):
                answers += portion.answers or ()
                first += (r for r in portion.responses if r.sample_index == 0)
            probes = self._probe(first, temperature)
            # One rank grades; the others wait here, under deadlines.evaluate.
            wait_for_all(self.context)
        return self.keep(step, temperature, answers, probes)

    def _probe(self, responses: Sequence[Response], temperature: float) -> dict[str, Probe]:
        """The engine has been given the actor's weights: both speak of the same model."""
        if self.actor is None or not self.num_probed:
            return {}
        probes = probe_answers(self.actor, first_answers(responses, self.num_probed), temperature)
        self.actor.rest()
        return probes

    def portions(self, step: int, temperature: float) -> Iterator[tuple[int, int]]:
        """Score the portions that an earlier start has not; (number, how many) after each.

        Their answers are kept one by one. Collective; then `put_together`.
        """
        total = self.evaluator.num_portions(temperature)
        done = set(range(total)) - self.portions_left(step, temperature)
        graded = self.evaluator.graded(step, temperature, skip=done)
        while True:
            with self.clock("evaluate"):
                portion = next(graded, None)
                if portion is None:
                    return
                if portion.answers is not None:
                    rows = map(dataclasses.asdict, portion.answers)
                    file = portion_file(step, temperature, portion.number)
                    self.folder.write_lines(file, rows)
            yield portion.number, total

    def portions_left(self, step: int, temperature: float) -> set[int]:
        """Those that are not kept yet; rank 0 looks. Collective."""
        total = self.evaluator.num_portions(temperature)
        left: list[int] = []
        if self.folder.writer:
            whole = (self.folder.path / answers_file(step, temperature)).is_file()
            left = [
                number
                for number in range(total)
                if not whole
                and not (self.folder.path / portion_file(step, temperature, number)).is_file()
            ]
        return set(all_gather_json(left, self.context)[0])

    def put_together(self, step: int, temperature: float) -> Evaluation | None:
        """The evaluation that `portions` have made, or an earlier start; not collective."""
        if not self.folder.writer:
            return None
        found = self.recall(step, temperature)
        known = found is not None
        if found is None:
            answers = [
                answer
                for number in range(self.evaluator.num_portions(temperature))
                for answer in read_answers(
                    self.folder.read_lines(portion_file(step, temperature, number))
                )
            ]
            found = self.keep(step, temperature, answers)
        assert found is not None, "this rank writes"
        self.tell(step, temperature, metrics(found), quietly=known)
        shutil.rmtree(self.folder.path / portions_folder(step, temperature), ignore_errors=True)
        return found

    def keep(
        self,
        step: int,
        temperature: float,
        answers: Sequence[Answer],
        probes: Mapping[str, Probe] = MappingProxyType({}),
    ) -> Evaluation | None:
        """Write what was found; None on ranks that do not grade."""
        if not self.folder.writer:
            return None
        evaluation = self.evaluator.evaluation(step, temperature, answers)
        assert evaluation is not None, "portions are answers to all problems"
        dropped, shots = self.held_out.dropped_overlong, self.held_out.shots
        found = report(
            evaluation, dropped=dropped, seed=self.seed, shots=shots.record() if shots else None
        )
        self.folder.write_json(result_file(step, temperature), with_probes(found, probes))
        rows = map(dataclasses.asdict, evaluation.answers)
        # After the result: where the answers are, that is too.
        self.folder.write_lines(answers_file(step, temperature), rows)
        return evaluation

    def tell(
        self, step: int, temperature: float, found: Mapping[str, float], *, quietly: bool = False
    ) -> None:
        """A line on the console, unless `quietly`, and one of metrics, unless a start that was
        killed here has written it; on the rank that grades."""
        told = self.folder.read_lines("evaluations.jsonl")
        rows = ((row.get("step"), row.get("eval/temperature")) for row in told)
        if (step, temperature) not in rows:
            self.metrics.write_evaluation(step, found)
        if not quietly:
            score = found["eval/pass_at_1"]
            self.console.say(f"step {step}, temperature {temperature:g}: pass@1 {score:.1%}")

    def tell_answered(self, step: int, temperature: float) -> bool:
        """Tell of an evaluation that this process or another one kept; False if it is not there."""
        if not (self.folder.path / answers_file(step, temperature)).is_file():
            return False
        # Small, unlike the answers: nothing waits while all of them are read.
        found = read_json(self.folder.path / result_file(step, temperature))
        self.tell(step, temperature, found[METRICS])
        return True

    def recall(self, step: int, temperature: float) -> Evaluation | None:
        """What was found before, as the run folder keeps it; not collective.

        None if it is not there, or the problems are not the same any more.
        """
        rows = self.folder.read_lines(answers_file(step, temperature))
        return self.evaluator.evaluation(step, temperature, read_answers(rows))


@contextmanager
def open_scoring(
    config: RunConfig,
    context: ParallelContext,
    engine: RolloutEngine,
    held_out: HeldOut,
    tokenizer: ChatTokenizer,
    *,
    folder: RunFolder,
    metrics: MetricsLog,
    console: Console,
    clock: Clock,
    actor: Actor | None = None,
) -> Iterator[Scoring | None]:
    """None if there is nothing to score on. Rank 0 grades, with workers that end with this.

    `actor`: whose weights the engine has, to look at some of the answers.
    """
    with ExitStack() as stack:
        cfg, grader = config.evaluation, None
        if context.rank == 0:
            # Its workers start when they are first needed.
            grader = stack.enter_context(Grader(cfg, config.rollout.max_response_tokens))
        if not held_out.by_source:
            yield None
            return
        if grader is not None:
            grader.check()
        evaluator = Evaluator(
            engine,
            held_out.by_source,
            tokenizer.decode,
            grader,
            num_samples=cfg.num_samples,
            top_p=cfg.top_p,
            max_tokens=config.rollout.max_response_tokens,
            seed=config.seed,
            portion=cfg.portion,
            scorer=cfg.scorer,
            max_ungraded_share=cfg.max_ungraded_share,
        )
        yield Scoring(
            evaluator=evaluator,
            context=context,
            held_out=held_out,
            folder=folder,
            metrics=metrics,
            console=console,
            clock=clock,
            seed=config.seed,
            actor=actor,
            num_probed=cfg.probe,
        )
