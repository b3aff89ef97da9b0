"""A run that does not train: a rollout engine with the weights of model.path, and no actor."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Final

import torch

from osft_mcore.actor.start_weights import load_start_weights, start_tensors
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
from osft_mcore.train.earlier import began_with
from osft_mcore.train.start import open_folder, say_model
from osft_mcore.weights.finite import non_finite

BuildEngine = Callable[[RunConfig, ParallelContext, ChatTokenizer], RolloutEngine]
WEIGHT_VERSION: Final = 1
"""The only one that there is."""


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
    clock = Clock()
    with ExitStack() as stack:
        with clock("start"):
            engine = build_engine(config, context, tokenizer)
            stack.callback(engine.close)
            fill_engine(engine, config, context)
        files = [config.data.train] if phase == "generate" else config.evaluation.files
        began = began_with(config, phase) if context.rank == 0 else {}
        # Only now: a model or an engine that cannot be built leaves no folder behind.
        folder = stack.enter_context(
            open_folder(config, phase, context, console, files, None, 0, keep=keep, extra=began)
        )
        metrics = MetricsLog(folder, config.logging, as_options(config))
        stack.callback(metrics.close)
        # Of the run, not of its first batch.
        clock.flush()
        yield Sampler(engine=engine, folder=folder, metrics=metrics, clock=clock)


def fill_engine(engine: RolloutEngine, config: RunConfig, context: ParallelContext) -> None:
    """Read the weights into this rank's part of the engine, and open it.

    Raises WeightError if they do not fit the model, or one of them is not finite.
    """
    shape, model = read_model_shape(config.model.path), config.model
    params = engine.begin_update()
    if config.sync.mode == "reload":
        dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
        engine.reload(start_tensors(shape, model, dtype=dtype, seed=config.seed))
    else:
        load_start_weights(params, engine.layouts[context.rank], shape, model, seed=config.seed)
        if problems := non_finite(params, whose="the engine's"):
            raise WeightError(f"model.path: {problems[0]}")
    engine.finish_update(WEIGHT_VERSION)


def say_start(console: Console, config: RunConfig, context: ParallelContext) -> None:
    """What runs here: folder, model, layout."""
    shape, topology = read_model_shape(config.model.path), context.topology
    say_model(console, config, shape)
    console.say(f"rollout: vLLM tp={topology.rollout_tp}, {topology.num_replicas} replicas")
