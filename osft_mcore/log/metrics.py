"""One record of metrics a step: metrics.jsonl always, wandb if asked."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final

from osft_mcore.config.schema import LoggingConfig
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.log.trackers import Tracker, open_tracker

PATIENCE_S: Final = 60.0
"""How long a run waits for wandb, at its beginning and at its end."""


def _nothing(_phase: str) -> AbstractContextManager[None]:
    return nullcontext()


class Clock:
    """Seconds per phase of a step and of the whole run."""

    def __init__(
        self,
        totals: Mapping[str, float] | None = None,
        *,
        within: Callable[[str], AbstractContextManager[None]] = _nothing,
    ) -> None:
        """`totals` of earlier starts of the same run. `within`: what a phase is entered in, too."""
        self.totals = dict(totals or {})
        self.longest: dict[str, float] = {}
        """Seconds of the longest single stay in each phase, since this start."""
        self._step: dict[str, float] = {}
        self._within = within

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time spent inside to `phase`."""
        started = time.monotonic()
        with self._within(phase):
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
    """Appends metrics to the run folder and mirrors them to wandb, as long as that works."""

    def __init__(
        self,
        folder: RunFolder,
        logging: LoggingConfig,
        options: Mapping[str, Any],
        console: Console | None = None,
    ) -> None:
        """`options` are shown beside the run in wandb; `console` is told if wandb fails."""
        self._folder, self._console = folder, console
        self._tracker: Tracker | None = None
        if logging.wandb and folder.writer:
            with self._unharmed():
                self._tracker = open_tracker(
                    "wandb",
                    project=logging.wandb_project,
                    run=folder.path.name,
                    folder=folder.path,
                    options=options,
                    patience_s=PATIENCE_S,
                )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line for `step`."""
        self._folder.append_line("metrics.jsonl", {"step": step, **metrics})
        self._mirror(step, metrics)

    def write_evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line in evaluations.jsonl: a step may be scored at several temperatures."""
        self._folder.append_line("evaluations.jsonl", {"step": step, **metrics})
        self._mirror(step, metrics)

    def close(self) -> None:
        """Finish the sinks."""
        if self._tracker is not None:
            with self._unharmed():
                self._tracker.close()

    def _mirror(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._tracker is not None:
            with self._unharmed():
                self._tracker.log(step, metrics)

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """What wandb raises ends wandb, and not the run."""
        try:
            yield
        # Whatever it is: a service that is down must not cost a training run.
        except Exception as error:
            self._tracker = None
            if self._console is not None:
                what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                self._console.say(
                    f"wandb is off from here on: {what}; nothing is lost, `osft report --sync "
                    f"wandb {self._folder.path}` sends all metrics later"
                )
