"""What a resumed run must share with the run that it continues, and what may have changed."""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from osft_mcore.actor.start_weights import reference_source
from osft_mcore.config.evaluation import benchmark_files
from osft_mcore.config.load import as_options
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.phases import reads_training_data, trains
from osft_mcore.config.schema import ModelConfig, Phase, RunConfig
from osft_mcore.config.schema_evaluation import SCORERS
from osft_mcore.data.parquet import data_sha256
from osft_mcore.data.tokenizer import tokenizer_files
from osft_mcore.weights.fingerprint import weights_fingerprint

FIXED: Final = (
    "seed",
    "model.dtype",
    "rollout.max_prompt_tokens",
    "train.prompts_per_step",
    "data.prompt_key",
    "data.response_key",
    "data.shuffle",
    "data.system_prompt",
    "data.prompt_suffix",
)
"""Options that decide which examples a step sees, or what the saved tensors are."""
FIXED_FOR: Final[Mapping[Phase, tuple[str, ...]]] = {
    "train": (),
    # It decides which examples are dropped.
    "sft": ("rollout.max_response_tokens",),
    "generate": (
        "model.init",
        "rollout.max_response_tokens",
        "rollout.num_samples",
        "rollout.tau_sample",
        "rollout.top_p",
        "rollout.top_k",
    ),
}
"""And these, by command."""
REFERENCE: Final = "algorithm.reference"
"""Compared where both runs have one: algorithm.kl_coef may change, also from 0 and to 0."""
NOT_COMPARED: Final = ("output_dir", "checkpoint.resume")
SHOWN_CHARACTERS: Final = 60


def identity(config: RunConfig, phase: Phase) -> dict[str, Any]:
    """Fingerprints of the files that a run learns from: JSON-able, the same on every rank.

    Of a run that does not train, also of the weights, which it takes from no checkpoint.
    """
    template = config.data.chat_template
    found = {
        "model": asdict(read_model_shape(config.model.path)),
        "tokenizer": {
            path.name: _sha256(path) for path in tokenizer_files(Path(config.model.path))
        },
        "data.chat_template": None if template is None else _sha256(Path(template)),
    }
    if reads_training_data(phase):
        found["data.train"] = data_sha256(config.data.train)
    if phase == "evaluate":
        found["evaluation.files"] = {path: data_sha256(path) for path in benchmark_files(config)}
        if config.evaluation.shots:
            found["evaluation.shots_file"] = data_sha256(config.evaluation.shots_file)
        if config.evaluation.scorer not in SCORERS:
            file = Path(config.evaluation.scorer.rpartition(":")[0])
            found["evaluation.scorer"] = _sha256(file)
    if trains(phase):
        found[REFERENCE] = _reference(config)
    else:
        found["weights"] = start_fingerprint(config)
    return found


def start_fingerprint(config: RunConfig) -> str:
    """Tells the weights that a run starts from."""
    return _fingerprint(config.model, config.seed)


def conflicts(
    saved: Mapping[str, Any], saved_identity: Mapping[str, Any], config: RunConfig, phase: Phase
) -> list[str]:
    """Why a run with `config` cannot go on from one with the options `saved`, one line each.

    Not for `evaluate`, which never goes on.
    """
    before, now = dict(_leaves(saved)), dict(_leaves(as_options(config)))
    fixed = (*FIXED, *FIXED_FOR[phase])
    made = "the checkpoint was made with" if trains(phase) else "the run began with"
    lines = [
        f"{name}: found {_short(now[name])}, {made} {_short(before[name])}"
        for name in fixed
        if name in before and before[name] != now[name]
    ]
    options = dict.fromkeys(("model", "tokenizer", "weights"), "model.path")
    here = dict(_leaves(_plain(identity(config, phase))))
    there = dict(_leaves(saved_identity))
    for name in sorted({*here, *there}):
        if name == REFERENCE and None in (here.get(name), there.get(name)):
            continue
        if here.get(name) != there.get(name):
            section = name.split(".")[0]
            lines.append(
                f"{options.get(section, name)}: {name} is {_short(here.get(name))}, {made} "
                f"{_short(there.get(name))}"
            )
    return lines


def changes(saved: Mapping[str, Any], config: RunConfig) -> list[str]:
    """Options that differ from the saved ones and may: `name: before -> now`, one line each.

    One that did not exist when they were saved had what is the default now.
    """
    now = dict(_leaves(as_options(config)))
    before = dict(_leaves(as_options(RunConfig()))) | dict(_leaves(saved))
    return [
        f"{name}: {_short(before.get(name))} -> {_short(now.get(name))}"
        for name in (*now, *(name for name in before if name not in now))
        if before.get(name) != now.get(name) and name not in NOT_COMPARED
    ]


def _reference(config: RunConfig) -> str | None:
    """What the penalty is measured from; its weights are in no checkpoint."""
    if config.algorithm.kl_coef == 0:
        return None
    return _fingerprint(reference_source(config.model, config.algorithm), config.seed)


def _fingerprint(model: ModelConfig, seed: int) -> str:
    if model.init == "random":
        return f"random weights of seed {seed}"
    return weights_fingerprint(model.path)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}.{key}" if path else str(key))
    else:
        yield path, _plain(value)


def _plain(value: Any) -> Any:
    """As JSON gives it back: no tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
