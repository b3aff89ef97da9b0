"""What `osft evaluate` scores: one model, or what a run left behind, step by step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from osft_mcore.checkpoint.folder import checkpoints_in, step_of
from osft_mcore.checkpoint.manifest import problems_of
from osft_mcore.config.schema import RunConfig
from osft_mcore.errors import ConfigError
from osft_mcore.train.resume import CHECKPOINTS, RUN_MANIFEST, SUMMARY, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One set of weights to score."""

    step: int
    """Of the run; 0: what it began with, or a model that belongs to no run."""
    checkpoint: Path | None = None
    """Where the weights are; None: model.path."""
    exported: Path | None = None
    """Or a Hugging Face folder with them."""

    @property
    def baseline(self) -> bool:
        """True for what a run began with."""
        return self.step == 0

    @property
    def where(self) -> str:
        """For people."""
        path = self.checkpoint or self.exported
        return "model.path" if path is None else str(path)


START: Final = Scored(step=0)
"""model.path."""


def scored_models(config: RunConfig) -> list[Scored]:
    """In the order of their steps. Reads names, sizes and small files; not collective.

    Raises ConfigError if evaluation.run is no run, a step is not there, or a checkpoint's files
    are not whole.
    """
    wanted = config.evaluation.steps
    if not config.evaluation.run:
        if wanted:
            raise ConfigError("evaluation.steps: they are of a run; set evaluation.run as well")
        return [Scored(step=0)]
    run = Path(config.evaluation.run)
    if not (run / RUN_MANIFEST).is_file():
        raise ConfigError(
            f"evaluation.run: {str(run)!r} is no run (no {RUN_MANIFEST} in it); expected its folder"
        )
    found = {0: Scored(step=0)} | {scored.step: scored for scored in _left_behind(run)}
    if missing := [step for step in wanted if step not in found]:
        there = ", ".join(map(str, sorted(found)))
        raise ConfigError(
            f"evaluation.steps: {', '.join(map(str, missing))} not found in {str(run)!r}; it has "
            f"the weights after {there} steps (checkpoint.keep_last, keep_every)"
        )
    chosen = [found[step] for step in sorted(wanted or found)]
    _check_whole(chosen)
    return chosen


def _left_behind(run: Path) -> list[Scored]:
    """The checkpoints, and the export at the end where no checkpoint is of that step."""
    found = []
    summary, exported = run / SUMMARY, run / "hf"
    if summary.is_file() and exported.is_dir():
        found.append(Scored(step=int(read_json(summary).get("steps", 0)), exported=exported))
    for folder in checkpoints_in(run / CHECKPOINTS):
        step = step_of(folder)
        assert step is not None, "checkpoints_in names folders step_N"
        found.append(Scored(step=step, checkpoint=folder))
    return found


def _check_whole(chosen: list[Scored]) -> None:
    """Sizes only: hashing all of them would take longer than reading what is needed."""
    problems = [
        f"evaluation.run: {problem}"
        for scored in chosen
        if scored.checkpoint is not None
        for problem in problems_of(scored.checkpoint, hashes=False)[:1]
    ]
    if problems:
        raise ConfigError([*problems, "leave the step out of evaluation.steps"])
