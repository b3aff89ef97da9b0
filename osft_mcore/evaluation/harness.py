"""lm-evaluation-harness: what it is asked, and what its numbers mean; pure.

It is a program of its own, an optional package, started as a child process (train/harness.py).
"""

import math
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final, Literal

from osft_mcore.errors import ConfigError

Json = Mapping[str, Any]
Backend = Literal["hf", "vllm"]
BACKENDS: Final[tuple[Backend, ...]] = ("hf", "vllm")
VALUED: Final = (
    "--num_fewshot",
    "--limit",
    "--batch_size",
    "--max_batch_size",
    "--gen_kwargs",
    "--system_instruction",
    "--seed",
    "--device",
    "--include_path",
)
SWITCHES: Final = ("--apply_chat_template", "--fewshot_as_multiturn", "--log_samples")
"""With VALUED and --model all that is passed on. What runs foreign code, uploads, or names another
model or place for results is not."""
_COUNT: Final = "[1-9][0-9]*"
_SEED: Final = r"\s*(?:[0-9]+|[Nn]one)\s*"
NUMBERS: Final[Mapping[str, tuple[str, str]]] = MappingProxyType(
    {
        "--num_fewshot": ("[0-9]+", "a whole number"),
        "--limit": (
            r"(?=.*[1-9])(?:[0-9]+(?:\.0*)?|0?\.[0-9]+)",
            "a whole number of problems above 0, or a share of them below 1",
        ),
        "--batch_size": (f"{_COUNT}|auto(?::{_COUNT})?", "a whole number above 0, auto or auto:N"),
        "--max_batch_size": (_COUNT, "a whole number above 0"),
        "--seed": (f"{_SEED}(?:,{_SEED}){{2,3}}|{_SEED}", "one whole number or None, or four"),
    }
)
"""What the harness takes, which it would say only after the models were scored."""
DTYPES: Final = {"fp32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Harness:
    """What `osft evaluate --lm-eval` was asked for."""

    tasks: tuple[str, ...]
    """Names, or paths of task files (.yaml)."""
    backend: Backend
    arguments: tuple[str, ...] = ()
    """Of the harness, beyond model, tasks and output."""

    @property
    def include_path(self) -> str:
        """A folder with more tasks; empty if there is none."""
        pairs = zip(self.arguments, self.arguments[1:], strict=False)
        return next((value for name, value in pairs if name == "--include_path"), "")


def parse_harness(tasks: str, arguments: str, *, usual: Backend) -> Harness:
    """From the values of --lm-eval and --lm-eval-args. Raises ConfigError with all mistakes."""
    problems = []
    names = tuple(dict.fromkeys(name.strip() for name in tasks.split(",")))
    if "" in names:
        problems.append(f"--lm-eval: found {tasks!r}, expected task names separated by commas")
    backend, passed = usual, []
    try:
        words = iter(shlex.split(arguments))
    except ValueError as error:
        raise ConfigError([*problems, f"--lm-eval-args: {error}"]) from None
    for word in words:
        name, has_value, value = word.partition("=")
        if name in SWITCHES and not has_value:
            passed.append(name)
        elif name in (*VALUED, "--model"):
            value = value if has_value else next(words, "")
            if problem := _problem(name, value):
                problems.append(f"--lm-eval-args: {problem}")
            elif name == "--model":
                backend = "hf" if value == "hf" else "vllm"
            else:
                passed += [name, value]
        else:
            known = ", ".join(("--model", *VALUED, *SWITCHES))
            problems.append(f"--lm-eval-args: {word!r} is not passed on; known: {known}")
    if problems:
        raise ConfigError(problems)
    return Harness(tasks=names, backend=backend, arguments=tuple(passed))


def _problem(name: str, value: str) -> str:
    """Why `name` cannot have this value; empty if it can."""
    if not value or value.startswith("--"):
        return f"{name} has no value"
    if name == "--model" and value not in BACKENDS:
        return f"--model is {value!r}, expected hf or vllm"
    if name in NUMBERS and not re.fullmatch(NUMBERS[name][0], value):
        return f"{name} is {value!r}, expected {NUMBERS[name][1]}"
    return ""


def options_file(
    harness: Harness,
    tasks: Sequence[str],
    *,
    model: str,
    dtype: str,
    tp: int,
    output: str,
    trust_remote_code: bool,
) -> dict[str, Any]:
    """What the harness reads with --config; as a file, because a path may hold any character."""
    model_args: dict[str, Any] = {
        "pretrained": model,
        "dtype": DTYPES[dtype],
        "trust_remote_code": trust_remote_code,
    }
    if harness.backend == "vllm":
        model_args["tensor_parallel_size"] = tp
    return {
        "model": harness.backend,
        "model_args": model_args,
        "tasks": list(tasks),
        "output_path": output,
    }


def result_rows(found: Json) -> list[dict[str, Any]]:
    """One row for every task and metric of the harness's own results file.

    `value` and `stderr` are None where it has no finite number. `within`: the group that a task is
    a part of, None for what was asked for itself. Raises ValueError if it is no such file.
    """
    if not isinstance(results := found.get("results"), dict):
        raise ValueError("no results in it")
    subtasks = _object(found, "group_subtasks")
    groups = {str(name): group for group, names in subtasks.items() for name in names or ()}
    return [
        row
        for task, metrics in results.items()
        if isinstance(metrics, dict)
        for row in _rows_of(found, str(task), metrics, groups.get(str(task)))
    ]


def _rows_of(found: Json, task: str, metrics: Json, within: str | None) -> Iterator[dict[str, Any]]:
    samples = _object(_object(found, "n-samples"), task)
    directions = _object(_object(found, "higher_is_better"), task)
    for key, value in metrics.items():
        metric, comma, rule = key.partition(",")
        if not comma or metric.endswith("_stderr"):
            continue
        yield {
            "task": task,
            "metric": metric,
            "filter": rule,
            "value": _finite(value),
            "stderr": _finite(metrics.get(f"{metric}_stderr,{rule}")),
            "num_fewshot": _object(found, "n-shot").get(task),
            "num_samples": samples.get("effective"),
            "higher_is_better": directions.get(metric),
            "task_version": _object(found, "versions").get(task),
            "within": within,
        }


def merged(before: Sequence[Json], new: Sequence[Json]) -> list[Json]:
    """Rows of both; of the same task, metric and filter the new one."""
    return list({row_key(row): row for row in (*before, *new)}.values())


def row_key(row: Json) -> tuple[str, str, str]:
    """What tells a row apart from the others of a step."""
    return str(row.get("task")), str(row.get("metric")), str(row.get("filter"))


def metric_name(row: Json) -> str:
    """The metric, with the filter that picked the answers, if there was one."""
    rule = row.get("filter")
    return f"{row.get('metric')}" + ("" if rule in ("none", "", None) else f" ({rule})")


def summary(by_step: Mapping[int, Json]) -> dict[str, dict[str, dict[str, float | None]]]:
    """Values by step, task and metric, without the parts of groups."""
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for step, kept in by_step.items():
        tasks = found.setdefault(str(step), {})
        for row in kept["results"]:
            if row.get("within") is None:
                tasks.setdefault(row["task"], {})[metric_name(row)] = row["value"]
    return found


def _object(found: Json, name: str) -> Json:
    value = found.get(name)
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
