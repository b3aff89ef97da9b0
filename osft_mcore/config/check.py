"""What cannot work together, found before any model is built; every problem is reported at once."""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Final, Literal

from osft_mcore.config.check_algorithm import (
    absent_reference,
    algorithm_problems,
    reference_problems,
)
from osft_mcore.config.check_async import Host, async_problems
from osft_mcore.config.check_batches import batch_problems
from osft_mcore.config.check_evaluation import absent_evaluation_files, evaluation_problems
from osft_mcore.config.divide import divides, divisors, listed, tensor_parallel_problems
from osft_mcore.config.duration import LONGEST_MINUTES, seconds
from osft_mcore.config.model_shape import FAMILIES, ModelShape, read_model_shape
from osft_mcore.config.phases import reads_training_data, samples, trains
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.errors import ConfigError

CPU_HEAD_DIMS: Final = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
"""vLLM 0.32.0, v1/attention/backends/cpu_attn.py, get_supported_head_sizes."""
RESUME: Final = "auto, never, or the path of a checkpoint or of a run"


def _unknown(_path: str) -> None:
    """No dimensions but those of config.json."""


def check(
    config: RunConfig,
    *,
    world_size: int | None,
    phase: Phase,
    device: Literal["cpu", "cuda"],
    shape: ModelShape | None = None,
    need_files: bool = True,
    known: Callable[[str], ModelShape | None] = _unknown,
    host: Host | None = None,
) -> None:
    """Raise one ConfigError with every combination that cannot work.

    `world_size` None: not started yet, parallel.tp * cp * pp * dp is taken. `shape` None: read from
    model.path. `need_files` False: what is in `absent_files` is no problem, and `known` is asked
    for the shape of a model that is not here. `host` None: which cores and GPUs there are is not
    known. Reads nothing else but whether files exist; the same answer on every rank of a host.
    """
    problems = [
        *_numbers(config),
        *_unset(config, phase),
        *(_absent_inputs(config, phase) if need_files else ()),
        *_world(config, world_size),
        *evaluation_problems(config, phase),
        *(async_problems(config, device, host) if phase == "train" else ()),
        *_optional_parts(config, phase),
    ]
    if trains(phase):
        problems += batch_problems(config, phase)
        problems += algorithm_problems(config.algorithm, samples=samples(phase))
    else:
        problems += _without_training(config, phase)
    if samples(phase):
        problems += _rollout_world(config, world_size, phase)
    if shape is None and config.model.path:
        read = read_model_shape if need_files or model_is_here(config) else known
        try:
            shape = read(config.model.path)
        except ConfigError as error:
            problems += error.problems
    if shape is not None:
        problems += _actor_shape(config, shape)
        if samples(phase):
            problems += _rollout_shape(config, shape, device)
        if phase == "train":
            tokens = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
            problems += reference_problems(config.algorithm, shape, num_tokens=tokens)
    if problems:
        raise ConfigError(problems)


def _numbers(config: RunConfig) -> Iterator[str]:
    for name, number in chain(_sizes(config), _optional_sizes(config)):
        if number < 1:
            yield f"{name}: found {number}, expected at least 1"
    for name, value in _positive(config):
        if value <= 0:
            yield f"{name}: found {value:g}, expected more than 0"
    for name, value in _non_negative(config):
        if value < 0:
            yield f"{name}: found {value:g}, expected 0 or more"
    yield from _ranges(config)


def _ranges(config: RunConfig) -> Iterator[str]:
    shares = (
        ("rollout.top_p", config.rollout.top_p),
        ("rollout.gpu_memory_utilization", config.rollout.gpu_memory_utilization),
        ("evaluation.top_p", config.evaluation.top_p),
    )
    for name, share in shares:
        if not 0 < share <= 1:
            yield f"{name}: found {share:g}, expected more than 0 and at most 1"
    for name, beta in (("train.beta1", config.train.beta1), ("train.beta2", config.train.beta2)):
        if not 0 <= beta < 1:
            yield f"{name}: found {beta:g}, expected at least 0 and below 1"
    if config.train.lr_min_ratio > 1:
        yield f"train.lr_min_ratio: found {config.train.lr_min_ratio:g}, expected at most 1"
    yield from _deadlines(config)
    if not 0 <= config.seed < 2**32:
        yield f"seed: found {config.seed}, expected 0 or more and below 2**32"
    if config.checkpoint.stop_after is not None:
        try:
            seconds(config.checkpoint.stop_after)
        except ValueError as error:
            yield f"checkpoint.stop_after: {error}"


def _deadlines(config: RunConfig) -> Iterator[str]:
    minutes = asdict(config.deadlines)
    slack = minutes.pop("slack")
    if slack < 2 and slack != 0:
        yield f"deadlines.slack: found {slack:g}, expected at least 2, or 0 for never shorter"
    for name, limit in minutes.items():
        if not 0 < limit <= LONGEST_MINUTES:
            yield (
                f"deadlines.{name}: found {limit:g}, expected more than 0 and at most "
                f"{LONGEST_MINUTES}, which is 30 days"
            )
    saving, waiting = config.checkpoint.timeout_minutes, config.deadlines.save
    if 0 < waiting <= saving:
        yield (
            f"checkpoint.timeout_minutes: found {saving:g}, expected less than "
            f"deadlines.save = {waiting:g}: ranks wait for each other's saves"
        )


def _sizes(config: RunConfig) -> Iterable[tuple[str, int]]:
    return (
        ("model.vocab_multiple", config.model.vocab_multiple),
        ("parallel.tp", config.parallel.tp),
        ("parallel.pp", config.parallel.pp),
        ("parallel.vpp", config.parallel.vpp),
        ("parallel.dp", config.parallel.dp),
        ("parallel.cp", config.parallel.cp),
        ("rollout.tp", config.rollout.tp),
        ("rollout.num_samples", config.rollout.num_samples),
        ("rollout.max_prompt_tokens", config.rollout.max_prompt_tokens),
        ("rollout.max_response_tokens", config.rollout.max_response_tokens),
        ("rollout.max_num_seqs", config.rollout.max_num_seqs),
        ("rollout.annealing.epochs", config.rollout.annealing.epochs),
        ("train.epochs", config.train.epochs),
        ("train.prompts_per_step", config.train.prompts_per_step),
        ("train.prompts_per_update", config.train.prompts_per_update),
        ("train.micro_batch_size", config.train.micro_batch_size),
        ("train.max_skipped_updates", config.train.max_skipped_updates),
        ("evaluation.num_samples", config.evaluation.num_samples),
        ("evaluation.portion", config.evaluation.portion),
        ("evaluation.grader_workers", config.evaluation.grader_workers),
        ("evaluation.max_waiting", config.evaluation.max_waiting),
        ("checkpoint.keep_last", config.checkpoint.keep_last),
        ("checkpoint.max_failures", config.checkpoint.max_failures),
        ("sync.bucket_mib", config.sync.bucket_mib),
        ("logging.every", config.logging.every),
    )


def _optional_sizes(config: RunConfig) -> Iterable[tuple[str, int]]:
    sizes = (
        ("train.steps", config.train.steps),
        ("train.max_tokens_per_micro_batch", config.train.max_tokens_per_micro_batch),
        ("rollout.annealing.steps", config.rollout.annealing.steps),
        ("evaluation.max_problems", config.evaluation.max_problems),
    )
    return ((name, size) for name, size in sizes if size is not None)


def _positive(config: RunConfig) -> Iterable[tuple[str, float]]:
    limits = (
        ("sync.max_logprob_diff", config.sync.max_logprob_diff),
        ("sync.mean_logprob_diff", config.sync.mean_logprob_diff),
    )
    return (
        ("algorithm.tau_train", config.algorithm.tau_train),
        ("rollout.tau_sample", config.rollout.tau_sample),
        ("rollout.annealing.end_tau", config.rollout.annealing.end_tau),
        ("rollout.kv_cache_gib", config.rollout.kv_cache_gib),
        ("train.eps", config.train.eps),
        ("evaluation.grader_timeout_s", config.evaluation.grader_timeout_s),
        ("evaluation.grader_memory_gib", config.evaluation.grader_memory_gib),
        ("checkpoint.timeout_minutes", config.checkpoint.timeout_minutes),
        ("checkpoint.max_shard_gib", config.checkpoint.max_shard_gib),
        *((name, limit) for name, limit in limits if limit is not None),
    )


def _non_negative(config: RunConfig) -> Iterable[tuple[str, float]]:
    return (
        ("rollout.top_k", config.rollout.top_k),
        ("train.lr", config.train.lr),
        ("train.lr_warmup_steps", config.train.lr_warmup_steps),
        ("train.lr_min_ratio", config.train.lr_min_ratio),
        ("train.weight_decay", config.train.weight_decay),
        ("train.clip_grad", config.train.clip_grad),
        ("evaluation.every", config.evaluation.every),
        ("evaluation.probe", config.evaluation.probe),
        ("evaluation.temperature", config.evaluation.temperature),
        ("evaluation.shots", config.evaluation.shots),
        ("evaluation.overlong_buffer_tokens", config.evaluation.overlong_buffer_tokens),
        ("evaluation.wait_minutes", config.evaluation.wait_minutes),
        *(("evaluation.baseline_temperatures", t) for t in config.evaluation.baseline_temperatures),
        *(("evaluation.steps", step) for step in config.evaluation.steps),
        ("checkpoint.every", config.checkpoint.every),
        ("checkpoint.keep_every", config.checkpoint.keep_every),
        ("report.every_minutes", config.report.every_minutes),
    )


def absent_files(config: RunConfig, phase: Phase) -> list[str]:
    """Files that the command reads and this machine does not have, each with its option."""
    model = config.model.path
    absent = list(_absent_inputs(config, phase))
    if model and not model_is_here(config):
        absent.insert(0, f"model.path: no config.json in {model!r}")
    return absent


def model_is_here(config: RunConfig) -> bool:
    """True if the model folder's config.json is on this machine."""
    return (Path(config.model.path) / "config.json").is_file()


def _unset(config: RunConfig, phase: Phase) -> Iterator[str]:
    if not config.model.path:
        yield "model.path: not set; expected a Hugging Face model folder"
    if reads_training_data(phase) and not config.data.train:
        yield "data.train: not set; expected a parquet file"
    if not config.data.prompt_key:
        yield "data.prompt_key: not set; expected a column name"
    if phase == "sft" and not config.data.response_key:
        yield "data.response_key: not set; expected a column name"
    if phase == "evaluate" and not config.evaluation.files:
        yield "evaluation.files: not set; expected parquet files with the problems to score on"
    if not config.output_dir:
        yield "output_dir: not set; expected the folder that the run writes"
    if not config.checkpoint.resume:
        yield f"checkpoint.resume: not set; expected {RESUME}"


def _absent_inputs(config: RunConfig, phase: Phase) -> Iterator[str]:
    train = config.data.train if reads_training_data(phase) else ""
    if train and not Path(config.data.train).is_file():
        yield f"data.train: {config.data.train!r} is not a file; expected a parquet file"
    yield from absent_evaluation_files(config, phase)
    template = config.data.chat_template
    if template is not None and not Path(template).is_file():
        yield f"data.chat_template: {template!r} is not a file; expected a Jinja template"
    if trains(phase):
        yield from absent_reference(config.algorithm)
    resume = config.checkpoint.resume
    if resume not in ("", "auto", "never") and not Path(resume).is_dir():
        yield f"checkpoint.resume: {resume!r} is not a folder; expected {RESUME}"


def _world(config: RunConfig, world_size: int | None) -> Iterator[str]:
    parallel = config.parallel
    tp, cp, pp, dp = parallel.tp, parallel.cp, parallel.pp, parallel.dp
    if config.parallel.sequence_parallel and tp == 1:
        yield "parallel.sequence_parallel: needs parallel.tp > 1, found 1"
    if config.parallel.vpp > 1 and pp == 1:
        yield f"parallel.vpp: found {config.parallel.vpp}, which needs parallel.pp > 1, found 1"
    shards, expected = tp * cp * pp, tp * cp * pp * dp
    if min(tp, cp, pp, dp) < 1 or world_size is None or world_size == expected:
        return
    if world_size % shards == 0:
        advice = f"change parallel.dp to {world_size // shards}"
    else:
        advice = f"change parallel.tp, cp and pp (tp * cp * pp = {shards} does not divide it)"
    yield (
        f"parallel: tp * cp * pp * dp = {tp} * {cp} * {pp} * {dp} = {expected}, but the world has "
        f"{world_size} processes; start {expected} processes or {advice}"
    )


def _rollout_world(config: RunConfig, world_size: int | None, phase: Phase) -> Iterator[str]:
    parallel, tp = config.parallel, config.rollout.tp
    world = parallel.world_size if world_size is None else world_size
    if world >= 1 and not divides(tp, world):
        yield (
            f"rollout.tp: {tp} does not divide the world of {world} processes; "
            f"choose one of {listed(divisors(world))}"
        )
    elif trains(phase) and tp > 0 and 0 < config.train.prompts_per_update < world // tp:
        yield (
            f"train.prompts_per_update: {config.train.prompts_per_update}, but there are "
            f"{world // tp} rollout replicas; the gate compares the answers of one update, so it "
            "would never see some of them: raise it, or raise rollout.tp"
        )


def _actor_shape(config: RunConfig, shape: ModelShape) -> Iterator[str]:
    tp, pp, vpp = config.parallel.tp, config.parallel.pp, config.parallel.vpp
    yield from tensor_parallel_problems("parallel.tp", tp, shape)
    if pp > shape.num_layers:
        yield f"parallel.pp: {pp} stages, but the model has only {shape.num_layers} layers"
    elif pp > 1 and pp * vpp > shape.num_layers:
        yield (
            f"parallel.vpp: pp * vpp = {pp} * {vpp} = {pp * vpp} model chunks, but the model has "
            f"only {shape.num_layers} layers; at most {shape.num_layers // pp} works"
        )
    # Without a rollout too: the sum is the longest example that `osft sft` trains on.
    rollout = config.rollout
    tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    if tokens > shape.max_position:
        yield (
            "rollout.max_response_tokens: max_prompt_tokens + max_response_tokens = "
            f"{rollout.max_prompt_tokens} + {rollout.max_response_tokens} = {tokens}, but the "
            f"model has {shape.max_position} positions"
        )


def _rollout_shape(config: RunConfig, shape: ModelShape, device: str) -> Iterator[str]:
    yield from tensor_parallel_problems("rollout.tp", config.rollout.tp, shape)
    family = FAMILIES[shape.model_type]
    if not family.vllm_reads_head_dim and shape.head_dim * shape.num_heads != shape.hidden:
        yield (
            f"model.path: head_dim is {shape.head_dim}, but vLLM's {shape.model_type} takes "
            f"hidden_size / num_attention_heads = {shape.hidden}/{shape.num_heads}; "
            "choose a model where they agree"
        )
    if device == "cpu" and shape.head_dim not in CPU_HEAD_DIMS:
        yield (
            f"model.path: the model's head_dim is {shape.head_dim}; vLLM's CPU build supports "
            f"{listed(CPU_HEAD_DIMS)}; choose another model or run on a GPU"
        )


def _without_training(config: RunConfig, phase: Phase) -> Iterator[str]:
    resume, mode = config.checkpoint.resume, config.rollout.annealing.mode
    if resume not in ("", "auto", "never"):
        yield (
            f"checkpoint.resume: found {resume!r}, but osft {phase} takes its weights from "
            "model.path; expected auto or never (a checkpoint becomes such a folder with "
            "tools/convert_mcore_to_hf.py)"
        )
    if phase == "generate" and mode != "off":
        yield (
            f"rollout.annealing.mode: found {mode!r}, but osft generate samples all answers at "
            "rollout.tau_sample; set it to off"
        )


def _optional_parts(config: RunConfig, phase: Phase) -> Iterator[str]:
    if config.sync.mode == "alias" and not config.rollout.enforce_eager:
        yield (
            "sync.mode: alias needs rollout.enforce_eager=true, because compiled graphs fix where "
            "weights lie; change one of the two, or take auto"
        )
    yield from _offload(config, phase)
    if config.logging.wandb and importlib.util.find_spec("wandb") is None:
        yield "logging.wandb: the package wandb is not installed; install it or set it to false"


def _offload(config: RunConfig, phase: Phase) -> Iterator[str]:
    if config.train.offload != "all" or not trains(phase):
        return
    if phase == "sft":
        yield (
            "train.offload: all puts the weights away while answers are sampled, and osft sft "
            "samples none; choose optimizer"
        )
    elif config.sync.mode == "alias":
        yield (
            "train.offload: all puts the actor's weights away while the engine samples, but with "
            "sync.mode=alias the engine reads them where they are; choose optimizer, or "
            "sync.mode=auto, which copies then"
        )
