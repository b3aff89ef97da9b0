"""The scores of one model on held-out problems, at one temperature or several."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import load_tokenizer
from osft_mcore.evaluation.evaluator import Evaluation
from osft_mcore.evaluation.statistics import Interval, stratified_ci
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.train.earlier import check_earlier
from osft_mcore.train.identity import start_fingerprint
from osft_mcore.train.inputs import load_held_out
from osft_mcore.train.resume import SUMMARY
from osft_mcore.train.sampler import BuildEngine, open_sampler, say_start
from osft_mcore.train.scoring import open_scoring
from osft_mcore.train.summary import seconds_of


def run_evaluate(
    config: RunConfig, context: ParallelContext, console: Console, build_engine: BuildEngine
) -> None:
    """Score model.path as `osft train` scores the model it starts from. Every rank must call."""
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    held_out = load_held_out(config, tokenizer)
    say_start(console, config, context)
    console.say(
        f"data: {held_out.num_problems} held-out problems ({held_out.num_dropped_overlong} over "
        f"{config.rollout.max_prompt_tokens} tokens dropped), "
        f"{config.evaluation.num_samples} samples each"
    )
    check_earlier(config, "evaluate")
    with ExitStack() as stack:
        sampler = stack.enter_context(
            open_sampler(config, "evaluate", context, console, build_engine, tokenizer, keep=False)
        )
        scoring = stack.enter_context(
            open_scoring(
                config, context, sampler.engine, held_out, tokenizer,
                folder=sampler.folder, metrics=sampler.metrics, console=console,
                clock=sampler.clock,
            )
        )  # fmt: skip
        assert scoring is not None, "the options were checked: there are evaluation.files"
        cfg = config.evaluation
        temperatures = dict.fromkeys((cfg.temperature, *cfg.baseline_temperatures))
        scored = [scoring.score(0, tau) for tau in temperatures]
        found = [evaluation for evaluation in scored if evaluation is not None]
        if found:
            summary = _summary(config, found, held_out.num_problems)
            summary["seconds"] = seconds_of(sampler.clock)
            # Last: it says that nothing is left to do.
            sampler.folder.write_json(SUMMARY, summary)
            _print(console, config, found)
            console.say(f"written: {sampler.folder.path / SUMMARY}")


def _summary(config: RunConfig, found: Sequence[Evaluation], num_problems: int) -> dict[str, Any]:
    best = max(found, key=lambda evaluation: evaluation.pass_at_1)
    interval = _interval(found[0], config.seed)
    return {
        "model": {"path": config.model.path, "weights": start_fingerprint(config)},
        "num_problems": num_problems,
        "num_samples": config.evaluation.num_samples,
        "seed": config.seed,
        "evaluation_temperature": found[0].temperature,
        "pass_at_1": found[0].pass_at_1,
        "pass_at_1_ci95": [interval.low, interval.high],
        "best_temperature": best.temperature,
        "best_temperature_pass_at_1": best.pass_at_1,
        "pass_at_1_by_temperature": {f"{e.temperature:g}": e.pass_at_1 for e in found},
    }


def _interval(evaluation: Evaluation, seed: int) -> Interval:
    """Over problems, of the mean over data sources."""
    scores = [list(source.fractions_correct) for source in evaluation.sources]
    return stratified_ci(scores, seed=seed, level=0.95)


def _print(console: Console, config: RunConfig, found: Sequence[Evaluation]) -> None:
    rows = []
    for evaluation in found:
        interval = _interval(evaluation, config.seed)
        rows.append(
            [
                f"{evaluation.temperature:g}",
                f"{evaluation.pass_at_1:.1%}",
                f"{interval.low:.1%} to {interval.high:.1%}",
            ]
        )
    header = ["temperature", "pass@1", "95% interval"]
    console.table(f"pass@1 of {config.model.path}", header, rows)
