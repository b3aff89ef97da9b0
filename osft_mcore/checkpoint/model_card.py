"""README.md of an exported model: what it was trained from, with what, and how it scores."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

_TAGS: Final = ("osft-mcore", "online-sft", "megatron-core")
_HUB_FOLDER: Final = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_PLANNED: Final = (
    ("seed", "seed"),
    ("sampling temperature", "rollout.tau_sample"),
    ("training temperature", "algorithm.tau_train"),
    ("learning rate", "train.lr"),
    ("prompts per update", "train.prompts_per_update"),
    ("dtype", "model.dtype"),
)
"""Options that the card shows, by the words it uses for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What a run folder says about a model; what it does not say is empty."""

    step: int
    num_steps: int | None
    """Of the whole run."""
    options: Mapping[str, Any]
    """config.yaml."""
    config_sha256: str
    manifest: Mapping[str, Any]
    summary: Mapping[str, Any]
    metrics: Mapping[str, Any]
    """Of `step`."""
    evaluations: Sequence[Mapping[str, Any]]
    """In the order in which they were made."""


def read_provenance(run: str | Path | None, *, step: int) -> Provenance:
    """What the run folder says about the model after `step`; None: the run is not known.

    Pieces that are absent or damaged are left empty.
    """
    config = _content(run, "config.yaml")
    summary = _json(_content(run, "summary.json"))
    rows = [row for row in _lines(_content(run, "metrics.jsonl")) if row.get("step") == step]
    return Provenance(
        step=step,
        num_steps=summary.get("steps"),
        options=_options(config),
        config_sha256=hashlib.sha256(config).hexdigest() if config else "",
        manifest=_json(_content(run, "manifest.json")),
        summary=summary,
        metrics=rows[-1] if rows else {},
        evaluations=_lines(_content(run, "evaluations.jsonl")),
    )


def model_card(provenance: Provenance, *, name: str) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads."""
    at = provenance
    base = str(_option(at.options, "model.path") or "")
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": hub_id(base)} if hub_id(base) else {}),
        "tags": list(_TAGS),
    }
    supervised = "sft" in at.manifest.get("command", ())[1:2]
    method = (
        "supervised fine-tuning on given answers"
        if supervised
        else "online supervised fine-tuning (OSFT, arXiv 2510.18814): the model is trained on its "
        "own answers, sampled at a low temperature, without a reward"
    )
    return "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# {name}",
            "",
            f"Trained with osft-mcore by {method}.",
            "",
            "## Provenance",
            "",
            *_table(("what", "value"), _provenance_rows(at, base)),
            "",
            "## Evaluation",
            "",
            *_evaluation(at),
            "",
            "Card and licence of the base model, where it has them, are in the files whose names "
            "start with `BASE_MODEL_`.",
            "",
        ]
    )


def hub_id(path: str) -> str:
    """`owner/name` of a model in a Hugging Face hub cache; empty for any other folder."""
    match = next(filter(None, map(_HUB_FOLDER.fullmatch, Path(path).parts)), None)
    return f"{match[1]}/{match[2]}" if match else ""


def _provenance_rows(at: Provenance, base: str) -> Iterator[tuple[str, str]]:
    unknown = "not recorded"
    yield "base model", f"`{base}`" if base else unknown
    of = f" of {at.num_steps}" if at.num_steps else ""
    yield "step", f"{at.step}{of}"
    yield "SHA-256 of config.yaml", f"`{at.config_sha256}`" if at.config_sha256 else unknown
    hashes = at.manifest.get("data_sha256") or {}
    for file, sha256 in hashes.items():
        yield f"SHA-256 of `{file}`", f"`{sha256}`"
    if not hashes:
        yield "SHA-256 of the data", unknown
    yield "source commit", f"`{at.manifest.get('git_commit') or unknown}`"
    for words, option in _PLANNED:
        value = _option(at.options, option)
        yield words, unknown if value is None else str(value)
    if "loss/nll" in at.metrics:
        yield "negative log-likelihood of the last batch", f"{at.metrics['loss/nll']:.4g}"
    packages = at.manifest.get("packages") or {}
    yield "packages", ", ".join(f"{name} {v}" for name, v in packages.items()) or unknown


def _evaluation(at: Provenance) -> Iterator[str]:
    """The scores of this step beside those of the start."""
    shown = [row for row in at.evaluations if row.get("step") in (0, at.step)]
    if not any(row.get("step") == at.step for row in shown):
        yield f"The model after step {at.step} was not evaluated."
        yield ""
    if not shown:
        return
    scores = list(dict.fromkeys(key for row in shown for key in row if "/pass@" in key))
    header = ("step", "temperature", *(key.removeprefix("eval/") for key in scores))
    yield from _table(header, (_scores(row, scores) for row in shown))
    interval = at.summary.get("gain_ci95")
    if interval and at.num_steps == at.step:
        yield ""
        yield (
            f"Gain in pass@1 over the base model at the same temperature: "
            f"{100 * at.summary['gain']:+.1f} points, 95% interval {100 * interval[0]:+.1f} to "
            f"{100 * interval[1]:+.1f} (paired bootstrap over problems)."
        )


def _scores(row: Mapping[str, Any], keys: Sequence[str]) -> list[str]:
    step = "0 (base model)" if row["step"] == 0 else str(row["step"])
    values = [f"{100 * row[key]:.1f}%" if key in row else "not evaluated" for key in keys]
    return [step, f"{row.get('eval/temperature', 0.0):g}", *values]


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _option(options: Mapping[str, Any], dotted: str) -> Any:
    value: Any = options
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _options(content: bytes) -> dict[str, Any]:
    try:
        value = yaml.safe_load(content)
    except yaml.YAMLError:
        return {}
    return value if isinstance(value, dict) else {}


def _content(run: str | Path | None, name: str) -> bytes:
    path = None if run is None else Path(run) / name
    return path.read_bytes() if path is not None and path.is_file() else b""


def _json(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _lines(content: bytes) -> list[dict[str, Any]]:
    """The JSON objects of a file; a last line that a crash cut off is left out."""
    return [row for line in content.splitlines() if (row := _json(line))]
