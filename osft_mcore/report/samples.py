"""A few answers to read: of training, and of the held-out problems before and after."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

from osft_mcore.report.run import Json, Run, json_rows
from osft_mcore.report.scores import Result, spread, usual_temperature

MAX_CHARS: Final = 20_000
"""Of one text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """One answer and what became of it."""

    title: str
    prompt: str
    """Empty where only the answer was kept."""
    text: str
    verdict: str
    """Empty for training, where nothing is graded."""
    correct: bool


def samples_of(run: Run, results: Sequence[Result], count: int) -> list[Answer]:
    """`count` held-out problems before and after, and as many training answers."""
    return [*_held_out(run, results, count), *_of_training(run, count)] if count > 0 else []


def _held_out(run: Run, results: Sequence[Result], count: int) -> Iterator[Answer]:
    tau = usual_temperature(run, results)
    usual = [r for r in results if r.temperature == tau and (r.step, tau) in run.answers]
    if not usual or tau is None:
        return
    steps = dict.fromkeys((usual[0].step, usual[-1].step))
    firsts = {step: _first_samples(run.answers[step, tau]) for step in steps}
    problems = list(firsts[usual[0].step])
    for source, problem in spread(problems, count):
        for step in steps:
            row = firsts[step].get((source, problem))
            if row is not None:
                yield _graded(row, f"{source}, problem {problem}: step {step}, temperature {tau:g}")


def _first_samples(file: Path) -> dict[tuple[str, str], Json]:
    found: dict[tuple[str, str], Json] = {}
    for row in json_rows(file):
        if row is not None:
            found.setdefault((str(row.get("data_source")), str(row.get("prompt_id"))), row)
    return found


def _graded(row: Json, title: str) -> Answer:
    correct = row.get("correct") is True
    golds = row.get("ground_truth", "")
    # Of a list one is enough.
    expected = " or ".join(map(str, golds)) if isinstance(golds, list) else str(golds)
    said = "correct" if correct else "not correct"
    reason = "" if row.get("status", "ok") == "ok" else f" ({row.get('status')})"
    cut_off = ", cut off" if row.get("truncated") is True else ""
    return Answer(
        title=f"{title}, {row.get('num_tokens', '?')} tokens{cut_off}",
        prompt="",
        text=_cut(str(row.get("text", "")), MAX_CHARS),
        verdict=f"{said}{reason}; expected {_cut(expected, 200)}",
        correct=correct,
    )


def _of_training(run: Run, count: int) -> Iterator[Answer]:
    files = {
        int(match[1]): file
        for file in (run.path / "rollouts").glob("step_*.jsonl")
        if (match := re.fullmatch(r"step_(\d+)\.jsonl", file.name))
    }
    for step in spread(sorted(files), count):
        share = max(1, count // len(files))
        rows: Sequence[Json | None] = list(islice(json_rows(files[step]), share))
        for row in rows:
            if row is not None:
                cut_off = ", cut off" if row.get("truncated") is True else ""
                yield Answer(
                    title=f"training, step {step}, prompt {row.get('prompt_id')}, "
                    f"{row.get('num_tokens', '?')} tokens{cut_off}",
                    prompt=_cut(str(row.get("prompt", "")), MAX_CHARS),
                    text=_cut(str(row.get("response", "")), MAX_CHARS),
                    verdict="",
                    correct=False,
                )


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}\n[{len(text) - limit} more characters]"
