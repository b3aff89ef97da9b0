"""What a run folder holds, read with care: files may be absent, cut off, or of an older version."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from osft_mcore.errors import ConfigError

MARKS: Final = ("manifest.json", "metrics.jsonl", "evaluations.jsonl")
"""A folder with one of these is a run's."""
_NAME: Final = re.compile(r"step_(\d+)_temperature_([\d.e+-]+)\.jsonl?")
_HARNESS: Final = re.compile(r"step_(\d+)_lm_eval\.json")
Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One run folder. What is absent is empty."""

    path: Path
    name: str
    options: Json
    """config.yaml."""
    manifest: Json
    summary: Json
    metrics: tuple[Json, ...]
    """One a step, in the order of steps."""
    evaluations: tuple[Json, ...]
    """Lines of evaluations.jsonl."""
    results: Mapping[tuple[int, float], Json]
    """evaluations/*.json, by step and temperature."""
    answers: Mapping[tuple[int, float], Path]
    """Files with every answer."""
    harness: Mapping[int, Json]
    """What lm-evaluation-harness found, by step."""
    skipped: tuple[Json, ...]
    """Skipped updates."""
    problems: tuple[str, ...]
    """What could not be read."""

    @property
    def phase(self) -> str:
        """`train`, `sft`, `generate`, `evaluate`; empty if nothing says so."""
        return str(self.manifest.get("phase", ""))

    @property
    def finished(self) -> bool:
        """It has written its summary."""
        return bool(self.summary)

    @property
    def last_step(self) -> int:
        """The last one with metrics; 0 if none has."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    def option(self, name: str) -> Any:
        """An option by its dotted name; None if config.yaml does not have it."""
        value: Any = self.options
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return value

    def figure(self, name: str) -> float | None:
        """An option that is a finite number; None if it is none."""
        return finite({name: self.option(name)}, name)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Raises ConfigError with every path that is no run."""
    refused = [
        f"RUN: {str(path)!r} is no run folder: found none of {', '.join(MARKS)} in it"
        for path in paths
        if not any((path / mark).is_file() for mark in MARKS)
    ]
    if refused:
        raise ConfigError(refused)
    names = _short_names([path.resolve() for path in paths])
    return [read_run(path, name) for path, name in zip(paths, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    """One folder, whatever state it is in."""
    problems: list[str] = []
    metrics = {row["step"]: row for row in _lines(path / "metrics.jsonl", problems)}
    folder = path / "evaluations"
    return Run(
        path=path,
        name=name,
        options=_object(path / "config.yaml", problems),
        manifest=_object(path / "manifest.json", problems),
        summary=_object(path / "summary.json", problems),
        # A run that was killed and goes on without a checkpoint may have a step twice.
        metrics=tuple(metrics[step] for step in sorted(metrics)),
        evaluations=tuple(_lines(path / "evaluations.jsonl", problems)),
        results={
            at: found
            for at, file in _at_steps(folder, "json")
            if (found := _object(file, problems))
        },
        answers=dict(_at_steps(folder, "jsonl")),
        harness=dict(_harness(folder, problems)),
        skipped=tuple(
            found
            for file in sorted((path / "skipped").glob("step_*.json"))
            if (found := _object(file, problems))
        ),
        problems=tuple(problems),
    )


def number(row: Json, name: str) -> float | None:
    """A figure of a row; None if it has none."""
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        # A whole number of more than 308 digits.
        return None


def finite(row: Json, name: str) -> float | None:
    """The same; None also for NaN and infinity."""
    value = number(row, name)
    return value if value is not None and math.isfinite(value) else None


def json_rows(file: Path) -> Iterator[Json | None]:
    """The JSON objects of a file's lines; None for a line that is none."""
    with file.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else None


def _lines(file: Path, problems: list[str]) -> Iterator[Json]:
    """Rows with a step. The last line may be cut off: the run is writing, or was killed."""
    if not file.is_file():
        return
    rows = list(json_rows(file))
    for number_of_line, row in enumerate(rows, start=1):
        if row is not None and isinstance(row.get("step"), int):
            yield row
        elif number_of_line < len(rows):
            problems.append(f"{file.name}, line {number_of_line}: cannot be read")


def _object(file: Path, problems: list[str]) -> Json:
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if file.suffix == ".yaml" else json.loads(text)
    except (ValueError, yaml.YAMLError, RecursionError, OSError):
        found = None
    if not isinstance(found, dict):
        problems.append(f"{file.name}: cannot be read")
        return {}
    return found


def _harness(folder: Path, problems: list[str]) -> Iterator[tuple[int, Json]]:
    files = ((_HARNESS.fullmatch(file.name), file) for file in folder.glob("step_*_lm_eval.json"))
    for step, file in sorted((int(match[1]), file) for match, file in files if match):
        if found := _object(file, problems):
            yield step, found


def _at_steps(folder: Path, suffix: str) -> list[tuple[tuple[int, float], Path]]:
    found = []
    for file in folder.glob(f"step_*_temperature_*.{suffix}"):
        if match := _NAME.fullmatch(file.name):
            found.append(((int(match[1]), float(match[2])), file))
    return sorted(found)


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The last part of every path; as many parts as it takes to tell them apart."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{path} ({i})" for i, path in enumerate(paths, start=1)]
