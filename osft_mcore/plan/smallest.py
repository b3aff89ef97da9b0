"""The smallest layout that fits a GPU."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Final

from osft_mcore.config.phases import samples
from osft_mcore.config.schema import ParallelConfig, Phase, RunConfig
from osft_mcore.errors import ConfigError
from osft_mcore.plan.assumptions import GPUS_PER_NODE
from osft_mcore.plan.run import RunPlan

MOST_GPUS: Final = 512
NEAR: Final = 1.1


def smallest_layout(
    config: RunConfig,
    *,
    phase: Phase,
    check: Callable[[RunConfig], None],
    plan: Callable[..., RunPlan],
) -> tuple[RunConfig, RunPlan]:
    """Of 1, 2, 4, ... GPUs the fewest that are enough; of their layouts the quickest by its plan.

    Within a tenth of the quickest the fewest pipeline stages count: estimates are no closer, and a
    pipeline has costs of its own that no plan knows.

    Everything but parallel and rollout.tp stays. `check` raises ConfigError for a layout that the
    model or the batches do not have; `plan` is `plan_run` of all but the config and at_best. The
    push, which takes long to plan, does not count where layouts are compared. Raises ConfigError if
    none fits.
    """
    world, reason = 1, ""
    while world <= MOST_GPUS:
        hopeful: list[tuple[float, RunConfig]] = []
        for layout in layouts(config, world, phase=phase):
            try:
                check(layout)
                best = plan(layout, at_best=True)
            except ConfigError as error:
                reason = error.problems[0]
                continue
            if best.fits:
                hopeful.append((best.seconds.total, layout))
            else:
                reason = best.problems[0]
        near = NEAR * min((seconds for seconds, _ in hopeful), default=0.0)
        ranked = sorted(
            hopeful, key=lambda pair: (max(pair[0], near), pair[1].parallel.pp, pair[0])
        )
        for _, layout in ranked:
            try:
                found = plan(layout)
            except ConfigError as error:
                # This sync.mode cannot be had with it.
                reason = error.problems[0]
                continue
            if found.fits:
                return layout, found
            reason = found.problems[0]
        world *= 2
    raise ConfigError(
        f"parallel: no layout of 1 to {MOST_GPUS} GPUs fits with these options; the last one "
        f"tried: {reason}"
    )


def layouts(config: RunConfig, world: int, *, phase: Phase) -> Iterator[RunConfig]:
    """Usual layouts on `world` GPUs: tensor parallelism within a node, no context parallelism."""
    powers = [2**n for n in range(world.bit_length()) if 2**n <= world]
    inside = [size for size in powers if size <= GPUS_PER_NODE]
    for tp in inside:
        for pp in powers:
            if tp * pp > world:
                continue
            parallel = _parallel(config.parallel, tp=tp, pp=pp, dp=world // (tp * pp))
            for rollout_tp in inside if samples(phase) else (config.rollout.tp,):
                rollout = replace(config.rollout, tp=rollout_tp)
                yield replace(config, parallel=parallel, rollout=rollout)


def _parallel(parallel: ParallelConfig, *, tp: int, pp: int, dp: int) -> ParallelConfig:
    return replace(parallel, tp=tp, pp=pp, dp=dp, cp=1, vpp=1, sequence_parallel=tp > 1)
