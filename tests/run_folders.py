"""Run folders written by hand, with values that a test knows."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

STEPS = 4
OPTIONS: dict[str, Any] = {
    "output_dir": "somewhere",
    "seed": 3,
    "model": {"path": "models/tiny", "dtype": "fp32"},
    "rollout": {"tau_sample": 0.6, "max_response_tokens": 64},
    "algorithm": {"tau_train": 1.0},
    "train": {"steps": STEPS, "clip_grad": 1.0},
    "data": {"prompt_key": "prompt"},
    "evaluation": {"temperature": 1.0, "num_samples": 2},
    "sync": {"max_logprob_diff": None, "mean_logprob_diff": None},
}
MANIFEST: dict[str, Any] = {
    "phase": "train",
    "started": "2026-01-02T03:04:05+00:00",
    "command": ["osft", "train", "seed=3"],
    "host": "host-one",
    "seed": 3,
    "world_size": 2,
    "python": "3.11.9",
    "packages": {"torch": "2.13.0"},
    "data_sha256": {"train.parquet": "ab" * 32},
}


def step_row(step: int) -> dict[str, float]:
    """Every metric that a chart shows."""
    return {
        "step": step,
        "rollout/tau_sample": 0.6,
        "loss/tau_train": 1.0,
        "optim/lr": 1e-6 * step,
        "rollout/response_length_mean": 30.0 + step,
        "rollout/response_length_median": 29.0 + step,
        "rollout/response_length_min": 20.0,
        "rollout/response_length_max": 50.0 + step,
        "rollout/cut_off_ratio": 0.125 * step,
        "loss/loss": 0.5 / step,
        "loss/nll": 0.75 / step,
        "loss/entropy": 0.25 / step,
        "loss/kl": 0.001 * step,
        "optim/grad_norm": 0.9 / step,
        "optim/num_skipped": 0.0,
        "sync/logprob_diff_mean": 1e-7 * step,
        "sync/logprob_diff_max": 2e-5 * step,
        "time/rollout_s": 3.0,
        "time/train_s": 5.0,
        "time/sync_s": 2.0,
        "time/sync_push_s": 1.5,
        "time/sync_pack_s": 0.2,
        "time/sync_transfer_s": 0.4,
        "time/sync_write_s": 0.3,
        "time/sync_verify_s": 0.6,
        "perf/rollout_tokens_per_s": 1000.0 * step,
        "perf/train_tokens_per_s": 2000.0 * step,
        "perf/peak_host_memory_gib": 1.0 + step,
        "perf/peak_gpu_memory_gib": 2.0 + step,
    }


def answer_rows(
    correct: Sequence[Sequence[bool]], *, source: str = "sums", text: str = "it is 4"
) -> list[dict[str, Any]]:
    """By problem and sample."""
    return [
        {
            "data_source": source, "prompt_id": f"p{problem}", "sample_index": sample,
            "text": text, "ground_truth": f"{problem}", "prediction": "4", "num_tokens": 7,
            "truncated": False, "score": float(right), "correct": right, "status": "ok",
            "reason": "",
        }
        for problem, samples in enumerate(correct)
        for sample, right in enumerate(samples)
    ]  # fmt: skip


def result_json(
    step: int, tau: float, scores: Mapping[int, tuple[float, float, float]], *, source: str = "sums"
) -> dict[str, Any]:
    """As an evaluation leaves it: pass@k with bounds, by k."""
    figures = {
        str(k): {"value": value, "ci95": [low, high]} for k, (value, low, high) in scores.items()
    }
    return {
        "step": step,
        "temperature": tau,
        "num_samples": max(scores),
        "pass_at_1": figures["1"],
        "benchmarks": {source: {"pass@k": figures}},
    }


def write_lines(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_run(
    folder: Path,
    *,
    rows: Iterable[Mapping[str, Any]] | None = None,
    options: Mapping[str, Any] = OPTIONS,
    manifest: Mapping[str, Any] = MANIFEST,
    summary: Mapping[str, Any] | None = None,
) -> Path:
    """A run that trained for four steps, without scores."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(options)), encoding="utf-8")
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    rows = [step_row(step) for step in range(1, STEPS + 1)] if rows is None else rows
    write_lines(folder / "metrics.jsonl", rows)
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    return folder


def add_scores(
    folder: Path,
    step: int,
    tau: float,
    correct: Sequence[Sequence[bool]],
    *,
    source: str = "sums",
    text: str = "it is 4",
) -> None:
    """Answers alone: what is to be said about them the report finds by itself."""
    file = folder / "evaluations" / f"step_{step}_temperature_{tau:g}.jsonl"
    write_lines(file, answer_rows(correct, source=source, text=text))


def add_result(folder: Path, step: int, tau: float, *scores: tuple[float, float, float]) -> None:
    """A result file alone: pass@1, pass@2, pass@4 with their bounds."""
    file = folder / "evaluations" / f"step_{step}_temperature_{tau:g}.json"
    file.parent.mkdir(exist_ok=True)
    by_k = {2**power: found for power, found in enumerate(scores)}
    file.write_text(json.dumps(result_json(step, tau, by_k)), encoding="utf-8")
