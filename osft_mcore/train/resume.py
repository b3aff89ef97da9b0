"""Where a run goes on from: the newest whole checkpoint, if what it was made with still holds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osft_mcore.checkpoint.folder import STATE, checkpoints_in, newest_whole
from osft_mcore.checkpoint.manifest import problems_of
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.errors import CheckpointError, ConfigError, NothingLeft
from osft_mcore.files import parse_json
from osft_mcore.train.identity import changes, conflicts

CHECKPOINTS: Final = "checkpoints"
SUMMARY: Final = "summary.json"
RUN_MANIFEST: Final = "manifest.json"
BEGUN_FROM: Final = "begun_from"
"""In a run's manifest: what checkpoint.resume named when it began."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResumePoint:
    """A checkpoint that was looked at and found good."""

    folder: Path
    state: Mapping[str, Any]
    skipped: tuple[str, ...]
    """What is wrong with newer ones."""
    changed: tuple[str, ...]
    """Options that are not what they were: `name: before -> now`."""

    @property
    def step(self) -> int:
        """The last step that it has seen."""
        return int(self.state["step"])

    @property
    def num_updates(self) -> int:
        """Of the optimizer."""
        return int(self.state["num_updates"])

    @property
    def num_pushes(self) -> int:
        """Before the one that hands its weights to the rollout engine."""
        return int(self.state["weight_version"]) - 1

    @property
    def seconds(self) -> dict[str, float]:
        """Spent in each phase so far."""
        return dict(self.state["seconds"])


ProblemsOf = Callable[[Path], list[str]]
"""What is wrong with a checkpoint's files: told by one process, or by all ranks together."""


def problems_by_size(folder: Path) -> list[str]:
    """Without reading the files: for the launcher, which looks before any rank is started."""
    return problems_of(folder, hashes=False)


def resume_point(
    config: RunConfig, phase: Phase, problems_of: ProblemsOf, folders: Sequence[Path]
) -> ResumePoint | None:
    """The first whole one of `candidates`; None if there are none: a run begins.

    Raises ConfigError if the options do not fit the checkpoint or the folder is in use,
    CheckpointError if there are checkpoints and none is whole.
    """
    if not folders:
        return None
    newest = newest_whole(folders, problems_of)
    if newest.folder is None:
        nothing = f"no whole checkpoint is left in {folders[0].parent}"
        raise CheckpointError(
            "\n".join([*newest.skipped, f"{nothing}; to begin anew choose another output_dir"])
        )
    state = _read_state(newest.folder)
    problems = conflicts(state["options"], state["identity"], config, phase)
    if state["phase"] != phase:
        problems.insert(0, f"{newest.folder} is of an `osft {state['phase']}` run")
    if problems:
        raise ConfigError(
            [*problems, f"cannot go on from {newest.folder}: restore these, or choose another "
             "output_dir to begin anew"]
        )  # fmt: skip
    return ResumePoint(
        folder=newest.folder,
        state=state,
        skipped=newest.skipped,
        changed=tuple(changes(state["options"], config)),
    )


def check_work_left(config: RunConfig, num_steps: int, point: ResumePoint | None) -> None:
    """Raise NothingLeft if output_dir holds a run that has done `num_steps` steps.

    Raises ConfigError if it has ended after fewer and left no checkpoint to go on from, or if
    `point` lies behind the end.
    """
    if point is not None and point.step > num_steps:
        raise ConfigError(
            f"train.steps: the run shall have {num_steps} steps, but {point.folder} has seen "
            f"{point.step}; raise train.steps (or train.epochs), or choose another output_dir and "
            "name an earlier checkpoint in checkpoint.resume"
        )
    summary = Path(config.output_dir) / SUMMARY
    if config.checkpoint.resume == "never" or not summary.is_file():
        return
    done = int(read_json(summary).get("steps", 0))
    if done >= num_steps:
        raise NothingLeft(
            f"{done} of {num_steps} steps are done, nothing is left to do; the results are in "
            f"{summary}. To go on raise train.steps (or train.epochs), to begin anew choose "
            "another output_dir"
        )
    if point is None:
        raise ConfigError(
            f"output_dir: the run in {config.output_dir!r} ended after {done} steps and kept no "
            "checkpoint to go on from (checkpoint.every); choose another output_dir"
        )


def begun_from(output_dir: Path) -> str | None:
    """The checkpoint that the run in a folder was told to begin from; None if there is none."""
    manifest = output_dir / RUN_MANIFEST
    return read_json(manifest).get(BEGUN_FROM) if manifest.is_file() else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of the run folder. Raises ConfigError if the file is damaged."""
    try:
        return _object(path)
    except ValueError as error:
        raise ConfigError(
            f"output_dir: {path} is damaged ({error}); remove it to go on without what it says"
        ) from error


def candidates(config: RunConfig) -> list[Path]:
    """The checkpoints that checkpoint.resume allows to go on from, the one to prefer first.

    Raises ConfigError if it names none, or one that does not belong to the run in output_dir.
    """
    resume, output_dir = config.checkpoint.resume, Path(config.output_dir)
    own = checkpoints_in(output_dir / CHECKPOINTS)
    if resume in ("auto", "never"):
        return own if resume == "auto" else []
    named = Path(resume).resolve()
    if begun_from(output_dir) == str(named):
        # A second start of the command that began here: it goes on, and does not begin again.
        return own or _named(named)
    inside = named.is_relative_to(output_dir.resolve())
    if (output_dir / RUN_MANIFEST).exists() and not inside:
        raise ConfigError(
            f"checkpoint.resume: {resume!r} would begin a run in {str(output_dir)!r}, which holds "
            "another; choose another output_dir, or checkpoint.resume=auto to go on with that one"
        )
    return _named(Path(resume))


def _named(path: Path) -> list[Path]:
    """The checkpoint, or those of the run, that checkpoint.resume names."""
    if (path / STATE).is_file():
        return [path]
    folders = checkpoints_in(path / CHECKPOINTS) or checkpoints_in(path)
    if not folders:
        raise ConfigError(
            f"checkpoint.resume: {str(path)!r} is neither a training checkpoint (no {STATE} in it) "
            "nor a run with checkpoints; expected auto, never, or the path of one"
        )
    return folders


def _read_state(folder: Path) -> dict[str, Any]:
    path = folder / STATE
    if not path.is_file():
        raise ConfigError(
            f"checkpoint.resume: {str(folder)!r} holds weights only (no {STATE}); to start from "
            "them convert it to a Hugging Face folder and name that as model.path"
        )
    try:
        state = _object(path)
        if missing := [key for key in ("step", "phase", "options", "identity") if key not in state]:
            raise ValueError(f"it does not say {', '.join(missing)}")
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
    return state


def _object(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises ValueError if it holds anything else."""
    value = parse_json(path.read_bytes())
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value
