"""What `osft evaluate` scores: one model, or what a run left behind, step by step."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from osft_mcore.checkpoint.folder import checkpoints_in, step_of
from osft_mcore.checkpoint.manifest import MANIFEST, problems_of
from osft_mcore.config.evaluation import temperatures
from osft_mcore.config.schema import RunConfig
from osft_mcore.errors import ConfigError, NothingLeft
from osft_mcore.train.earlier import manifest_before, refuse_other
from osft_mcore.train.identity import changes, identity, start_fingerprint
from osft_mcore.train.resume import CHECKPOINTS, RUN_MANIFEST, SUMMARY, read_json
from osft_mcore.train.score_files import answers_file
from osft_mcore.weights.fingerprint import weights_fingerprint


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

    def fingerprint(self, config: RunConfig) -> str:
        """Tells the weights; a checkpoint's manifest has the hash of every file."""
        if self.checkpoint is not None:
            return hashlib.sha256((self.checkpoint / MANIFEST).read_bytes()).hexdigest()
        if self.exported is not None:
            return weights_fingerprint(self.exported)
        return start_fingerprint(config)

    @property
    def where(self) -> str:
        """For people."""
        path = self.checkpoint or self.exported
        return "model.path" if path is None else str(path)


OF_A_SCORE: Final = (
    "seed:",
    "model.",
    "rollout.max_prompt_tokens:",
    "rollout.max_response_tokens:",
    "data.",
    "evaluation.files:",
    "evaluation.run:",
    "evaluation.num_samples:",
    "evaluation.top_p:",
    "evaluation.max_problems:",
    "evaluation.portion:",
    "evaluation.shots:",
    "evaluation.shots_file:",
    "evaluation.scorer:",
    "evaluation.grader_timeout_s:",
    "evaluation.grader_memory_gib:",
    "evaluation.overlong_",
)
"""How lines on options begin that change what a single evaluation finds, or how it is kept."""
START: Final = Scored(step=0)
"""model.path."""


def scored_models(config: RunConfig) -> list[Scored]:
    """In the order of their steps. Reads names, sizes and small files; not collective.

    Raises ConfigError if evaluation.run is no run, a step is not there, or a checkpoint's files
    are not whole.
    """
    wanted = config.evaluation.steps
    if not config.evaluation.run:
        return [START]
    run = Path(config.evaluation.run)
    if not (run / RUN_MANIFEST).is_file():
        raise ConfigError(
            f"evaluation.run: {str(run)!r} is no run (no {RUN_MANIFEST} in it); expected its folder"
        )
    found = {0: START} | {scored.step: scored for scored in _left_behind(run)}
    if missing := [step for step in wanted if step not in found]:
        there = ", ".join(map(str, sorted(found)))
        raise ConfigError(
            f"evaluation.steps: {', '.join(map(str, missing))} not found in {str(run)!r}; it has "
            f"the weights after {there} steps (checkpoint.keep_last, keep_every)"
        )
    chosen = [found[step] for step in sorted(set(wanted) or found)]
    _check_whole(chosen)
    return chosen


def steps_kept(run: Path) -> set[int]:
    """After which steps a run that has ended has the weights; 0: model.path."""
    return {0} | {scored.step for scored in _left_behind(run)}


def check_earlier_scores(config: RunConfig) -> bool:
    """True if output_dir holds scores of the same kind, to go on with; not collective.

    More models and temperatures may be asked for. Raises NothingLeft if all of them are there,
    ConfigError if the scores there are of other options or other weights.
    """
    models = scored_models(config)
    if (before := manifest_before(config, "evaluate")) is None:
        return False
    lines = changes(before["options"], config)
    other = [line for line in lines if line.startswith(OF_A_SCORE)]
    now, then = json.loads(json.dumps(scores_identity(config))), before["identity"]
    if now["files"] != then.get("files"):
        other.append(
            "model.path, evaluation.files, evaluation.shots_file, evaluation.scorer: what the "
            "files hold has changed"
        )
    other += [
        f"evaluation.run: the weights after step {step} are others than those that were scored"
        for step, weights in now["weights"].items()
        if then["weights"].get(step, weights) != weights
    ]
    refuse_other(config, other)
    folder = Path(config.output_dir)
    asked = [
        (scored.step, tau)
        for scored in models
        for tau in temperatures(config.evaluation, baseline=scored.baseline)
    ]
    # A start that was killed may have left answers that the summary does not have yet.
    summary = read_json(folder / SUMMARY) if (folder / SUMMARY).is_file() else {"steps": {}}
    if all(
        f"{tau:g}" in summary["steps"].get(str(step), {})
        and (folder / answers_file(step, tau)).is_file()
        for step, tau in asked
    ):
        raise NothingLeft(
            f"the scores are in {folder / SUMMARY}; to score anew choose another output_dir"
        )
    return True


def scores_identity(config: RunConfig) -> dict[str, Any]:
    """Fingerprints of the problems, the tokenizer and all weights that are scored."""
    files = identity(config, "evaluate")
    del files["weights"]
    weights = {str(at.step): at.fingerprint(config) for at in scored_models(config)}
    return {"files": files, "weights": weights}


def identity_kept(config: RunConfig) -> dict[str, Any]:
    """The same with all weights that output_dir has scores of, for a later start to know them."""
    made_of, before = scores_identity(config), manifest_before(config, "evaluate")
    if before is not None:
        made_of["weights"] = before["identity"]["weights"] | made_of["weights"]
    return made_of


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
