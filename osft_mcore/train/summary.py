"""What a run came to: summary.json and the closing table."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from osft_mcore.config.temperature import temperatures
from osft_mcore.evaluation.aggregate import best_temperature
from osft_mcore.evaluation.results import Evaluation, compare
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.loop import OsftLoop
from osft_mcore.train.scored import steps_kept
from osft_mcore.weights.alias import delivery_lines

OF_THE_START: Final = (
    "base_pass_at_1",
    "base_best_temperature",
    "base_best_temperature_pass_at_1",
    "base_pass_at_1_by_temperature",
)
NOT_SCORED: Final = "not scored"


def summarise(loop: OsftLoop, topology: Topology) -> dict[str, Any]:
    """Figures of the whole run; scores only where it evaluated, None where they did not come."""
    cfg = loop.config
    summary: dict[str, Any] = {
        "steps": loop.num_steps,
        **temperatures(cfg),
        "actor_layout": topology.actor_sizes(),
        "rollout_layout": {"tp": topology.rollout_tp, "replicas": topology.num_replicas},
        "weight_version": loop.sync.version,
        "weights_to_vllm": delivery_lines(loop.sync.deliveries),
    }
    if loop.folder.writer:
        history = (loop.folder.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        steps = [json.loads(line) for line in history]
        # Steps whose updates were all skipped have no agreement.
        if agreed := [s for s in steps if "sync/logprob_diff_max" in s]:
            summary["sync/logprob_diff_max"] = max(s["sync/logprob_diff_max"] for s in agreed)
            means = [s["sync/logprob_diff_mean"] for s in agreed]
            summary["sync/logprob_diff_mean"] = sum(means) / len(means)
        if num_skipped := sum(s["optim/num_skipped"] for s in steps):
            summary["num_skipped_updates"] = int(num_skipped)
    return summary | _scores(loop)


def _scores(loop: OsftLoop) -> dict[str, Any]:
    """Before, after, the gain; and what is missing."""
    cfg, unscored = loop.config, loop.scores.unscored
    summary: dict[str, Any] = {}
    start, end = _start(loop), loop.scores.recall(loop.num_steps, cfg.evaluation.temperature)
    if start:
        summary |= _start_scores(start)
    if any(step == 0 for step, _ in unscored):
        # The best of those that are there need not be the best.
        lacking = OF_THE_START if not start else OF_THE_START[1:-1]
        summary |= dict.fromkeys(lacking)
    elif not start and end is not None and cfg.evaluation.before:
        loop.console.say("the scores of the starting model are not here: no gain will be told")
    if end is not None or (loop.num_steps, cfg.evaluation.temperature) in unscored:
        summary["osft_pass_at_1"] = None if end is None else end.pass_at_1
        summary["evaluation_temperature"] = cfg.evaluation.temperature
    if end is not None and start:
        found = compare(start[0], end, k=1, seed=cfg.seed)
        summary["gain"] = found.gain
        summary["gain_ci95"] = [found.interval.low, found.interval.high]
        summary["gain_p_value"] = found.p_value
    elif unscored and (end is None or cfg.evaluation.before):
        summary |= dict.fromkeys(("gain", "gain_ci95", "gain_p_value"))
    if unscored:
        summary["unscored"] = [
            {"step": step, "temperature": tau, "reason": reason}
            for (step, tau), reason in sorted(unscored.items())
        ]
    return summary


def _start(loop: OsftLoop) -> list[Evaluation]:
    """The starting model's evaluations, at the evaluation temperature first; [] without that."""
    cfg = loop.config.evaluation
    asked = dict.fromkeys((cfg.temperature, *cfg.baseline_temperatures))
    found = [at for tau in asked if (at := loop.scores.recall(0, tau)) is not None]
    return found if found and found[0].temperature == cfg.temperature else []


def seconds_of(clock: Clock) -> dict[str, float]:
    """Seconds of every phase, over all starts of the run."""
    return {phase: round(seconds, 2) for phase, seconds in clock.totals.items()}


def _start_scores(start: Sequence[Evaluation]) -> dict[str, Any]:
    by_temperature = {evaluation.temperature: evaluation for evaluation in start}
    tau = best_temperature({tau: at.headline for tau, at in by_temperature.items()})
    best = by_temperature[tau]
    return {
        "base_pass_at_1": start[0].pass_at_1,
        "base_best_temperature": best.temperature,
        "base_best_temperature_pass_at_1": best.pass_at_1,
        "base_pass_at_1_by_temperature": {f"{e.temperature:g}": e.pass_at_1 for e in start},
    }


def print_summary(console: Console, summary: dict[str, Any]) -> None:
    """Before and after, and where the time went."""
    if "osft_pass_at_1" in summary:
        rows = []
        tau = summary["evaluation_temperature"]
        if "base_pass_at_1" in summary:
            best, at_best = (
                summary[name]
                for name in ("base_best_temperature", "base_best_temperature_pass_at_1")
            )
            rows.append(["base model", f"{tau:g}", _percent(summary["base_pass_at_1"])])
            rows.append(
                [
                    "base model, best temperature",
                    NOT_SCORED if best is None else f"{best:g}",
                    _percent(at_best),
                ]
            )
        rows.append(["after OSFT", f"{tau:g}", _percent(summary["osft_pass_at_1"])])
        console.table("pass@1 on held-out problems", ["model", "temperature", "pass@1"], rows)
    if summary.get("gain") is not None:
        low, high = (100 * bound for bound in summary["gain_ci95"])
        console.say(
            f"gain {100 * summary['gain']:+.1f} points, 95% interval {low:+.1f} to {high:+.1f} "
            f"(paired bootstrap over problems), p = {summary['gain_p_value']:.2g}"
        )
    seconds = ", ".join(f"{phase} {s:.0f}" for phase, s in summary["seconds"].items())
    largest = summary.get("sync/logprob_diff_max")
    difference = "unknown" if largest is None else f"{largest:.2g} nats"
    console.say(
        f"largest log-probability difference rollout vs actor: {difference};  seconds: {seconds}"
    )
    if "num_skipped_updates" in summary:
        console.say(f"{summary['num_skipped_updates']} updates skipped; their batches: skipped/")


def say_unscored(console: Console, run: Path, summary: dict[str, Any]) -> None:
    """Which evaluations are missing, why, and the command that makes them."""
    if "unscored" not in summary:
        return
    for lacking in summary["unscored"]:
        step, tau, reason = (lacking[name] for name in ("step", "temperature", "reason"))
        console.say(f"not scored: step {step} at temperature {tau:g}: {reason}")
    steps = sorted({int(lacking["step"]) for lacking in summary["unscored"]})
    kept = steps_kept(run)
    if there := [step for step in steps if step in kept]:
        named = ",".join(map(str, there))
        console.say(f"to score them: osft evaluate --run {run} 'evaluation.steps=[{named}]'")
    if gone := [str(step) for step in steps if step not in kept]:
        console.say(
            f"the weights after step {', '.join(gone)} are in no checkpoint (checkpoint.every, "
            "keep_last, keep_every)"
        )


def _percent(value: float | None) -> str:
    return NOT_SCORED if value is None else f"{100 * value:.1f}%"
