"""The plan of a run: memory, disk, batches, bytes of a push, seconds of a step. Builds nothing."""

from collections.abc import Iterator
from dataclasses import dataclass

from osft_mcore.config.check_batches import sequences_per_update
from osft_mcore.config.describe import BatchArithmetic, batch_arithmetic
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.phases import samples
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.errors import ConfigError
from osft_mcore.parallel.topology import Topology, run_topology
from osft_mcore.plan.actor_memory import ActorMemory, actor_memory, largest_micro_batch, layers_of
from osft_mcore.plan.assumptions import GIB, PROMPT_SHARE, RESPONSE_SHARE, Gpu
from osft_mcore.plan.disk import Disk, answer_bytes, disk, host_bytes
from osft_mcore.plan.engine_memory import EngineMemory, engine_memory
from osft_mcore.plan.moments import Moment, moments
from osft_mcore.plan.push import Push, push_of
from osft_mcore.plan.speed import (
    Lengths,
    StepSeconds,
    bandwidth_of,
    copies_seconds,
    forward_backward_seconds,
    layer_seconds,
    optimizer_seconds,
    pipeline_factor,
    rollout_seconds,
)
from osft_mcore.plan.stages import Stage, stages
from osft_mcore.rollout.vllm_layout import shard_layouts


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlan:
    """What a run will need. Memory is that of one GPU; all sizes are bytes."""

    parameters: int
    topology: Topology
    sequence_parallel: bool
    stage: int
    """The pipeline stage whose ranks need most."""
    moments: tuple[Moment, ...]
    """Of one of them."""
    host: int
    """Host memory of a rank's copies; see host_bytes."""
    engine: EngineMemory | None
    push: Push | None
    disk: Disk
    rollouts: int
    """Of the files of 1000 steps; 0 without logging.rollouts."""
    evaluation: int
    """Of the answers to 1000 problems at one temperature; 0 without evaluation.files."""
    batches: BatchArithmetic
    lengths: Lengths
    seconds: StepSeconds
    problems: tuple[str, ...]
    """Why memory is too little; empty if it is not."""

    @property
    def peak(self) -> Moment:
        """When most is needed."""
        return max(self.moments, key=lambda moment: moment.total)

    @property
    def fits(self) -> bool:
        """True if memory is enough."""
        return not self.problems


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """What every part of a plan reads."""

    config: RunConfig
    shape: ModelShape
    gpu: Gpu
    phase: Phase
    topology: Topology
    itemsize: int
    batches: BatchArithmetic
    lengths: Lengths

    @property
    def with_reference(self) -> bool:
        return self.config.algorithm.kl_coef > 0

    @property
    def sharded(self) -> bool:
        return self.config.parallel.distributed_optimizer


def plan_run(
    config: RunConfig,
    shape: ModelShape,
    gpu: Gpu,
    *,
    phase: Phase,
    response_tokens: float | None = None,
    at_best: bool = False,
) -> RunPlan:
    """Of a config that passed `check`; `response_tokens`: mean length of an answer.

    `at_best`: quickly, without the push, and as if the engine shared all weights with the actor.
    Raises ConfigError if sync.mode cannot be had with these layouts.
    """
    run = _Run(
        config=config,
        shape=shape,
        gpu=gpu,
        phase=phase,
        topology=run_topology(config, phase),
        itemsize=2 if config.model.dtype == "bf16" else 4,
        batches=batch_arithmetic(config, phase=phase),
        lengths=_lengths(config, response_tokens),
    )
    engine, push = _engine(run), None
    if engine is not None and not at_best:
        push = push_of(config, shape, run.topology, itemsize=run.itemsize)
    held = stages(shape, run.topology, vocab_multiple=config.model.vocab_multiple)
    actors = [_actor(run, stage) for stage in held]
    timelines = [_timeline(run, actor, engine, push, at) for at, actor in enumerate(actors)]
    worst = max(range(len(held)), key=lambda at: max(m.total for m in timelines[at]))
    answers = sequences_per_update(config, phase) * run.batches.updates_per_step
    rollouts, evaluation = (
        answer_bytes(config, run.lengths, per_step=answers) if samples(phase) else (0, 0)
    )
    return RunPlan(
        parameters=shape.num_parameters,
        topology=run.topology,
        sequence_parallel=config.parallel.sequence_parallel,
        stage=worst,
        moments=timelines[worst],
        host=max(_host(run, actor) for actor in actors),
        engine=engine,
        push=push,
        disk=disk(shape, held, config.checkpoint, tp=run.topology.tp, itemsize=run.itemsize),
        rollouts=rollouts,
        evaluation=evaluation,
        batches=run.batches,
        lengths=run.lengths,
        seconds=_seconds(run, actors[worst], engine, push),
        problems=tuple(_problems(run, timelines[worst], engine)),
    )


def _lengths(config: RunConfig, response_tokens: float | None) -> Lengths:
    rollout = config.rollout
    longest = rollout.max_response_tokens
    mean = longest * RESPONSE_SHARE if response_tokens is None else response_tokens
    if mean > longest:
        raise ConfigError(
            f"--response-tokens: found {mean:g}, expected at most rollout.max_response_tokens = "
            f"{longest}"
        )
    return Lengths(
        prompt=rollout.max_prompt_tokens * PROMPT_SHARE,
        response=mean,
        longest_response=longest,
    )


def _engine(run: _Run) -> EngineMemory | None:
    if not samples(run.phase):
        return None
    layouts = shard_layouts(run.shape, tp=run.topology.rollout_tp, tp_rank=0)
    return engine_memory(run.shape, layouts, run.config.rollout, run.gpu, itemsize=run.itemsize)


def _actor(run: _Run, stage: Stage) -> ActorMemory:
    parallel, train = run.config.parallel, run.config.train
    return actor_memory(
        run.shape,
        stage,
        layers_of(parallel, train, itemsize=run.itemsize, transformer_engine=True),
        largest_micro_batch(parallel, train, run.config.rollout),
        copies=run.topology.copies if run.sharded else 1,
        # A budget may end up with one sequence in each.
        num_micro_batches=run.batches.micro_batches or run.batches.sequences_per_dp_rank,
    )


def _timeline(
    run: _Run, actor: ActorMemory, engine: EngineMemory | None, push: Push | None, stage: int
) -> tuple[Moment, ...]:
    found = moments(
        actor,
        engine,
        offload=run.config.train.offload,
        shared=push.shared[stage] if push else engine.weights if engine else 0,
        buffers=push.buffers if push else 0,
        reference=actor.weights if run.with_reference else 0,
    )
    return tuple(found)


def _host(run: _Run, actor: ActorMemory) -> int:
    return host_bytes(
        actor,
        offload=run.config.train.offload,
        with_reference=run.with_reference,
        copies=run.topology.copies,
        sharded=run.sharded,
    )


def _seconds(
    run: _Run, actor: ActorMemory, engine: EngineMemory | None, push: Push | None
) -> StepSeconds:
    config, topology, updates = run.config, run.topology, run.batches.updates_per_step
    num = sequences_per_update(config, run.phase) * updates
    rollout = 0.0
    if engine is not None:
        rollout = rollout_seconds(
            run.shape,
            config.rollout,
            run.gpu,
            run.lengths,
            num_sequences=-(-num // topology.num_replicas),
            concurrent=_concurrent(run, engine),
            weight_bytes=engine.weights,
            kv_bytes_per_token=engine.kv_bytes_per_token,
        )
    moved = 0 if config.train.offload == "none" else actor.optimizer
    touched = actor.optimizer + actor.gradients + actor.weights
    of_copies = copies_seconds(actor.gradients, actor.weights, topology, sharded=run.sharded)
    return StepSeconds(
        rollout=rollout,
        **_of_layers(run, num),
        copies=updates * of_copies,
        optimizer=updates * optimizer_seconds(run.gpu, touched=touched, moved=moved),
        push=0.0 if push is None else push.busiest / bandwidth_of(topology.world_size),
    )


def _of_layers(run: _Run, num_sequences: int) -> dict[str, float]:
    train, lengths = run.config.train, run.lengths
    mean = lengths.prompt + lengths.response
    padding = 1.0
    packed = train.max_tokens_per_micro_batch is not None or run.topology.cp > 1
    if not packed and train.micro_batch_size > 1:
        # Rows are as long as the longest of a micro-batch: half way to the greatest length.
        padding = (1 + (lengths.prompt + lengths.longest_response) / mean) / 2
    per_rank = run.batches.sequences_per_dp_rank
    budget = train.max_tokens_per_micro_batch
    passes = run.batches.micro_batches or max(1.0, per_rank * mean / (budget or 1))
    computed = forward_backward_seconds(
        run.shape,
        run.gpu,
        run.topology,
        [mean] * num_sequences,
        positions_per_token=padding,
        recompute=train.recompute,
        recompute_loss=train.recompute_loss,
        with_reference=run.with_reference,
    )
    told = layer_seconds(
        run.shape,
        run.topology,
        positions=num_sequences * mean * padding,
        itemsize=run.itemsize,
        sequence_parallel=run.config.parallel.sequence_parallel,
        recompute=train.recompute,
        with_reference=run.with_reference,
    )
    factor = pipeline_factor(run.topology, passes)
    return {"forward_backward": computed * factor, "layers": told * factor}


def _concurrent(run: _Run, engine: EngineMemory) -> int:
    """Answers that a replica samples at once, of mean length."""
    mean = (run.lengths.prompt + run.lengths.response) * engine.kv_bytes_per_token
    return min(run.config.rollout.max_num_seqs, int(max(engine.kv_cache, 0) // mean))


def _problems(
    run: _Run, timeline: tuple[Moment, ...], engine: EngineMemory | None
) -> Iterator[str]:
    worst = max(timeline, key=lambda moment: moment.total)
    train = run.config.train
    if worst.total > run.gpu.memory:
        ways = {
            "lower rollout.gpu_memory_utilization": engine is not None,
            "lower train.micro_batch_size": train.micro_batch_size > 1
            and train.max_tokens_per_micro_batch is None,
            "choose train.recompute=full": train.recompute != "full",
            "choose train.offload=optimizer": train.offload == "none",
            "raise parallel.tp, pp or dp": True,
        }
        yield (
            f"{worst.name}: needs {worst.total / GIB:.1f} GiB of a GPU that has {run.gpu.gib:g}; "
            + ", or ".join(way for way, is_left in ways.items() if is_left)
        )
    if engine is not None and not engine.full_sequences:
        yield (
            f"engine: its share leaves {engine.kv_cache / GIB:.1f} GiB for keys and values, not "
            "enough for one sequence of the greatest length; raise "
            "rollout.gpu_memory_utilization or rollout.tp"
        )
