"""A run that does not train: a rollout engine with the weights of model.path, and no actor."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from osft_mcore.actor.start_weights import load_start_weights, start_tensors
from osft_mcore.checkpoint.source import checkpoint_weights
from osft_mcore.config.evaluation import benchmark_files
from osft_mcore.config.load import as_options
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import Phase, RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.errors import WeightError
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.rollout.engine import RolloutEngine
from osft_mcore.train.identity import identity
from osft_mcore.train.live_report import live_report
from osft_mcore.train.scored import START, Scored, identity_kept
from osft_mcore.train.start import open_folder, say_model
from osft_mcore.weights.fill import fill, filled
from osft_mcore.weights.finite import non_finite
from osft_mcore.weights.params import hf_layouts

BuildEngine = Callable[[RunConfig, ParallelContext, ChatTokenizer], RolloutEngine]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampler:
    """What a run needs that samples and does not train. Every rank has one."""

    engine: RolloutEngine
    folder: RunFolder
    metrics: MetricsLog
    clock: Clock


@contextmanager
def open_sampler(
    config: RunConfig,
    phase: Phase,
    context: ParallelContext,
    console: Console,
    build_engine: BuildEngine,
    tokenizer: ChatTokenizer,
    *,
    keep: bool,
) -> Iterator[Sampler]:
    """The engine, open for sampling, and the run folder. Collective over the world.

    `keep`: what the folder holds is gone on with.
    """
    clock = Clock(within=context.watch.phase)
    with ExitStack() as stack:
        with clock("start"):
            engine = build_engine(config, context, tokenizer)
            stack.callback(engine.close)
            fill_engine(engine, config, context)
        files = [config.data.train] if phase == "generate" else benchmark_files(config)
        began = _began_with(config, phase) if context.rank == 0 else {}
        # Only now: a model or an engine that cannot be built leaves no folder behind.
        folder = stack.enter_context(
            open_folder(config, phase, context, console, files, None, 0, keep=keep, extra=began)
        )
        stack.enter_context(live_report(folder, config.report, console))
        metrics = MetricsLog(folder, config.logging, as_options(config), console)
        stack.callback(metrics.close)
        # Of the run, not of its first batch.
        clock.flush()
        yield Sampler(engine=engine, folder=folder, metrics=metrics, clock=clock)


def _began_with(config: RunConfig, phase: Phase) -> dict[str, Any]:
    """What the manifest keeps, for a later start to know whether it goes on with the same."""
    made_of = identity_kept(config) if phase == "evaluate" else identity(config, phase)
    return {"options": as_options(config), "identity": made_of}


def fill_engine(
    engine: RolloutEngine, config: RunConfig, context: ParallelContext, scored: Scored = START
) -> None:
    """Read the weights into this rank's part of the engine, and open it. Every rank must call.

    Raises WeightError if they do not fit the model, or one of them is not finite.
    """
    shape, model = read_model_shape(config.model.path), config.model
    if scored.exported is not None:
        model = replace(model, path=str(scored.exported), init="pretrained")
    saved = None if scored.checkpoint is None else checkpoint_weights(scored.checkpoint)
    params, layout = engine.begin_update(), engine.layouts[context.rank]
    if config.sync.mode == "reload":
        dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
        if saved is None:
            engine.reload(start_tensors(shape, model, dtype=dtype, seed=config.seed))
        else:
            whole = hf_layouts(shape)
            engine.reload(filled(whole, saved.layouts, saved.rows, dtype=lambda _: dtype))
    else:
        if saved is None:
            load_start_weights(params, layout, shape, model, seed=config.seed)
        else:
            fill(params, layout, saved.layouts, saved.rows)
        if problems := non_finite(params, whose="the engine's"):
            raise WeightError(f"{scored.where}: {problems[0]}")
    engine.finish_update(scored.step + 1)


def say_start(console: Console, config: RunConfig, context: ParallelContext) -> None:
    """What runs here: folder, model, layout."""
    shape, topology = read_model_shape(config.model.path), context.topology
    say_model(console, config, shape)
    console.say(f"rollout: vLLM tp={topology.rollout_tp}, {topology.num_replicas} replicas")
