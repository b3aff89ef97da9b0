"""What --dry-run prints: the resolved config, the rank layout and the batch arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from osft_mcore.config.check_batches import sequences_per_update
from osft_mcore.config.evaluation import temperatures
from osft_mcore.config.load import to_yaml
from osft_mcore.config.phases import trains
from osft_mcore.config.schema import Phase, RunConfig


class RankPlace(Protocol):
    """One rank's place in the actor's and the rollout's layout."""

    @property
    def rank(self) -> int:
        """Global rank."""
        ...

    @property
    def tp_rank(self) -> int:
        """Rank in the actor's tensor-parallel group."""
        ...

    @property
    def cp_rank(self) -> int:
        """Rank in the actor's context-parallel group."""
        ...

    @property
    def dp_rank(self) -> int:
        """Rank in the actor's data-parallel group."""
        ...

    @property
    def pp_rank(self) -> int:
        """Pipeline stage."""
        ...

    @property
    def replica(self) -> int:
        """Rollout replica."""
        ...

    @property
    def rollout_tp_rank(self) -> int:
        """Rank in the replica's tensor-parallel group."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchArithmetic:
    """How a rollout batch is cut into updates, ranks and micro-batches."""

    prompts_per_step: int
    updates_per_step: int
    sequences_per_update: int
    """Over all ranks."""
    sequences_per_dp_rank: int
    """Of one update."""
    micro_batches: int | None
    """Forward passes of one rank in one update; None: it depends on the lengths."""
    steps_per_epoch: int | None
    """None: the size of the data set is not known. An incomplete last batch is dropped."""
    steps: int | None
    """Of the whole run; None: follows from the data set, whose size is not known."""


def batch_arithmetic(
    config: RunConfig, *, phase: Phase, num_prompts: int | None = None
) -> BatchArithmetic:
    """Arithmetic of a config that passed `check`; `num_prompts` is the size of the data set."""
    train = config.train
    sequences = sequences_per_update(config, phase)
    per_rank = sequences // config.parallel.dp
    per_epoch = None if num_prompts is None else num_prompts // train.prompts_per_step
    steps = train.steps
    if steps is None and per_epoch is not None:
        steps = train.epochs * per_epoch
    return BatchArithmetic(
        prompts_per_step=train.prompts_per_step,
        updates_per_step=train.prompts_per_step // train.prompts_per_update,
        sequences_per_update=sequences,
        sequences_per_dp_rank=per_rank,
        micro_batches=(
            per_rank // train.micro_batch_size if train.max_tokens_per_micro_batch is None else None
        ),
        steps_per_epoch=per_epoch,
        steps=steps,
    )


def describe(
    config: RunConfig,
    *,
    phase: Phase,
    ranks: Sequence[RankPlace],
    num_prompts: int | None = None,
) -> str:
    """All that --dry-run prints, for a config that passed `check`."""
    return "\n".join(
        (
            "# Config",
            to_yaml(config),
            "# Ranks",
            rank_table(ranks) + _chunk_line(config),
            "# Batches",
            batch_table(config, phase=phase, num_prompts=num_prompts),
        )
    )


def rank_table(ranks: Sequence[RankPlace]) -> str:
    """One line per rank: its actor shard and its rollout replica."""
    header = ("rank", "tp", "cp", "dp", "pp", "rollout replica", "rollout tp")
    rows = [
        (r.rank, r.tp_rank, r.cp_rank, r.dp_rank, r.pp_rank, r.replica, r.rollout_tp_rank)
        for r in ranks
    ]
    lines = [header, *(tuple(str(number) for number in row) for row in rows)]
    return "".join(
        "  ".join(cell.rjust(len(name)) for cell, name in zip(line, header, strict=True)) + "\n"
        for line in lines
    )


def _chunk_line(config: RunConfig) -> str:
    vpp = config.parallel.vpp
    return f"each pp stage holds {vpp} model chunks (parallel.vpp)\n" if vpp > 1 else ""


def batch_table(config: RunConfig, *, phase: Phase, num_prompts: int | None = None) -> str:
    """One line per quantity: its value, the numbers it comes from, the options behind them."""
    if not trains(phase):
        return _sampling_table(config, phase, num_prompts)
    train, dp = config.train, config.parallel.dp
    batch = batch_arithmetic(config, phase=phase, num_prompts=num_prompts)
    samples = phase == "train"
    lines = [
        ("prompts a step", batch.prompts_per_step, "", "train.prompts_per_step"),
        (
            "optimizer updates a step",
            batch.updates_per_step,
            f"{train.prompts_per_step} / {train.prompts_per_update}",
            "train.prompts_per_step / train.prompts_per_update",
        ),
        (
            "sequences an update",
            batch.sequences_per_update,
            f"{train.prompts_per_update} * {config.rollout.num_samples}" if samples else "",
            "train.prompts_per_update" + (" * rollout.num_samples" if samples else ""),
        ),
        (
            "sequences a data-parallel rank",
            batch.sequences_per_dp_rank,
            f"{batch.sequences_per_update} / {dp}",
            "sequences an update / parallel.dp",
        ),
        _micro_batch_line(config, batch),
        *_length_lines(config, batch, num_prompts),
    ]
    return _aligned(lines)


def _micro_batch_line(config: RunConfig, batch: BatchArithmetic) -> tuple[str, int, str, str]:
    train, cp = config.train, config.parallel.cp
    if batch.micro_batches is None:
        budget = train.max_tokens_per_micro_batch
        assert budget is not None, "only a budget leaves the number open"
        source = "train.max_tokens_per_micro_batch"
        if cp > 1:
            source += f", over all {cp} ranks of parallel.cp: each computes 1 / {cp} of them"
        return ("most tokens a micro-batch", budget, "", source)
    return (
        "micro-batches a rank and update",
        batch.micro_batches,
        f"{batch.sequences_per_dp_rank} / {train.micro_batch_size}",
        "sequences a rank / train.micro_batch_size",
    )


def _length_lines(
    config: RunConfig, batch: BatchArithmetic, num_prompts: int | None
) -> list[tuple[str, int, str, str]]:
    lines = []
    if batch.steps_per_epoch is not None:
        lines.append(
            (
                "steps an epoch",
                batch.steps_per_epoch,
                f"{num_prompts} / {batch.prompts_per_step}",
                "prompts in data.train / train.prompts_per_step, rounded down",
            )
        )
    if batch.steps is not None:
        from_epochs = config.train.steps is None
        numbers = f"{config.train.epochs} * {batch.steps_per_epoch}" if from_epochs else ""
        source = "train.epochs * steps an epoch" if from_epochs else "train.steps"
        lines.append(("steps", batch.steps, numbers, source))
        lines.append(
            (
                "optimizer updates",
                batch.steps * batch.updates_per_step,
                f"{batch.steps} * {batch.updates_per_step}",
                "steps * updates a step",
            )
        )
    return lines


def _sampling_table(config: RunConfig, phase: Phase, num_prompts: int | None) -> str:
    if phase == "evaluate":
        evaluation = config.evaluation
        baseline = not evaluation.run
        names = "temperature, baseline_temperatures, sweep" if baseline else "temperature, sweep"
        number = len(temperatures(evaluation, baseline=baseline))
        lines = [
            ("samples a problem", evaluation.num_samples, "", "evaluation.num_samples"),
            ("temperatures", number, "", f"evaluation.{names}"),
        ]
        return _aligned(lines)
    size, answers = config.train.prompts_per_step, config.rollout.num_samples
    options = "train.prompts_per_step * rollout.num_samples"
    lines = [
        ("prompts a batch", size, "", "train.prompts_per_step"),
        ("answers a batch", size * answers, f"{size} * {answers}", options),
    ]
    if num_prompts is not None:
        batches, limit = -(-num_prompts // size), config.train.steps
        source = "prompts in data.train / train.prompts_per_step, rounded up; at most train.steps"
        numbers = f"{num_prompts} / {size}" if limit is None or limit >= batches else ""
        lines.append(("batches", min(batches, limit or batches), numbers, source))
    return _aligned(lines)


def _aligned(lines: Sequence[tuple[str, int, str, str]]) -> str:
    names = max(len(name) for name, *_ in lines)
    values = max(len(str(value)) for _, value, *_ in lines)
    formulas = max(len(numbers) for _, _, numbers, _ in lines)
    return "".join(
        f"{name:<{names}}  {value:>{values}} {'=' if numbers else ' '} {numbers:<{formulas}}  "
        f"{source}\n"
        for name, value, numbers, source in lines
    )
