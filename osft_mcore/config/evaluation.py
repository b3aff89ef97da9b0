"""What the options on evaluation name: files, and temperatures; pure."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Final

from osft_mcore.config.schema import ParallelConfig, RunConfig
from osft_mcore.config.schema_evaluation import EvaluationConfig

SPLITS: Final = MappingProxyType({"gsm8k": "gsm8k_test"})
"""Benchmarks whose file is one of several that tools/prepare_data.py writes."""
MAX_SWEEP: Final = 100
"""Temperatures; more are a mistake in the step."""
MAX_CORE: Final = 99_999
"""No machine has a CPU core of a higher number; a slip must not become a list of millions."""


def benchmark_files(config: RunConfig) -> tuple[str, ...]:
    """The files of evaluation.files: a bare name is data.folder/<name>.parquet, but see SPLITS."""
    return tuple(
        str(Path(config.data.folder) / f"{SPLITS.get(name, name)}.parquet")
        if _is_name(name)
        else name
        for name in config.evaluation.files
    )


def of_run(config: RunConfig, run: Path, overrides: Sequence[str]) -> RunConfig:
    """The options of a run, for scoring what it left behind.

    What the overrides do not set: results go into RUN/scores, and a checkpoint that the run began
    from is not looked for again.
    """
    given = {text.lstrip("+").split("=")[0] for text in overrides}
    if "output_dir" not in given:
        config = replace(config, output_dir=str(run / "scores"))
    if "checkpoint.resume" not in given:
        config = replace(config, checkpoint=replace(config.checkpoint, resume="auto"))
    if "evaluation.run" not in given:
        config = replace(config, evaluation=replace(config.evaluation, run=str(run)))
    return config


def of_evaluator(config: RunConfig) -> RunConfig:
    """The options of a run, for the process of evaluation.mode=async beside it.

    It has the ranks of one rollout engine, and speaks to no tracker.
    """
    ranks = ParallelConfig(dp=config.rollout.tp)
    return replace(config, parallel=ranks, logging=replace(config.logging, wandb=False))


def _is_name(file: str) -> bool:
    return bool(file) and "/" not in file and "." not in file


def sweep(text: str) -> tuple[float, ...]:
    """The temperatures of `first:last:step`, both ends among them; () for an empty text.

    Raises ValueError that says what was expected. Steps are counted, not added up, and rounded:
    0.1 has no exact binary form, and an end must not be lost to that.
    """
    if not text:
        return ()
    try:
        first, last, step = (float(part) for part in text.split(":"))
    except ValueError:
        raise ValueError(f"found {text!r}, expected first:last:step, as in 0:1.6:0.1") from None
    if not all(map(math.isfinite, (first, last, step))) or not (0 <= first <= last and step > 0):
        raise ValueError(f"found {text!r}, expected 0 <= first <= last and a step of more than 0")
    count = (last - first) / step
    if count > MAX_SWEEP:
        raise ValueError(f"found {text!r}, which is more than {MAX_SWEEP} temperatures")
    if abs(count - round(count)) > 1e-6:
        raise ValueError(f"found {text!r}, but steps of {step:g} from {first:g} miss {last:g}")
    return tuple(round(first + number * step, 10) for number in range(round(count) + 1))


def gpus(text: str) -> tuple[str, ...]:
    """The GPUs of evaluation.devices; () for none."""
    return tuple(name.strip() for name in text.split(",")) if text else ()


def cores(text: str) -> tuple[int, ...]:
    """The CPU cores of evaluation.devices, `4-7,9`; () for none.

    Raises ValueError that says what was expected.
    """
    found: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = (piece.strip() for piece in part.partition("-"))
        numbers = first.isdecimal() and (last.isdecimal() or not dash)
        if not numbers or not int(first) <= int(last or first) <= MAX_CORE:
            raise ValueError(f"found {text!r}, expected numbers of CPU cores, as in 4-7,9")
        found += range(int(first), int(last or first) + 1)
    if len(set(found)) != len(found):
        raise ValueError(f"found {text!r}, expected different CPU cores, as in 4-7,9")
    return tuple(found)


def start_temperatures(evaluation: EvaluationConfig) -> tuple[float, ...]:
    """What `osft train` scores the starting model at, evaluation.temperature first; may be ()."""
    asked = (evaluation.temperature, *evaluation.baseline_temperatures)
    return tuple(dict.fromkeys(asked)) if evaluation.before else ()


def due(every: int, step: int) -> bool:
    """True on every `every`-th step; never for 0."""
    return every > 0 and step % every == 0


def temperatures(evaluation: EvaluationConfig, *, baseline: bool) -> tuple[float, ...]:
    """What `osft evaluate` scores a model at, evaluation.temperature first.

    `baseline`: it is the starting model.
    """
    more = evaluation.baseline_temperatures if baseline else ()
    return tuple(dict.fromkeys((evaluation.temperature, *more, *sweep(evaluation.sweep))))
