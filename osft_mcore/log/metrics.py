"""One record of metrics a step: metrics.jsonl always, wandb if asked."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from osft_mcore.config.schema import LoggingConfig
from osft_mcore.log.run_folder import RunFolder


class Clock:
    """Seconds per phase of a step and of the whole run."""

    def __init__(self, totals: Mapping[str, float] | None = None) -> None:
        """`totals` of earlier starts of the same run."""
        self.totals = dict(totals or {})
        self.longest: dict[str, float] = {}
        """Seconds of the longest single stay in each phase, since this start."""
        self._step: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `phase`."""
        started = time.monotonic()
        yield
        elapsed = time.monotonic() - started
        for book in (self.totals, self._step):
            book[phase] = book.get(phase, 0.0) + elapsed
        self.longest[phase] = max(self.longest.get(phase, 0.0), elapsed)

    def flush(self) -> dict[str, float]:
        """`time/<phase>_s` since the last flush."""
        taken = {f"time/{phase}_s": seconds for phase, seconds in self._step.items()}
        self._step = {}
        return taken


class MetricsLog:
    """Appends metrics to the run folder and mirrors them to wandb."""

    def __init__(
        self, folder: RunFolder, logging: LoggingConfig, options: Mapping[str, Any]
    ) -> None:
        """`options` are shown beside the run in wandb."""
        self._folder = folder
        self._wandb: Any = None
        if logging.wandb and folder.writer:
            import wandb  # optional dependency; checked at start by config/check.py

            self._wandb = wandb.init(
                project=logging.wandb_project,
                name=folder.path.name,
                dir=folder.path,
                config=dict(options),
            )
            # A step may be scored several times, which wandb's own step counter cannot express.
            self._wandb.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step`."""
        self._folder.append_line("metrics.jsonl", {"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in evaluations.jsonl: a step may be scored at several temperatures."""
        self._folder.append_line("evaluations.jsonl", {"step": step, **metrics})
        if self._wandb is not None:
            self._wandb.log({"step": step, **metrics})

    def close(self) -> None:
        """Finish the sinks."""
        if self._wandb is not None:
            self._wandb.finish()
