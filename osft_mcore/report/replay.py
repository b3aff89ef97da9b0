"""Metrics of a run folder, sent to a tracker after the fact."""

import math
from collections.abc import Iterator
from typing import Final

from osft_mcore.errors import ConfigError
from osft_mcore.log.trackers import TrackerName, open_tracker
from osft_mcore.report.run import Json, Run, number

PROJECT: Final = "osft-mcore"
"""Where the run's options name none."""


def replay(run: Run, name: TrackerName) -> str:
    """Send every step and every evaluation; what was done, for people.

    Raises ConfigError if the tracker's package is not installed, or it fails.
    """
    project = run.option("logging.wandb_project")
    rows = list(replayed(run))
    if not rows:
        raise ConfigError(f"RUN: {str(run.path)!r} has no metrics to send")
    try:
        tracker = open_tracker(
            name,
            project=project if isinstance(project, str) and project else PROJECT,
            run=run.path.resolve().name,
            folder=run.path,
            options=run.options,
        )
        for step, metrics in rows:
            tracker.log(step, metrics)
        tracker.close()
    except ConfigError:
        raise
    # A tracker may raise anything; it is this command's whole task, so it fails.
    except Exception as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ConfigError(f"--sync: {name} failed: {what}") from error
    return f"sent to {name}: {len(run.metrics)} steps, {len(run.evaluations)} evaluations"


def replayed(run: Run) -> Iterator[tuple[int, dict[str, float]]]:
    """Steps with their finite metrics, in order, each followed by its evaluations."""
    rows = [(row["step"], 0, row) for row in run.metrics]
    rows += [(row["step"], 1, row) for row in run.evaluations]
    usual = run.option("evaluation.temperature")
    for step, _, row in sorted(rows, key=lambda found: found[:2]):
        prefix = _prefix(row, usual)
        yield (
            step,
            {
                name.replace("eval/", prefix, 1) if name.startswith("eval/") else name: value
                for name in row
                if name != "step"
                and (value := number(row, name)) is not None
                and math.isfinite(value)
            },
        )


def _prefix(row: Json, usual: object) -> str:
    """Of the metrics of an evaluation: a step may be scored at several temperatures."""
    tau = number(row, "eval/temperature")
    return "eval/" if tau is None or tau == usual else f"eval_temperature_{tau:g}/"
