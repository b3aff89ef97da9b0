"""What is wrong with a run's files, found before a rank, a model or the run folder exists."""

import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from osft_mcore.actor.start_weights import reference_source
from osft_mcore.config.check_batches import packs_fp32
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.phases import reads_training_data, scores, trains
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.errors import ConfigError, OsftError, WeightError
from osft_mcore.files import nearest_existing
from osft_mcore.log.lock import lock_refusal
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.topology import run_topology
from osft_mcore.parallel.world import device_type, job_attempt, job_id, launched_rank
from osft_mcore.train.earlier import batches_of, check_earlier, check_pass_left
from osft_mcore.train.identity import REFERENCE
from osft_mcore.train.inputs import (
    load_chat_tokenizer,
    load_held_out,
    load_sft_examples,
    load_sft_tokenizer,
    load_train_prompts,
    total_steps,
)
from osft_mcore.train.resume import (
    ResumePoint,
    candidates,
    check_work_left,
    problems_by_size,
    resume_point,
)
from osft_mcore.train.scored import check_earlier_scores
from osft_mcore.train.weight_plan import weight_lines
from osft_mcore.weights.safetensors_io import read_hf_index

NUM_TENSORS_SHOWN = 8


def input_errors(config: RunConfig, phase: Phase) -> tuple[OsftError, ...]:
    """Every error that the files of a config that passed `check` would cause.

    Reads tokenizer and data as the run will, of the weights only the headers. Not collective;
    the same answer on every rank that sees the same files.
    """
    point: list[ResumePoint | None] = []
    always = _weights_in_any_case(config, phase)
    unread = _errors_of([partial(_check_weights, *item) for item in always.items()])
    steps: list[Callable[[], object]] = [lambda: _check_output_dir(config)]
    if trains(phase):
        steps.append(lambda: _look_for_point(config, phase, point, told_apart=not unread))
        steps.append(lambda: _check_attention(config))
    elif not unread:
        # After the weights: it tells them from others.
        earlier = check_earlier if phase == "generate" else check_earlier_scores
        steps.append(lambda: earlier(config))
    if phase == "train":
        steps.append(lambda: _check_weight_plan(config))
    if config.model.init == "pretrained" and "model.path" not in always:
        # A run that goes on takes its weights from the checkpoint; one that may not, who knows.
        steps.append(
            lambda: _check_weights("model.path", config.model.path) if point == [None] else None
        )
    errors = [*_errors_of(steps), *unread]
    try:
        load = load_sft_tokenizer if phase == "sft" else load_chat_tokenizer
        tokenizer = load(config)
    except OsftError as error:
        return (*errors, error)
    return (*errors, *_data_errors(config, phase, tokenizer, point))


def _weights_in_any_case(config: RunConfig, phase: Phase) -> dict[str, str]:
    """Folders, by option, whose weights a start reads even if the run goes on."""
    model, algorithm = config.model, config.algorithm
    if trains(phase):
        if algorithm.kl_coef == 0:
            return {}
        model = reference_source(model, algorithm)
    if model.init == "random":
        return {}
    return {REFERENCE if model is not config.model else "model.path": model.path}


def _look_for_point(
    config: RunConfig, phase: Phase, point: list[ResumePoint | None], *, told_apart: bool
) -> None:
    """Put what the run goes on from into `point`; nothing, if that is refused.

    Not `told_apart`: a reference that cannot be read, which is an error of its own, cannot be held
    against that of a checkpoint.
    """
    folders = candidates(config)
    if told_apart or not folders:
        point.append(resume_point(config, phase, problems_by_size, folders))


def _data_errors(
    config: RunConfig, phase: Phase, tokenizer: ChatTokenizer, point: Sequence[ResumePoint | None]
) -> list[OsftError]:
    def load_train() -> None:
        if phase == "generate":
            prompts = load_train_prompts(config, tokenizer).prompts
            check_pass_left(config, len(batches_of(config, prompts)))
            return
        if phase == "train":
            num_items = len(load_train_prompts(config, tokenizer).prompts)
        else:
            num_items = len(load_sft_examples(config, tokenizer).examples)
        num_steps = total_steps(config, num_items)
        if point:
            # Else it was refused, and what is left to do is another question.
            check_work_left(config, num_steps, point[0])

    def load_evaluation() -> None:
        load_held_out(config, tokenizer)

    loads = [load_train] if reads_training_data(phase) else []
    loads += [load_evaluation] if scores(phase) else []
    return _errors_of(loads)


def _errors_of(steps: Sequence[Callable[[], object]]) -> list[OsftError]:
    errors = []
    for step in steps:
        try:
            step()
        except OsftError as error:
            errors.append(error)
    return errors


def _check_output_dir(config: RunConfig) -> None:
    folder = Path(config.output_dir)
    run = RunFolder(folder, writer=False)
    if config.checkpoint.resume == "never":
        run.check_unused()
    run.check_is_folder()
    # Rank 0 takes the lock: only its host can know whether who left one there is gone.
    if launched_rank() == 0:
        refusal = lock_refusal(folder, job_id=job_id(), attempt=job_attempt())
        if refusal:
            raise ConfigError(refusal)
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(
            f"output_dir: {str(folder)!r} cannot be created: {str(existing)!r} is not a folder "
            "that this user may write to"
        )


def _check_attention(config: RunConfig) -> None:
    option = packs_fp32(config)
    if not option or device_type() == "cpu":
        return
    with warnings.catch_warnings(action="ignore"):
        # Here, because Megatron-Core takes seconds to import, and few runs ask.
        from osft_mcore.model.kernels import uses_transformer_engine
    if uses_transformer_engine():
        raise ConfigError(
            f"{option}: found it with model.dtype=fp32, but attention is Transformer Engine's "
            "here, which has no fp32 over packed sequences; set model.dtype to bf16, or do without "
            f"{option}"
        )


def _check_weight_plan(config: RunConfig) -> None:
    topology = run_topology(config, "train")
    weight_lines(config, read_model_shape(config.model.path), topology)


def _check_weights(option: str, folder: str) -> None:
    """Raise WeightError with the first few tensors that are not as config.json says."""
    try:
        read_hf_index(folder)
    except WeightError as error:
        lines = str(error).splitlines()
        shown = [f"{option}: {line}" for line in lines[:NUM_TENSORS_SHOWN]]
        if len(lines) > NUM_TENSORS_SHOWN:
            shown.append(f"{option}: and {len(lines) - NUM_TENSORS_SHOWN} more such problems")
        raise WeightError("\n".join(shown)) from error
