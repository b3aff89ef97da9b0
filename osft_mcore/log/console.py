"""Console output of one rank: a progress bar on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table


class Console:
    """Prints if `enabled` (rank 0); every method is silent otherwise."""

    def __init__(self, *, enabled: bool, progress: bool = True) -> None:
        self.enabled = enabled
        # Slurm logs and pipes get a fixed width instead of rich's guess of 80.
        width = None if sys.stdout.isatty() else 120
        self._rich = RichConsole(quiet=not enabled, width=width, highlight=False, soft_wrap=True)
        self._bar = progress and enabled and self._rich.is_terminal

    def say(self, text: str) -> None:
        """One line."""
        self._rich.print(text, markup=False)

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A small table: first column to the left, the rest to the right."""
        table = Table(title=title, title_justify="left")
        for i, name in enumerate(header):
            table.add_column(name, justify="left" if i == 0 else "right")
        for row in rows:
            table.add_row(*row)
        self._rich.print(table)

    @contextlib.contextmanager
    def steps(
        self, name: str, total: int, *, every: int, done: int = 0
    ) -> Iterator["StepProgress"]:
        """Progress over `total` steps; without a terminal a line every `every` steps.

        `done` steps were done before: they say nothing about how long the others take.
        """
        if not self._bar:
            yield StepProgress(self, None, name=name, total=total, every=every, done=done)
            return
        columns = (
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        with Progress(*columns, console=self._rich) as bar:
            yield StepProgress(self, bar, name=name, total=total, every=every, done=done)


class StepProgress:
    """Where a loop reports each step that it finished."""

    def __init__(
        self,
        console: Console,
        bar: Progress | None,
        *,
        name: str,
        total: int,
        every: int,
        done: int,
    ) -> None:
        self._console, self._bar = console, bar
        self._name, self._total, self._every, self._done = name, total, every, done
        self._started = time.monotonic()
        self._task = bar.add_task(name, total=total, completed=done, status="") if bar else None

    def finished(self, step: int, shown: Mapping[str, float]) -> None:
        """Step `step` (from 1) is done; `shown` are the few figures to print."""
        status = "  ".join(f"{name} {value:.4g}" for name, value in shown.items())
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, status=status)
        elif step % self._every == 0 or step == self._total:
            elapsed = time.monotonic() - self._started
            left = elapsed / (step - self._done) * (self._total - step)
            self._console.say(
                f"{self._name} {step}/{self._total}  {status}  "
                f"elapsed {elapsed:.0f}s, left {left:.0f}s"
            )
