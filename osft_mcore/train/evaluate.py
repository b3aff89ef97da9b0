"""The scores of a model, or of a run's checkpoints, at one temperature or several."""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osft_mcore.config.evaluation import temperatures
from osft_mcore.config.schema import RunConfig
from osft_mcore.errors import Stopped
from osft_mcore.evaluation.aggregate import best_temperature
from osft_mcore.evaluation.harness import summary as harness_summary
from osft_mcore.evaluation.results import Evaluation, compare, pass_at_1_bounds
from osft_mcore.log.console import Console, StepProgress
from osft_mcore.parallel.groups import ParallelContext, wait_for_all
from osft_mcore.parallel.stop import StopSignals, agreed_stop, deadline
from osft_mcore.train.harness import harness_results
from osft_mcore.train.identity import start_fingerprint
from osft_mcore.train.inputs import load_chat_tokenizer, load_held_out
from osft_mcore.train.resume import SUMMARY, read_json
from osft_mcore.train.sampler import BuildEngine, Sampler, fill_engine, open_sampler, say_start
from osft_mcore.train.score_files import result_file
from osft_mcore.train.scored import Scored, check_earlier_scores, scored_models
from osft_mcore.train.scoring import Scoring, open_scoring
from osft_mcore.train.summary import seconds_of


def run_evaluate(
    config: RunConfig, context: ParallelContext, console: Console, build_engine: BuildEngine
) -> None:
    """Score as `osft train` scores, and leave results behind. Every rank must call.

    Goes on where an earlier start was interrupted. Raises Stopped when it was told to stop.
    """
    tokenizer = load_chat_tokenizer(config)
    held_out = load_held_out(config, tokenizer)
    models = scored_models(config)
    say_start(console, config, context)
    console.say(
        f"data: {held_out.num_problems} held-out problems ({held_out.num_dropped_overlong} over "
        f"{config.rollout.max_prompt_tokens} tokens dropped), "
        f"{config.evaluation.num_samples} samples each"
    )
    if (shots := held_out.shots) is not None:
        console.say(
            f"examples before every problem: {len(shots.rows)} of {shots.file} "
            f"({shots.num_held_out} left out, which are held-out problems)"
        )
    goes_on = check_earlier_scores(config)
    with ExitStack() as stack:
        sampler = stack.enter_context(
            open_sampler(
                config, "evaluate", context, console, build_engine, tokenizer, keep=goes_on
            )
        )
        scoring = stack.enter_context(
            open_scoring(
                config, context, sampler.engine, held_out, tokenizer,
                folder=sampler.folder, metrics=sampler.metrics, console=console,
                clock=sampler.clock,
            )
        )  # fmt: skip
        assert scoring is not None, "the options were checked: there are evaluation.files"
        scores = Scores(
            config=config, models=models, context=context, sampler=sampler, scoring=scoring,
            console=console,
        )  # fmt: skip
        if found := scores.run():
            # What earlier starts have found in this folder is as good.
            found = _in_order([*found, *_others(scoring, found)], config.evaluation.temperature)
            summary = _summary(config, found, held_out.num_problems)
            summary["seconds"] = seconds_of(sampler.clock)
            if by_step := harness_results(sampler.folder.path):
                # Of an earlier start with --lm-eval.
                summary["lm_eval"] = harness_summary(by_step)
            # Last: it says that nothing is left to do.
            sampler.folder.write_json(SUMMARY, summary)
            _print(console, config, found)
            console.say(f"written: {sampler.folder.path / SUMMARY}")
        # No rank ends before that, which may take long: their launcher would not wait so long.
        wait_for_all(context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The collaborators of one run, and the loop over models and temperatures. Every rank runs."""

    config: RunConfig
    models: Sequence[Scored]
    context: ParallelContext
    sampler: Sampler
    scoring: Scoring
    console: Console

    def run(self) -> list[Evaluation]:
        """Score what is left; all evaluations, on the grading rank only."""
        work = [
            (scored, tau)
            for scored in self.models
            for tau in temperatures(self.config.evaluation, baseline=scored.baseline)
        ]
        left = [len(self.scoring.portions_left(scored.step, tau)) for scored, tau in work]
        total = sum(self.scoring.evaluator.num_portions(tau) for _, tau in work)
        done = total - sum(left)
        if done:
            self.console.say(f"going on: {done} of {total} portions are done")
        found: list[Evaluation] = []
        every = self.config.logging.every
        bar = self.console.steps("evaluate", total, every=every, done=done)
        told = StopSignals(self.context.rank, self.sampler.folder.path)
        with told as signals, bar as progress:
            signals.promise = "finishing this portion, then stopping"
            turn = _Turn(progress, signals, self.config, self.context, done=done, total=total)
            in_engine: Scored | None = None
            for (scored, tau), missing in zip(work, left, strict=True):
                if missing and scored != in_engine:
                    with self.sampler.clock("load"):
                        fill_engine(self.sampler.engine, self.config, self.context, scored)
                    in_engine = scored
                turn.before()
                for _ in self.scoring.portions(scored.step, tau):
                    turn.passed(scored.step, tau)
                evaluation = self.scoring.put_together(scored.step, tau)
                found += [] if evaluation is None else [evaluation]
        return found


class _Turn:
    """Between two portions: what was done is told, and a wish to stop is heard."""

    def __init__(
        self,
        progress: StepProgress,
        signals: StopSignals,
        config: RunConfig,
        context: ParallelContext,
        *,
        done: int,
        total: int,
    ) -> None:
        self._progress, self._signals, self._context = progress, signals, context
        self._limit = deadline(config.checkpoint.stop_after)
        self._done, self._total = done, total
        self._began, self._longest_s = time.monotonic(), 0.0

    def before(self) -> None:
        """Raise Stopped if it is time to. Collective."""
        lacks_time = self._limit.near(
            time.time(), longest_step_s=self._longest_s, longest_save_s=0.0
        )
        if reason := agreed_stop(self._signals.received or lacks_time, self._context):
            raise Stopped(
                f"{reason}; stopped after portion {self._done} of {self._total}; the same command "
                "goes on from there"
            )
        self._began = time.monotonic()

    def passed(self, step: int, temperature: float) -> None:
        """One more is done. Collective, as `before`."""
        self._done += 1
        self._longest_s = max(self._longest_s, time.monotonic() - self._began)
        self._progress.finished(self._done, {"step": step, "temperature": temperature})
        if self._done < self._total:
            self.before()


def _others(scoring: Scoring, found: Sequence[Evaluation]) -> Iterator[Evaluation]:
    """What the folder holds besides; on the grading rank."""
    known = {Path(result_file(at.step, at.temperature)).name for at in found}
    folder = scoring.folder.path / result_file(0, 0.0)
    for file in sorted(folder.parent.glob("step_*_temperature_*.json")):
        if file.name not in known:
            kept = read_json(file)
            evaluation = scoring.recall(kept["step"], kept["temperature"])
            # Else a start was ended before it had written the answers.
            if evaluation is not None:
                yield evaluation


def _in_order(found: Sequence[Evaluation], first: float) -> list[Evaluation]:
    """By step and temperature, `first` before the others: however many starts have made them."""
    return sorted(found, key=lambda at: (at.step, at.temperature != first, at.temperature))


def _summary(config: RunConfig, found: Sequence[Evaluation], num_problems: int) -> dict[str, Any]:
    """The first model's figures in front; then every model's, and the last against the first.

    First and last of those with scores at evaluation.temperature.
    """
    by_step: dict[int, dict[float, Evaluation]] = {}
    for evaluation in found:
        by_step.setdefault(evaluation.step, {})[evaluation.temperature] = evaluation
    tau = config.evaluation.temperature
    at_tau = [by_step[step] for step in sorted(by_step) if tau in by_step[step]]
    first, last = at_tau[0], at_tau[-1]
    best = first[best_temperature({t: at.headline for t, at in first.items()})]
    summary = {
        "model": {"path": config.model.path, "weights": start_fingerprint(config)},
        "num_problems": num_problems,
        "num_samples": config.evaluation.num_samples,
        "seed": config.seed,
        "evaluation_temperature": tau,
        "pass_at_1": first[tau].pass_at_1,
        "pass_at_1_ci95": pass_at_1_bounds(first[tau], config.seed),
        "best_temperature": best.temperature,
        "best_temperature_pass_at_1": best.pass_at_1,
        "pass_at_1_by_temperature": {f"{t:g}": at.pass_at_1 for t, at in first.items()},
        "steps": {
            str(step): {f"{t:g}": _headline(at) for t, at in by_tau.items()}
            for step, by_tau in by_step.items()
        },
    }
    if last is not first:
        gain = compare(first[tau], last[tau], k=1, seed=config.seed)
        summary["gain"] = gain.gain
        summary["gain_ci95"] = [gain.interval.low, gain.interval.high]
        summary["gain_p_value"] = gain.p_value
    return summary


def _headline(evaluation: Evaluation) -> dict[str, float]:
    found = evaluation.headline
    return {f"pass@{k}": value for k, value in found.pass_at.items()} | {"average": found.average}


def _print(console: Console, config: RunConfig, found: Sequence[Evaluation]) -> None:
    several = len({evaluation.step for evaluation in found}) > 1
    ks = list(found[0].headline.pass_at)
    rows = []
    for evaluation in found:
        low, high = pass_at_1_bounds(evaluation, config.seed)
        rows.append(
            [
                *([str(evaluation.step)] if several else []),
                f"{evaluation.temperature:g}",
                f"{evaluation.pass_at_1:.1%}",
                f"{low:.1%} to {high:.1%}",
                *(f"{evaluation.headline.pass_at[k]:.1%}" for k in ks[1:]),
                *([f"{evaluation.headline.average:.1%}"] if len(ks) > 1 else []),
            ]
        )
    header = [
        *(["step"] if several else []), "temperature", "pass@1", "95% interval",
        *(f"pass@{k}" for k in ks[1:]), *(["average"] if len(ks) > 1 else []),
    ]  # fmt: skip
    name = config.evaluation.run or config.model.path
    console.table(f"pass@k of {name}", header, rows)
