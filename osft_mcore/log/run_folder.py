"""The folder of one run: config.yaml, manifest.json, metrics.jsonl, rollouts/, summary.json."""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from osft_mcore.errors import ConfigError

LOGS: Final = ("metrics.jsonl", "evaluations.jsonl")
"""One line a step, or a few."""
PER_STEP: Final = ("rollouts", "evaluations", "skipped")
"""Folders with files named step_N..."""


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
        for name in (*LOGS, *PER_STEP, "config.yaml", "manifest.json"):
            if (self.path / name).exists():
                os.replace(self.path / name, aside / name)
        return aside

    def keep_until(self, step: int, *, last: bool) -> None:
        """Forget what was written about later steps: they are done again.

        `last`: no step is left, so that the closing evaluation of this one is done again as well.
        """
        if not self.writer:
            return
        for name in LOGS:
            limit = step - 1 if last and name == "evaluations.jsonl" else step
            if (self.path / name).exists():
                self.write_lines(name, [r for r in self.read_lines(name) if r["step"] <= limit])
        for folder in PER_STEP:
            for path in (self.path / folder).glob("step_*"):
                number = re.match(r"step_(\d+)", path.name)
                if number and int(number.group(1)) > step:
                    path.unlink()
        (self.path / "summary.json").unlink(missing_ok=True)

    def read_lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON objects of file `name`; empty if there is none."""
        path = self.path / name
        return list(_rows(path)) if path.exists() else []

    def write_text(self, name: str, text: str) -> None:
        """Replace file `name` in one step: a reader sees the old or the new, never half."""
        if self.writer:
            target = self.path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(target.name + ".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, target)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Replace file `name` by `value` as indented JSON."""
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def write_lines(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        """Replace file `name` by one JSON object a line."""
        self.write_text(name, "".join(json.dumps(row) + "\n" for row in rows))

    def append_line(self, name: str, row: Mapping[str, Any]) -> None:
        """Append one JSON object; flushed, so that a killed run keeps its history."""
        if self.writer:
            with (self.path / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a log; one that a killed run did not finish is its last."""
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            yield json.loads(line)
        except ValueError:
            return
