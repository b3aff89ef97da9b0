"""The folder of one run: config.yaml, manifest.json, metrics.jsonl, rollouts/, summary.json."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from osft_mcore.errors import CheckpointError, ConfigError
from osft_mcore.files import rename, replace_file, write_file

REPORT: Final = "report.html"
EVALUATOR_LOG: Final = "evaluator.log"
"""What the process of evaluation.mode=async has said."""
ASKED: Final = "asked.jsonl"
"""Evaluations that the process of evaluation.mode=async was asked for, or was not."""
LOGS: Final = ("metrics.jsonl", "evaluations.jsonl", ASKED)
"""One line a step, or a few."""
PER_STEP: Final = ("rollouts", "evaluations", "skipped")
"""Folders with files named step_N..."""
BATCHES: Final = "batches"
"""What `osft generate` has sampled so far, until it has all."""


class RunFolder:
    """Written by one rank (`writer`); the others keep the same calls and write nothing."""

    def __init__(self, path: str | Path, *, writer: bool) -> None:
        self.path, self.writer = Path(path), writer

    def check_is_folder(self) -> None:
        """Raise ConfigError if the path is something else."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"output_dir: {str(self.path)!r} is a file; expected a folder to create"
            )

    def check_unused(self) -> None:
        """Raise ConfigError if the path holds a run already."""
        if (self.path / "manifest.json").exists():
            raise ConfigError(
                f"output_dir: {str(self.path)!r} already holds a run; choose another, remove it, "
                "or go on with it (checkpoint.resume=auto)"
            )

    def create(self) -> None:
        """Make the folder."""
        if self.writer:
            self.path.mkdir(parents=True, exist_ok=True)

    def put_aside(self) -> Path | None:
        """Move a run that left no checkpoint into unfinished_N/; None if there is none."""
        if not self.writer or not (self.path / "manifest.json").exists():
            return None
        number = 1
        while (aside := self.path / f"unfinished_{number}").exists():
            number += 1
        aside.mkdir()
        others = (BATCHES, "hf", REPORT, EVALUATOR_LOG, "config.yaml", "manifest.json")
        for name in (*LOGS, *PER_STEP, *others):
            if (self.path / name).exists():
                os.replace(self.path / name, aside / name)
        return aside

    def keep_until(self, step: int, *, last: bool) -> list[str]:
        """Forget what was written about later steps: they are done again.

        `last`: no step is left, so that the closing evaluation of this one is done again as well.
        Returns where lines could not be read; the last one of a file may be cut off.
        """
        if not self.writer:
            return []
        lost = []
        for name in LOGS:
            limit = step - 1 if last and name == "evaluations.jsonl" else step
            if (self.path / name).exists():
                rows = _rows(self.path / name)
                lost += [f"{name}, line {number}" for number, row in rows[:-1] if row is None]
                kept = [row for _, row in rows if row is not None and row["step"] <= limit]
                self.write_lines(name, kept)
        for folder in PER_STEP:
            for path in (self.path / folder).glob("step_*"):
                number = re.match(r"step_(\d+)", path.name)
                if number and int(number.group(1)) > step:
                    path.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)
        return lost

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON objects of file `name`; empty if there is none."""
        path = self.path / name
        rows = _rows(path) if path.exists() else []
        return [row for _, row in rows if row is not None]

    def write_text(self, name: str, text: str) -> None:
        """Replace file `name` in one step: a reader sees the old or the new, never half.

        Raises CheckpointError if it cannot be written.
        """
        if self.writer:
            target = self.path / name
            with _told(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                replace_file(target, text.encode())

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace file `name` by `value` as indented JSON."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace file `name` by one JSON object a line."""
        self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def join(self, name: str, parts: Sequence[str]) -> None:
        """Replace file `name` by the files `parts`, one after the other, as `write_text` does."""
        if self.writer:
            target = self.path / name
            temporary = target.with_name(target.name + ".tmp")
            with _told(target):
                write_file(temporary, ((self.path / part).read_bytes() for part in parts))
                rename(temporary, target)

    def append_line(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one JSON object; flushed, so that a killed run keeps its history.

        Raises CheckpointError if it cannot be written.
        """
        if self.writer:
            with _told(self.path / name), (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


@contextmanager
def _told(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"output_dir: {path} cannot be written: {error.strerror}; the run can go on from its "
            "newest checkpoint"
        ) from error


def _rows(path: Path) -> list[tuple[int, dict[str, Any] | None]]:
    """The lines of a log with their numbers, from 1; None for one that is no JSON object."""
    rows: list[tuple[int, dict[str, Any] | None]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        rows.append((number, row if isinstance(row, dict) else None))
    return rows
