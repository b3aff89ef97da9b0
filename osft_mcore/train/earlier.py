"""A run that does not train, and what output_dir holds of it from an earlier start."""

# The launcher looks here too, so nothing that takes long to import.

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.data.order import single_pass
from osft_mcore.errors import ConfigError, NothingLeft
from osft_mcore.log.run_folder import BATCHES
from osft_mcore.records import Prompt
from osft_mcore.train.identity import conflicts
from osft_mcore.train.resume import RUN_MANIFEST, SUMMARY, read_json

SOLUTIONS: Final = "solutions.jsonl"
"""What `osft generate` leaves behind."""


def batches_of(config: RunConfig, prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """One pass over the prompts, in the batches that the steps of `osft train` take first."""
    rows = single_pass(
        len(prompts), config.train.prompts_per_step, seed=config.seed, shuffle=config.data.shuffle
    )
    return [[prompts[row] for row in batch] for batch in rows[: config.train.steps]]


def check_pass_left(config: RunConfig, num_batches: int) -> None:
    """Raise NothingLeft if output_dir holds all `num_batches`, ConfigError if it ended earlier.

    In the first case it leaves no batches there, which a pass does that is killed at its very end.
    """
    summary = Path(config.output_dir) / SUMMARY
    if config.checkpoint.resume == "never" or not summary.is_file():
        return
    done = int(read_json(summary).get("batches", 0))
    if done >= num_batches:
        sweep_batches(summary.parent)
        raise NothingLeft(
            f"{num_batches} of {num_batches} batches are done, nothing is left to do; the answers "
            f"are in {summary.with_name(SOLUTIONS)}. To begin anew choose another output_dir"
        )
    raise ConfigError(
        f"output_dir: the run in {config.output_dir!r} ended after {done} batches (train.steps), "
        f"and {num_batches} are asked for; choose another output_dir"
    )


def sweep_batches(folder: Path) -> None:
    """Remove the batches of a pass whose summary is written: nothing reads them any more.

    Several starts may do it at once, and one of somebody who may only look.
    """
    with suppress(FileNotFoundError, PermissionError):
        shutil.rmtree(folder / BATCHES)


def check_earlier(config: RunConfig) -> bool:
    """True if output_dir holds an `osft generate` run to go on with; not collective.

    Raises ConfigError if it is another run.
    """
    if (before := manifest_before(config, "generate")) is None:
        return False
    refuse_other(config, conflicts(before["options"], before["identity"], config, "generate"))
    return True


def manifest_before(config: RunConfig, phase: Phase) -> dict[str, Any] | None:
    """What an earlier start has kept in output_dir; None if a run begins.

    Raises ConfigError if output_dir holds a run of another command.
    """
    manifest = Path(config.output_dir) / RUN_MANIFEST
    if config.checkpoint.resume == "never" or not manifest.is_file():
        return None
    before = read_json(manifest)
    if before.get("phase") != phase or not {"options", "identity"} <= before.keys():
        raise ConfigError(
            f"output_dir: {config.output_dir!r} holds an `osft {before.get('phase')}` run; choose "
            "another output_dir"
        )
    return before


def refuse_other(config: RunConfig, other: Sequence[str]) -> None:
    """Raise ConfigError if there are lines on what is other than before."""
    if other:
        raise ConfigError(
            [*other, f"output_dir: {config.output_dir!r} holds the run with the other values; "
             "restore these, or choose another output_dir"]
        )  # fmt: skip
