"""A run that does not train, and what output_dir holds of it from an earlier start."""

# The launcher looks here too, so nothing that takes long to import.

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from osft_mcore.config.load import as_options
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.data.order import single_pass
from osft_mcore.errors import ConfigError, NothingLeft
from osft_mcore.records import Prompt
from osft_mcore.train.identity import changes, conflicts, identity
from osft_mcore.train.resume import RUN_MANIFEST, SUMMARY, read_json

SOLUTIONS: Final = "solutions.jsonl"
"""What `osft generate` leaves behind."""
OF_A_SCORE: Final = (
    "seed:",
    "model.",
    "rollout.max_prompt_tokens:",
    "rollout.max_response_tokens:",
    "data.prompt_key:",
    "data.system_prompt:",
    "data.prompt_suffix:",
    "data.chat_template:",
    "evaluation.files:",
    "evaluation.num_samples:",
    "evaluation.temperature:",
    "evaluation.top_p:",
    "evaluation.baseline_temperatures:",
    "evaluation.max_problems:",
    "evaluation.scorer:",
    "evaluation.grader_timeout_s:",
    "evaluation.grader_memory_gib:",
    "evaluation.overlong_buffer_tokens:",
)
"""How lines on options begin that change what `osft evaluate` finds."""


def batches_of(config: RunConfig, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """One pass over the prompts, in the batches that the steps of `osft train` take first."""
    rows = single_pass(
        len(prompts), config.train.prompts_per_step, seed=config.seed, shuffle=config.data.shuffle
    )
    return [[prompts[row] for row in batch] for batch in rows[: config.train.steps]]


def check_pass_left(config: RunConfig, num_batches: int) -> None:
    """Raise NothingLeft if output_dir holds all `num_batches`, ConfigError if it ended earlier."""
    summary = Path(config.output_dir) / SUMMARY
    if config.checkpoint.resume == "never" or not summary.is_file():
        return
    done = int(read_json(summary).get("batches", 0))
    if done >= num_batches:
        raise NothingLeft(
            f"{num_batches} of {num_batches} batches are done, nothing is left to do; the answers "
            f"are in {summary.with_name(SOLUTIONS)}. To begin anew choose another output_dir"
        )
    raise ConfigError(
        f"output_dir: the run in {config.output_dir!r} ended after {done} batches (train.steps), "
        f"and {num_batches} are asked for; choose another output_dir"
    )


def began_with(config: RunConfig, phase: Phase) -> dict[str, Any]:
    """What the manifest keeps, for a later start to know whether it goes on with the same."""
    return {"options": as_options(config), "identity": identity(config, phase)}


def check_earlier(config: RunConfig, phase: Phase) -> bool:
    """True if output_dir holds a run of these options to go on with; not collective.

    Raises NothingLeft if it has ended, ConfigError if it is another run.
    """
    path = Path(config.output_dir)
    if config.checkpoint.resume == "never" or not (path / RUN_MANIFEST).is_file():
        return False
    before = read_json(path / RUN_MANIFEST)
    choose = "choose another output_dir"
    if before.get("phase") != phase or not {"options", "identity"} <= before.keys():
        raise ConfigError(
            f"output_dir: {config.output_dir!r} holds an `osft {before.get('phase')}` run; {choose}"
        )
    ended = (path / SUMMARY).is_file()
    if phase == "evaluate":
        # A score is of its options; of an unfinished run nothing is used.
        other = _other_score(before, config) if ended else []
    else:
        other = conflicts(before["options"], before["identity"], config, phase)
    if other:
        raise ConfigError(
            [*other, f"output_dir: {config.output_dir!r} holds the run with the other values; "
             f"restore these, or {choose}"]
        )  # fmt: skip
    if ended and phase == "evaluate":
        raise NothingLeft(f"the scores are in {path / SUMMARY}; to score anew {choose}")
    return phase == "generate"


def _other_score(before: dict[str, Any], config: RunConfig) -> list[str]:
    lines = changes(before["options"], config)
    changed = [line for line in lines if line.startswith(OF_A_SCORE)]
    if before["identity"] != json.loads(json.dumps(identity(config, "evaluate"))):
        changed.append(
            "model.path, evaluation.files, evaluation.scorer: what the files hold has changed"
        )
    return changed
