"""The beginning of a run and its end: actor, folder, what the console says, the final model."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.export import export_hf
from osft_mcore.actor.reference import Reference
from osft_mcore.actor.start_weights import reference_source
from osft_mcore.checkpoint.folder import checkpoints_in, set_aside, step_of
from osft_mcore.checkpoint.manifest import problems_of, replace_member
from osft_mcore.checkpoint.model_card import model_card, read_provenance
from osft_mcore.config.load import to_yaml
from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.config.phases import trains
from osft_mcore.config.schema import Phase, RunConfig, TrainConfig
from osft_mcore.config.temperature import sampling_words
from osft_mcore.errors import CheckpointError, ConfigError
from osft_mcore.log.console import Console
from osft_mcore.log.lock import run_lock
from osft_mcore.log.manifest import manifest
from osft_mcore.log.metrics import Clock
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.model.kernels import installed, kernel_lines, kernels_in_use
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.parallel.rng import set_rng_state
from osft_mcore.parallel.world import job_attempt, job_id
from osft_mcore.train.checkpoints import Checkpoints
from osft_mcore.train.edge import StepEdge
from osft_mcore.train.inputs import data_hashes
from osft_mcore.train.resume import (
    BEGUN_FROM,
    CHECKPOINTS,
    RUN_MANIFEST,
    ProblemsOf,
    ResumePoint,
    begun_from,
    candidates,
    check_work_left,
    read_json,
    resume_point,
)
from osft_mcore.weights.side_files import CARD, read_side_files

FINAL = "hf"
"""The final model's folder in a run folder."""


def find_resume_point(
    config: RunConfig,
    phase: Phase,
    num_steps: int,
    context: ParallelContext,
    console: Console,
) -> ResumePoint | None:
    """What the run goes on from, told on the console; None if it begins. Collective.

    Raises as `check_work_left` and `resume_point`.
    """
    together = _problems_together(context, hashes=config.checkpoint.verify)
    point = resume_point(config, phase, together, _candidates_together(config, context))
    check_work_left(config, num_steps, point)
    if point is not None:
        for problem in point.skipped:
            console.say(f"skipped a checkpoint: {problem}")
        console.say(f"going on from {point.folder}: {point.step} of {num_steps} steps are done")
        for change in point.changed:
            console.say(f"changed since then: {change}")
    return point


def _candidates_together(config: RunConfig, context: ParallelContext) -> list[Path]:
    """Rank 0's view of the folders: those of other hosts may be older. Collective."""
    refusal, folders = "", list[str]()
    try:
        folders = [str(path) for path in candidates(config)]
    except ConfigError as error:
        refusal = error.problems[0]
    refusal, folders = all_gather_json([refusal, folders], context)[0]
    if refusal:
        raise ConfigError(refusal)
    return [Path(folder) for folder in folders]


def _problems_together(context: ParallelContext, *, hashes: bool) -> ProblemsOf:
    """Every rank looks at its share of the files and tells the others. Collective."""
    share = (context.rank, context.topology.world_size)

    def problems(folder: Path) -> list[str]:
        told = all_gather_json(problems_of(folder, hashes=hashes, share=share), context)
        return list(dict.fromkeys(line for lines in told for line in lines))

    return problems


def build_actor(
    config: RunConfig, context: ParallelContext, point: ResumePoint | None = None
) -> Actor:
    """The actor of this rank, weights loaded; from `point` on, if one is given.

    With algorithm.kl_coef > 0 its reference model too, which is the same wherever a run goes on.
    Every rank must call.
    """
    shape, reference = read_model_shape(config.model.path), None
    if config.algorithm.kl_coef > 0:
        # Before the actor: on a GPU it has left by then.
        source = reference_source(config.model, config.algorithm)
        reference = Reference(
            shape, context, source=source, parallel=config.parallel, seed=config.seed
        )
    actor = Actor(
        shape,
        context,
        model=config.model,
        parallel=config.parallel,
        train=config.train,
        algorithm=config.algorithm,
        max_response_tokens=config.rollout.max_response_tokens,
        seed=config.seed,
        checkpoint=point.folder if point else None,
        reference=reference,
    )
    if point is not None:
        actor.num_updates = point.num_updates
    return actor


def restore_rng(point: ResumePoint | None, context: ParallelContext) -> None:
    """Put this rank's random number generators where they were, if the ranks are as many.

    To be called last: whatever else is built may seed them.
    """
    if point is not None and len(point.state["rng"]) == context.topology.world_size:
        set_rng_state(point.state["rng"][context.rank])


@contextmanager
def open_folder(
    config: RunConfig,
    phase: Phase,
    context: ParallelContext,
    console: Console,
    data_files: Sequence[str],
    point: ResumePoint | None,
    num_steps: int,
    *,
    keep: bool = False,
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> Iterator[RunFolder]:
    """The run folder, locked, with config.yaml and manifest.json. Collective over the world.

    What it holds about steps after `point` is forgotten; `keep`: without a point nothing is.
    `extra` goes into the manifest. Raises ConfigError on every rank if
    another run uses the folder.
    """
    folder = RunFolder(config.output_dir, writer=context.rank == 0)
    with ExitStack() as stack:
        refusal = failure = ""
        if folder.writer:
            try:
                folder.check_is_folder()
                if config.checkpoint.resume == "never":
                    folder.check_unused()
                folder.create()
                lock = run_lock(folder.path, job_id=job_id(), attempt=job_attempt())
                if note := stack.enter_context(lock):
                    console.say(note)
                details = {} if keep else _make_way(config, folder, console, point, num_steps)
                if trains(phase):
                    # Of the actor, which the others have not.
                    used = kernels_in_use(installed())
                    details["kernels"] = {kernel.part: kernel.choice for kernel in used}
                details |= {**extra, **data_hashes(data_files)}
                folder.write_text("config.yaml", to_yaml(config))
                size = context.topology.world_size
                made = manifest(seed=config.seed, world_size=size, details=details)
                folder.write_json(RUN_MANIFEST, {"phase": phase, **made})
            except ConfigError as error:
                refusal = "\n".join(error.problems)
            except (CheckpointError, OSError) as error:
                failure = f"{folder.path} cannot be opened for a run: {error}"
        # The others must not go on where rank 0 cannot.
        refusal, failure = all_gather_json([refusal, failure], context)[0]
        if refusal:
            raise ConfigError(refusal)
        if failure:
            raise CheckpointError(failure)
        yield folder


def _make_way(
    config: RunConfig,
    folder: RunFolder,
    console: Console,
    point: ResumePoint | None,
    num_steps: int,
) -> dict[str, Any]:
    """Bring the folder to where the run goes on from; returns what the manifest says of it."""
    if point is None:
        aside = folder.put_aside()
        if aside is not None:
            final = f", with the final model in {FINAL}/" if (aside / FINAL).is_dir() else ""
            console.say(
                f"the run in {folder.path} ended before its first checkpoint; it begins anew, and "
                f"what it left is in {aside}{final}"
            )
        return {}
    for newer in checkpoints_in(folder.path / CHECKPOINTS):
        if (step_of(newer) or 0) > point.step:
            console.say(f"{newer} is not gone on from; it is now {set_aside(newer).name}")
    for lost in folder.keep_until(point.step, last=point.step == num_steps):
        console.say(f"left out a line that cannot be read: {lost}")
    path = folder.path / RUN_MANIFEST
    before = read_json(path) if path.is_file() else {}
    earlier = [*before.pop("earlier", []), *([before] if before else [])]
    named = config.checkpoint.resume
    begun = begun_from(folder.path) if named == "auto" else str(Path(named).resolve())
    return {
        **({BEGUN_FROM: begun} if begun else {}),
        "resumed_from": str(point.folder),
        "resumed_at_step": point.step,
        "changed_options": list(point.changed),
        "earlier": earlier,
    }


def build_edge(
    config: RunConfig,
    phase: Phase,
    num_steps: int,
    actor: Actor,
    clock: Clock,
    console: Console,
    point: ResumePoint | None,
) -> StepEdge:
    """What the loop calls after every step. Collective over the world.

    Raises CheckpointError on every rank if there is no room for a checkpoint.
    """
    named = config.checkpoint.resume not in ("auto", "never")
    checkpoints = Checkpoints(
        Path(config.output_dir) / CHECKPOINTS,
        config.checkpoint,
        actor,
        read_side_files(config.model.path, dtype=actor.dtype, derived=True),
        console,
        # What the command names must be there when it is started again.
        protected=point.folder.resolve() if point and named else None,
    )
    return StepEdge(config, phase, num_steps, actor=actor, checkpoints=checkpoints, clock=clock)


def export_final(config: RunConfig, actor: Actor, folder: RunFolder, num_steps: int) -> Path:
    """Write the final model and its card as a Hugging Face folder; where. Every rank must call."""
    final = folder.path / FINAL
    export_hf(
        actor,
        final,
        max_shard_bytes=config.checkpoint.max_shard_bytes,
        bucket_bytes=config.sync.bucket_bytes,
        card=_card(folder, num_steps),
    )
    return final


def renew_card(folder: RunFolder, num_steps: int) -> None:
    """Let the card of the exported model tell what was found since."""
    if folder.writer and (folder.path / FINAL).is_dir():
        replace_member(folder.path / FINAL, CARD, _card(folder, num_steps).encode())


def _card(folder: RunFolder, num_steps: int) -> str:
    name = f"{folder.path.name}, step {num_steps}"
    return model_card(read_provenance(folder.path, step=num_steps), name=name)


def say_model(console: Console, config: RunConfig, shape: ModelShape) -> None:
    """Where the run is, and the model that it starts from."""
    console.say(f"run folder: {config.output_dir}")
    console.say(
        f"model: {shape.model_type}, {shape.num_parameters / 1e6:.2f}M parameters, "
        f"{config.model.dtype}, from {config.model.path} ({config.model.init})"
    )
    if config.model.trust_remote_code:
        console.say("model.trust_remote_code: Python files in the model's folder may run here")


def say_start(console: Console, config: RunConfig, shape: ModelShape, *, num_steps: int) -> None:
    """What runs here: model, layouts, kernels, temperatures, length."""
    parallel, rollout = config.parallel, config.rollout
    say_model(console, config, shape)
    console.say(
        f"actor: Megatron-Core tp={parallel.tp} pp={parallel.pp} dp={parallel.dp}"
        f"{f' vpp={parallel.vpp}' if parallel.vpp > 1 else ''}"
        f"{f' cp={parallel.cp}' if parallel.cp > 1 else ''}"
        f"{' +sp' if parallel.sequence_parallel else ''}{_saving(config.train)};  "
        f"rollout: vLLM tp={rollout.tp}"
    )
    for line in kernel_lines(kernels_in_use(installed())):
        console.say(line)
    algorithm = config.algorithm
    tau_train = "the same" if algorithm.follow_tau_sample else f"{algorithm.tau_train:g}"
    off = " (annealing off)" if rollout.annealing.mode == "off" else ""
    entropy = ", objective entropy" if algorithm.objective == "entropy" else ""
    console.say(
        f"tau_sample {sampling_words(rollout.tau_sample, rollout.annealing)}{off}, "
        f"tau_train {tau_train}{entropy}, lr {config.train.lr:g}, {num_steps} steps"
    )
    if algorithm.kl_coef > 0:
        whose = algorithm.reference or "the starting model"
        console.say(f"KL penalty: {algorithm.kl_coef:g} times {algorithm.kl_kind} to {whose}")


def _saving(train: TrainConfig) -> str:
    """What is done to need less memory."""
    activations = "" if train.recompute == "none" else f" recompute={train.recompute}"
    offload = "" if train.offload == "none" else f" offload={train.offload}"
    return activations + (" +recompute_loss" if train.recompute_loss else "") + offload
