"""Scoring on held-out problems, and what the run folder keeps of it."""

import dataclasses
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.evaluation.evaluator import Evaluation, Evaluator, metrics
from osft_mcore.evaluation.grading import Grader
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext, wait_for_all
from osft_mcore.rollout.engine import RolloutEngine
from osft_mcore.train.inputs import HeldOut


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """An evaluator, and where its results go. Every rank has one."""

    evaluator: Evaluator
    context: ParallelContext
    folder: RunFolder
    metrics: MetricsLog
    console: Console
    clock: Clock

    def score(self, step: int, temperature: float) -> Evaluation | None:
        """Score the held-out problems; the result is on the grading rank only. Collective."""
        with self.clock("evaluate"):
            evaluation = self.evaluator.run(step, temperature)
            # One rank grades; the others wait here, under parallel.timeout_minutes.
            wait_for_all(self.context)
        if evaluation is not None:
            self.metrics.write_evaluation(step, metrics(evaluation))
            rows = map(dataclasses.asdict, evaluation.answers)
            self.folder.write_lines(_answers_file(step, temperature), rows)
            self.console.say(
                f"step {step}, temperature {temperature:g}: pass@1 {evaluation.pass_at_1:.1%}"
            )
        return evaluation

    def recall(self, step: int, temperature: float) -> Evaluation | None:
        """What `score` found, as the run folder keeps it; not collective.

        None if it is not there, or the problems are not the same any more.
        """
        rows = self.folder.read_lines(_answers_file(step, temperature))
        return self.evaluator.recall(step, temperature, rows)


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
) -> Iterator[Scoring | None]:
    """None if there is nothing to score on. Rank 0 grades, with workers that end with this."""
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
            max_ungraded_share=cfg.max_ungraded_share,
        )
        yield Scoring(
            evaluator=evaluator,
            context=context,
            folder=folder,
            metrics=metrics,
            console=console,
            clock=clock,
        )


def _answers_file(step: int, temperature: float) -> str:
    return f"evaluations/step_{step}_temperature_{temperature:g}.jsonl"
