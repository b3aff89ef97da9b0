"""One online SFT run, from inputs to summary."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from osft_mcore.actor.actor import Actor
from osft_mcore.config.evaluation import benchmark_files
from osft_mcore.config.load import as_options
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.problems import Problems
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.parallel.groups import ParallelContext, wait_for_all
from osft_mcore.rollout.engine import RolloutEngine
from osft_mcore.train.inputs import (
    HeldOut,
    load_chat_tokenizer,
    load_held_out,
    load_train_prompts,
    total_steps,
)
from osft_mcore.train.live_report import live_report
from osft_mcore.train.loop import OsftLoop
from osft_mcore.train.resume import SUMMARY
from osft_mcore.train.sampler import BuildEngine
from osft_mcore.train.scores import open_scores
from osft_mcore.train.scoring import open_scoring
from osft_mcore.train.start import (
    build_actor,
    build_edge,
    export_final,
    find_resume_point,
    open_folder,
    renew_card,
    restore_rng,
    say_start,
)
from osft_mcore.train.summary import print_summary, say_unscored, seconds_of, summarise
from osft_mcore.train.weight_plan import alias_forbidden
from osft_mcore.weights.alias import delivery_lines
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.sync import PushReport, WeightSync
from osft_mcore.weights.ways import Ends


def run_osft(
    config: RunConfig, context: ParallelContext, console: Console, build_engine: BuildEngine
) -> None:
    """Train and evaluate; leaves the run folder behind. Every rank must call.

    Goes on with an interrupted run. Raises Stopped once it was told to stop and has saved.
    """
    with open_loop(config, context, console, build_engine) as loop:
        with loop.edge.listening():
            _say_push(console, loop.push())
            if not loop.num_done:
                loop.ask_scores_of_start()
            loop.clock.flush()
            loop.fit()
            exported = None
            if config.checkpoint.final:
                # Before the evaluation, which may take long: what was trained is safe.
                with loop.clock("save"):
                    exported = export_final(config, loop.actor, loop.folder, loop.num_steps)
            loop.ask_scores(loop.num_steps, exported)
            loop.scores.finish(loop.edge.hurry)
        renew_card(loop.folder, loop.num_steps)
        summary = summarise(loop, context.topology)
        summary["seconds"] = seconds_of(loop.clock)
        # Last: it says that nothing is left to do.
        loop.folder.write_json(SUMMARY, summary)
        print_summary(console, summary)
        say_unscored(console, loop.folder.path, summary)
        # No rank ends before that, which may take long: their launcher would not wait so long.
        wait_for_all(context)


@contextmanager
def open_loop(
    config: RunConfig, context: ParallelContext, console: Console, build_engine: BuildEngine
) -> Iterator[OsftLoop]:
    """Everything that a run needs, from its inputs on, and its folder; nothing is pushed yet.

    Collective over the world.
    """
    tokenizer = load_chat_tokenizer(config)
    train = load_train_prompts(config, tokenizer)
    held_out = load_held_out(config, tokenizer)
    num_steps = total_steps(config, len(train.prompts))
    say_start(console, config, read_model_shape(config.model.path), num_steps=num_steps)
    _say_data(console, config, train, held_out)
    point = find_resume_point(config, "train", num_steps, context, console)
    clock = Clock(point.seconds if point else None, within=context.watch.phase)
    with ExitStack() as stack:
        with clock("start"):
            actor = build_actor(config, context, point)
            engine = build_engine(config, context, tokenizer)
            stack.callback(engine.close)
            sync = build_sync(config, actor, engine, version=point.num_pushes if point else 0)
        _say_deliveries(console, sync)
        files = [config.data.train, *benchmark_files(config)]
        # Only now: a model or an engine that cannot be built leaves no folder behind.
        folder = stack.enter_context(
            open_folder(config, "train", context, console, files, point, num_steps)
        )
        stack.enter_context(live_report(folder, config.report, console))
        metrics = MetricsLog(folder, config.logging, as_options(config), console)
        stack.callback(metrics.close)
        scoring = stack.enter_context(open_scoring(
            config, context, engine, held_out, tokenizer,
            folder=folder, metrics=metrics, console=console, clock=clock, actor=actor,
        ))  # fmt: skip
        scores = stack.enter_context(open_scores(config, scoring, actor, console, point, num_steps))
        restore_rng(point, context)
        yield OsftLoop(
            config=config,
            num_steps=num_steps,
            num_done=point.step if point else 0,
            prompts=train.prompts,
            actor=actor,
            engine=engine,
            sync=sync,
            scores=scores,
            folder=folder,
            metrics=metrics,
            console=console,
            clock=clock,
            edge=build_edge(config, "train", num_steps, actor, clock, console, point),
            decode=tokenizer.decode,
        )


def _say_data(console: Console, config: RunConfig, train: Problems, held_out: HeldOut) -> None:
    console.say(
        f"data: {len(train.prompts)} prompts ({train.num_dropped_overlong} over "
        f"{config.rollout.max_prompt_tokens} tokens dropped), {held_out.num_problems} held-out "
        f"problems ({held_out.num_dropped_overlong} dropped)"
    )


def _say_deliveries(console: Console, sync: WeightSync) -> None:
    for line in delivery_lines(sync.deliveries):
        console.say(f"weights to vLLM: {line}")


def _say_push(console: Console, push: PushReport) -> None:
    sizes = (push.bytes_received, push.bytes_least, push.bytes_local, push.bytes_aliased)
    received, least, local, aliased, buffers = (
        f"{size / 2**20:.1f} MiB" for size in (*sizes, push.peak_extra_bytes)
    )
    console.say(
        f"first push: {push.seconds:.2f} s; received {received} (the least possible: {least}), "
        f"copied {local} within ranks, shared {aliased}; buffers {buffers}"
    )


def build_sync(
    config: RunConfig, actor: Actor, engine: RolloutEngine, *, version: int = 0
) -> WeightSync:
    """The bridge between the two, its plan computed and compared over all ranks.

    Its first push delivers weight version `version` + 1.
    """
    context = actor.context
    ends = Ends(
        rank=context.rank,
        source_params=actor.parameters,
        target=engine,
        dtype=actor.dtype,
        group=context.world_group,
        device=context.device,
    )
    return WeightSync(
        actor.layouts,
        engine.layouts,
        hf_layouts(actor.shape),
        ends,
        config.sync,
        alias_forbidden=alias_forbidden(config.sync, config.rollout, config.train),
        version=version,
    )
