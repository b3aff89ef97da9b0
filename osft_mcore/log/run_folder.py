"""The folder of one run: config.yaml, manifest.json, metrics.jsonl, rollouts/, summary.json."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from osft_mcore.errors import ConfigError


class RunFolder:
    """Written by one rank (`writer`); the others keep the same calls and write nothing."""

    def __init__(self, path: str | Path, *, writer: bool) -> None:
        self.path, self.writer = Path(path), writer

    def check_unused(self) -> None:
        """Raise ConfigError if the path holds a run already or is not a folder."""
        if self.path.exists() and not self.path.is_dir():
            raise ConfigError(
                f"output_dir: {str(self.path)!r} is a file; expected a folder to create"
            )
        if (self.path / "manifest.json").exists():
            raise ConfigError(
                f"output_dir: {str(self.path)!r} already holds a run; choose another or remove it"
            )

    def create(self) -> None:
        """Make the folder."""
        if self.writer:
            self.path.mkdir(parents=True, exist_ok=True)

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
