"""README.md of an exported model: what it was trained from, with what, and how it scores."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeGuard

import yaml

from osft_mcore.checkpoint.folder import STATE
from osft_mcore.checkpoint.manifest import MANIFEST
from osft_mcore.config.schema import AnnealingConfig
from osft_mcore.config.temperature import sampling_words

_TAGS: Final = ("osft-mcore", "megatron-core")
_METHODS: Final = {
    "train": "online supervised fine-tuning (OSFT, arXiv 2510.18814): the model is trained on its "
    "own answers, sampled at a low temperature, without a reward",
    "sft": "supervised fine-tuning on given answers",
}
"""By the command of the run."""
_EM_FT: Final = "minimising its entropy over its own answers (EM-FT), without a reward"
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
_OF_SAMPLING: Final = ("rollout.tau_sample",)
"""`osft sft` does not use them."""
_OWN: Final = ("seed", "model.path", "data.train")
"""Options that no start of a run changes."""
_UNKNOWN: Final = "not recorded"
_MISSING: Final = "not evaluated"


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """What run folder and checkpoint say about a model; what they do not say is empty."""

    step: int
    num_steps: int | None
    """Of the whole run."""
    phase: str
    """`train` or `sft`."""
    options: Mapping[str, Any]
    """What the checkpoint keeps of them, or config.yaml."""
    options_from: str
    """Where `options` are from, if they are not those of config.yaml."""
    config_sha256: str
    data_sha256: Mapping[str, str]
    """By file."""
    resharded_from: str
    """The checkpoint that had another layout."""
    manifest: Mapping[str, Any]
    """The run's."""
    summary: Mapping[str, Any]
    metrics: Mapping[str, Any]
    """Of `step`."""
    evaluations: Sequence[Mapping[str, Any]]
    """In the order in which they were made."""


def read_provenance(
    run: str | Path | None, *, step: int, checkpoint: str | Path | None = None
) -> Provenance:
    """What the run folder says about the model after `step`; None: the run is not known.

    `checkpoint` knows its own options best: config.yaml is that of the run's latest start. If it is
    not of this run, the run is not asked. Pieces that are absent or damaged are left empty.
    """
    state = _json(_content(checkpoint, STATE))
    kept = _section(state, "options")
    options = _options(_content(run, "config.yaml"))
    if kept and options and any(_option(kept, key) != _option(options, key) for key in _OWN):
        run, options = None, {}
    config = _content(run, "config.yaml")
    manifest, summary = (_json(_content(run, name)) for name in ("manifest.json", "summary.json"))
    rows = [row for row in _lines(_content(run, "metrics.jsonl")) if row.get("step") == step]
    return Provenance(
        step=step,
        num_steps=summary.get("steps"),
        phase=str(manifest.get("phase") or state.get("phase") or ""),
        options=kept or options,
        options_from=f"the checkpoint's {STATE}" if kept and kept != options else "",
        config_sha256=hashlib.sha256(config).hexdigest() if config else "",
        data_sha256=_section(manifest, "data_sha256") or _data_of(state),
        resharded_from=str(_json(_content(checkpoint, MANIFEST)).get("resharded_from", "")),
        manifest=manifest,
        summary=summary,
        metrics=rows[-1] if rows else {},
        evaluations=_lines(_content(run, "evaluations.jsonl")),
    )


def model_card(provenance: Provenance, *, name: str) -> str:
    """The text of README.md, with the front matter that the Hugging Face hub reads."""
    at = provenance
    base = "" if _is_random(at) else hub_id(str(_option(at.options, "model.path") or ""))
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        **({"base_model": base} if base else {}),
        "tags": [*_TAGS, *(["online-sft"] if at.phase == "train" else [])],
    }
    is_entropy = _option(at.options, "algorithm.objective") == "entropy"
    method = _EM_FT if is_entropy else _METHODS.get(at.phase)
    whose = "model that the configuration is of" if _is_random(at) else "base model"
    text = "\n".join(
        [
            "---",
            yaml.safe_dump(front, sort_keys=False).strip(),
            "---",
            "",
            f"# {name}",
            "",
            f"Trained with osft-mcore by {method}." if method else "Trained with osft-mcore.",
            "",
            "## Provenance",
            "",
            *_table(("what", "value"), _provenance_rows(at)),
            "",
            "## Evaluation",
            "",
            *_evaluation(at),
            "",
            f"Card and licence of the {whose}, where it has them, are in the files whose names "
            "start with `BASE_MODEL_`.",
            "",
        ]
    )
    # JSON can hold halves of characters, which no file can.
    return text.encode(errors="replace").decode()


def hub_id(path: str) -> str:
    """`owner/name` of a model in a Hugging Face hub cache; empty for any other folder."""
    match = next(filter(None, map(_HUB_FOLDER.fullmatch, Path(path).parts)), None)
    return f"{match[1]}/{match[2]}" if match else ""


def _is_random(at: Provenance) -> bool:
    """True if the run took of model.path only what the model looks like."""
    return bool(_option(at.options, "model.init") == "random")


def _start(at: Provenance) -> str:
    """What step 0 is called."""
    return "random weights" if _is_random(at) else "base model"


def _provenance_rows(at: Provenance) -> Iterator[tuple[str, str]]:
    path = str(_option(at.options, "model.path") or "")
    base = f"`{path}`" if path else _UNKNOWN
    yield "base model", f"random weights, configuration of {base}" if _is_random(at) else base
    of = f" of {at.num_steps}" if at.num_steps else ""
    yield "step", f"{at.step}{of}"
    if at.resharded_from:
        yield "resharded from", f"`{at.resharded_from}`"
    if at.options_from:
        yield "options", f"from {at.options_from}"
    yield "SHA-256 of config.yaml", f"`{at.config_sha256}`" if at.config_sha256 else _UNKNOWN
    for file, sha256 in at.data_sha256.items():
        yield f"SHA-256 of `{file}`", f"`{sha256}`"
    if not at.data_sha256:
        yield "SHA-256 of the data", _UNKNOWN
    yield "source commit", f"`{at.manifest.get('git_commit') or _UNKNOWN}`"
    for words, option in _PLANNED:
        if at.phase == "sft" and option in _OF_SAMPLING:
            continue
        value = _planned(at.options, option)
        yield words, _UNKNOWN if value is None else str(value)
    coef = _option(at.options, "algorithm.kl_coef")
    if _is_number(coef) and coef > 0:
        folder = _option(at.options, "algorithm.reference")
        whose = f"`{folder}`" if folder else "the model that the run started from"
        kind = _option(at.options, "algorithm.kl_kind")
        yield "KL penalty", f"{coef:g} times {kind}, reference: {whose}"
    if _is_number(at.metrics.get("loss/nll")):
        yield "negative log-likelihood of the last batch", f"{at.metrics['loss/nll']:.4g}"
    packages = _section(at.manifest, "packages")
    yield "packages", ", ".join(f"{name} {v}" for name, v in packages.items()) or _UNKNOWN


def _planned(options: Mapping[str, Any], option: str) -> Any:
    if option == "rollout.tau_sample" and (words := _annealed(options)):
        return words
    if option == "algorithm.tau_train" and _option(options, "algorithm.follow_tau_sample"):
        return "the sampling temperature of each step"
    return _option(options, option)


def _annealed(options: Mapping[str, Any]) -> str:
    """From which sampling temperature to which; empty if it stays, or is not known well enough."""
    start = _option(options, "rollout.tau_sample")
    annealing = _section(_section(options, "rollout"), "annealing")
    mode, end = annealing.get("mode"), annealing.get("end_tau")
    length = (annealing.get("steps"), annealing.get("epochs"))
    steps, epochs = (at if isinstance(at, int) else None for at in length)
    if mode not in ("linear", "cosine") or not (_is_number(start) and _is_number(end)):
        return ""
    if steps is None and epochs is None:
        return f"{start:g} to {end:g}, {mode}"
    found = AnnealingConfig(mode=mode, end_tau=end, steps=steps, epochs=epochs or 0)
    return sampling_words(start, found)


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
    yield from _table(header, (_scores(row, scores, start=_start(at)) for row in shown))
    gain, interval = at.summary.get("gain"), at.summary.get("gain_ci95")
    if _is_interval(interval) and _is_number(gain) and at.num_steps == at.step:
        yield ""
        yield (
            f"Gain in pass@1 over the {_start(at)} at the same temperature: "
            f"{100 * gain:+.1f} points, 95% interval {100 * interval[0]:+.1f} to "
            f"{100 * interval[1]:+.1f} (paired bootstrap over problems)."
        )


def _scores(row: Mapping[str, Any], keys: Sequence[str], *, start: str) -> list[str]:
    step = f"0 ({start})" if row["step"] == 0 else str(row["step"])
    values = [f"{100 * row[key]:.1f}%" if _is_number(row.get(key)) else _MISSING for key in keys]
    temperature = row.get("eval/temperature", 0.0)
    return [step, f"{temperature:g}" if _is_number(temperature) else _UNKNOWN, *values]


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _is_interval(value: Any) -> TypeGuard[Sequence[float]]:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number, value))


def _table(header: Sequence[str], rows: Any) -> Iterator[str]:
    for row in (header, ["---"] * len(header), *rows):
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"


def _option(options: Mapping[str, Any], dotted: str) -> Any:
    value: Any = options
    for key in dotted.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _data_of(state: Mapping[str, Any]) -> dict[str, str]:
    """What a checkpoint says of the training data, under the name that the options have for it."""
    file = _option(_section(state, "options"), "data.train")
    sha256 = _section(state, "identity").get("data.train")
    return {str(file): str(sha256)} if file and sha256 else {}


def _section(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The mapping that `name` holds; empty if it holds none."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def _options(content: bytes) -> dict[str, Any]:
    try:
        value = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError):
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
