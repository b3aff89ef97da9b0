"""What a run came to: summary.json and the closing table."""

import json
from collections.abc import Sequence
from typing import Any

from osft_mcore.config.temperature import temperatures
from osft_mcore.evaluation.aggregate import best_temperature
from osft_mcore.evaluation.results import Evaluation, compare
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.loop import OsftLoop
from osft_mcore.weights.alias import delivery_lines


def summarise(
    loop: OsftLoop,
    start: Sequence[Evaluation],
    end: Evaluation | None,
    topology: Topology,
) -> dict[str, Any]:
    """Figures of the whole run; scores only where it evaluated."""
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
    if start:
        summary |= _start_scores(start)
    if end is not None:
        summary["osft_pass_at_1"] = end.pass_at_1
        summary["evaluation_temperature"] = end.temperature
        if start:
            found = compare(start[0], end, k=1, seed=cfg.seed)
            summary["gain"] = found.gain
            summary["gain_ci95"] = [found.interval.low, found.interval.high]
            summary["gain_p_value"] = found.p_value
    return summary


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
        tau = f"{summary['evaluation_temperature']:g}"
        if "base_pass_at_1" in summary:
            best = f"{summary['base_best_temperature']:g}"
            rows.append(["base model", tau, _percent(summary["base_pass_at_1"])])
            rows.append(
                [
                    "base model, best temperature",
                    best,
                    _percent(summary["base_best_temperature_pass_at_1"]),
                ]
            )
        rows.append(["after OSFT", tau, _percent(summary["osft_pass_at_1"])])
        console.table("pass@1 on held-out problems", ["model", "temperature", "pass@1"], rows)
    if "gain" in summary:
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


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"
