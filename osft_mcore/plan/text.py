"""A plan for people."""

from collections.abc import Iterator, Sequence

from osft_mcore.config.check_batches import sequences_per_update
from osft_mcore.config.describe import batch_table
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.plan.assumptions import GIB, GPUS_PER_NODE, Gpu, assumption_lines
from osft_mcore.plan.moments import PARTS
from osft_mcore.plan.run import RunPlan


def plan_text(plan: RunPlan, config: RunConfig, gpu: Gpu, *, phase: Phase) -> str:
    """All of it, what it assumes last."""
    lengths = plan.lengths
    parts = (
        "# Model and layout",
        *_layout_lines(plan, config),
        f"\n# Memory of one GPU, GiB: the estimate of a rank of pipeline stage {plan.stage}",
        *_memory_lines(plan),
        *_verdict(plan, gpu),
        *_engine_lines(plan, config),
        "host memory of a rank's copies (a save, train.offload, a reference): "
        f"{_gib(plan.host)} GiB",
        "\n# Disk",
        *_disk_lines(plan, config),
        "\n# Batches",
        batch_table(config, phase=phase).rstrip("\n"),
        *_push_lines(plan),
        "\n# Seconds of a step, under the assumptions below",
        *_seconds_lines(plan, config, phase),
        "\n# Assumptions",
        *assumption_lines(gpu, response_tokens=lengths.response, prompt_tokens=lengths.prompt),
    )
    return "\n".join(parts) + "\n"


def layout_options(config: RunConfig, *, phase: Phase) -> str:
    """What to write for the layout of `config`."""
    parallel = config.parallel
    names = ("tp", "cp", "pp", "vpp", "dp")
    sizes = {name: getattr(parallel, name) for name in names}
    options = [f"parallel.{name}={size}" for name, size in sizes.items()]
    options.append(f"parallel.sequence_parallel={str(parallel.sequence_parallel).lower()}")
    if phase == "train":
        options.append(f"rollout.tp={config.rollout.tp}")
    return " ".join(options)


def _layout_lines(plan: RunPlan, config: RunConfig) -> Iterator[str]:
    at, rollout = plan.topology, ""
    if plan.engine is not None:
        plural = "s" * (at.num_replicas > 1)
        rollout = f"; rollout tp={at.rollout_tp}, {at.num_replicas} replica{plural}"
    nodes = -(-at.world_size // GPUS_PER_NODE)
    yield f"{plan.parameters / 1e9:.2f}B parameters, {config.model.dtype}, {config.model.path}"
    yield (
        f"{at.world_size} GPU{'s' * (at.world_size > 1)} on {nodes} node{'s' * (nodes > 1)}: actor "
        + " ".join(f"{axis}={size}" for axis, size in at.actor_sizes().items())
        + (" +sp" if plan.sequence_parallel else "")
        + rollout
    )
    train = config.train
    yield (
        f"recompute={train.recompute} recompute_loss={str(train.recompute_loss).lower()} "
        f"offload={train.offload}"
    )


def _memory_lines(plan: RunPlan) -> Iterator[str]:
    """A column for every moment, a row for every part that is ever there."""
    columns = [_column(moment.name) for moment in plan.moments]
    widths = [max(7, *map(len, column)) for column in columns]
    first = max(len(part) for part in PARTS)
    for line in range(max(len(column) for column in columns)):
        cells = [column[line] if line < len(column) else "" for column in columns]
        yield _row("", cells, first, widths)
    for part in PARTS:
        values = [getattr(moment, part) for moment in plan.moments]
        if any(values):
            yield _row(part.replace("_", " "), map(_gib, values), first, widths)
    yield _row("total", [_gib(moment.total) for moment in plan.moments], first, widths)


def _column(name: str) -> list[str]:
    return name.split(" ", 1)


def _row(name: str, cells: Sequence[str] | Iterator[str], first: int, widths: list[int]) -> str:
    filled = (f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
    return f"{name:<{first}}  {'  '.join(filled)}".rstrip()


def _verdict(plan: RunPlan, gpu: Gpu) -> Iterator[str]:
    if plan.fits:
        left = gpu.memory - plan.peak.total
        yield f"fits: {_gib(left)} of {gpu.gib:g} GiB are left at the most ({plan.peak.name})"
    else:
        yield from (f"does not fit: {problem}" for problem in plan.problems)


def _engine_lines(plan: RunPlan, config: RunConfig) -> Iterator[str]:
    if plan.engine is not None:
        longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        yield (
            f"KV cache of a replica: {plan.engine.full_sequences} sequences of {longest} tokens at "
            f"once; rollout.max_num_seqs is {config.rollout.max_num_seqs}"
        )


def _disk_lines(plan: RunPlan, config: RunConfig) -> Iterator[str]:
    yield f"a checkpoint                {_gib(plan.disk.checkpoint):>8} GiB"
    yield (
        f"checkpoints, at most        {_gib(plan.disk.checkpoints):>8} GiB  checkpoint.keep_last "
        f"= {config.checkpoint.keep_last} and one being written"
        + ("; those of checkpoint.keep_every come on top" if config.checkpoint.keep_every else "")
    )
    yield f"the exported model          {_gib(plan.disk.export):>8} GiB"
    if plan.rollouts:
        yield f"answers of 1000 steps       {_gib(plan.rollouts):>8} GiB  logging.rollouts"
    if plan.evaluation:
        yield (
            f"answers to 1000 problems    {_gib(plan.evaluation):>8} GiB  "
            f"evaluation.num_samples = {config.evaluation.num_samples}, one temperature"
        )


def _push_lines(plan: RunPlan) -> Iterator[str]:
    if plan.push is not None:
        yield "\n# Bytes of a push"
        yield (
            f"received {_gib(plan.push.received)} GiB over all ranks, "
            f"{_gib(plan.push.busiest)} GiB on the busiest"
        )
        assert plan.engine is not None, "a push has an engine"
        yield (
            f"shared with the actor, not copied: {_gib(min(plan.push.shared))} of a rank's "
            f"{_gib(plan.engine.weights)} GiB of engine weights"
        )


def _seconds_lines(plan: RunPlan, config: RunConfig, phase: Phase) -> Iterator[str]:
    found = plan.seconds
    rows = {
        "rollout": found.rollout,
        "forward and backward": found.forward_backward,
        "sums in layers, stages": found.layers,
        "gradients over copies": found.copies,
        "optimizer": found.optimizer,
        "push": found.push,
        "a step": found.total,
    }
    for name, seconds in rows.items():
        if seconds:
            yield f"{name:<24}{seconds:>9.2f}"
    sequences = sequences_per_update(config, phase) * plan.batches.updates_per_step
    tokens = sequences * (plan.lengths.prompt + plan.lengths.response)
    yield f"{'tokens a step':<24}{tokens:>9.0f}"


def _gib(size: float) -> str:
    value = size / GIB
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
