"""What of the evaluation's options cannot work."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from osft_mcore.config.evaluation import benchmark_files, sweep
from osft_mcore.config.phases import scores, trains
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.config.schema_evaluation import SCORERS, EvaluationConfig


def evaluation_problems(config: RunConfig, phase: Phase) -> Iterator[str]:
    """Combinations that make no sense, and a scorer that is neither a name nor a file's."""
    evaluation = config.evaluation
    if phase == "sft" and evaluation.files:
        yield (
            "evaluation.files: osft sft does not sample, so it cannot evaluate; leave them out "
            "(osft evaluate scores the model that it leaves)"
        )
    if phase == "train" and evaluation.baseline_temperatures and not evaluation.before:
        yield (
            "evaluation.baseline_temperatures: they are for the starting model, which "
            "evaluation.before=false leaves out; set it to true or drop them"
        )
    if trains(phase) and evaluation.every > 0 and not evaluation.files:
        yield (
            f"evaluation.every: found {evaluation.every}, but evaluation.files is empty; "
            "name the files or set evaluation.every=0"
        )
    swept: tuple[float, ...] = ()
    try:
        swept = sweep(evaluation.sweep)
    except ValueError as error:
        yield f"evaluation.sweep: {error}"
    if phase != "evaluate":
        for option in ("run", "steps", "sweep"):
            if getattr(evaluation, option):
                yield f"evaluation.{option}: it is for osft evaluate; leave it out"
    elif evaluation.steps and not evaluation.run:
        yield "evaluation.steps: they are of a run; set evaluation.run as well (or --run)"
    yield from _temperatures(evaluation, swept)
    yield from _shots(evaluation)
    yield from _scoring(evaluation, config.rollout.max_response_tokens)


def _temperatures(evaluation: EvaluationConfig, swept: Sequence[float]) -> Iterator[str]:
    """Files of results are named by the temperature, in six digits: two must not share one."""
    for option, found in (
        ("temperature", (evaluation.temperature,)),
        ("baseline_temperatures", evaluation.baseline_temperatures),
        ("sweep", swept),
    ):
        if longer := [tau for tau in found if float(f"{tau:g}") != tau]:
            yield (
                f"evaluation.{option}: found {longer[0]!r}, expected at most six digits: files of "
                "results are named by the temperature"
            )


def _shots(evaluation: EvaluationConfig) -> Iterator[str]:
    if evaluation.shots and not evaluation.shots_file:
        yield (
            f"evaluation.shots: found {evaluation.shots}, but evaluation.shots_file is empty; name "
            "a file of prompts and responses, or set evaluation.shots=0"
        )
    if evaluation.shots and not evaluation.files:
        yield (
            f"evaluation.shots: found {evaluation.shots}, but evaluation.files is empty; name the "
            "problems that they are for, or set evaluation.shots=0"
        )
    if evaluation.shots_file and not evaluation.shots:
        yield (
            f"evaluation.shots_file: found {evaluation.shots_file!r}, but evaluation.shots is 0; "
            "say how many examples to take from it, or leave it out"
        )


def _scoring(evaluation: EvaluationConfig, max_response_tokens: int) -> Iterator[str]:
    path, _, function = evaluation.scorer.rpartition(":")
    is_name = evaluation.scorer in SCORERS
    if not is_name and not (path.endswith(".py") and function.isidentifier()):
        yield (
            f"evaluation.scorer: found {evaluation.scorer!r}, expected {', '.join(SCORERS)}, or a "
            "function in a Python file, as in path/to/file.py:function"
        )
    buffer = evaluation.overlong_buffer_tokens
    if buffer and evaluation.scorer != "answer_line":
        yield (
            f"evaluation.overlong_buffer_tokens: found {buffer}, but only answer_line takes it "
            f"into account, and evaluation.scorer is {evaluation.scorer!r}; set it to 0"
        )
    if buffer > max_response_tokens:
        yield (
            f"evaluation.overlong_buffer_tokens: found {buffer}, expected at most "
            f"rollout.max_response_tokens = {max_response_tokens}"
        )
    if not 0 <= evaluation.max_ungraded_share < 1:
        yield (
            f"evaluation.max_ungraded_share: found {evaluation.max_ungraded_share:g}, expected at "
            "least 0 and below 1"
        )


def absent_evaluation_files(config: RunConfig, phase: Phase) -> Iterator[str]:
    """Files of the evaluation that are not there."""
    if not scores(phase):
        # `osft sft` refuses them, be they there or not.
        return
    for name, file in zip(config.evaluation.files, benchmark_files(config), strict=True):
        if not Path(file).is_file():
            found = f"{file!r}" if name == file else f"{name!r} is {file!r} (data.folder), which"
            yield f"evaluation.files: {found} is not a file; expected parquet files"
    shots = config.evaluation.shots_file
    if shots and not Path(shots).is_file():
        yield f"evaluation.shots_file: {shots!r} is not a file; expected parquet or jsonl"
    path = config.evaluation.scorer.rpartition(":")[0]
    if path.endswith(".py") and not Path(path).is_file():
        yield f"evaluation.scorer: {path!r} is not a file; expected a Python file with a function"
