"""One online SFT run, from inputs to summary."""

from contextlib import ExitStack

import torch

from osft_mcore.actor.actor import Actor
from osft_mcore.config.load import as_options
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.evaluation.evaluator import Evaluator
from osft_mcore.evaluation.grading import Grader
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.rollout.vllm_engine import VllmEngine
from osft_mcore.rollout.vllm_layout import engine_layouts
from osft_mcore.train.inputs import HeldOut, load_held_out, load_train_prompts, total_steps
from osft_mcore.train.loop import OsftLoop
from osft_mcore.train.start import build_actor, open_folder, say_start
from osft_mcore.train.summary import print_summary, summarise
from osft_mcore.train.weight_plan import alias_forbidden
from osft_mcore.weights.alias import delivery_lines
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.sync import PushReport, WeightSync
from osft_mcore.weights.ways import Ends


def run_osft(config: RunConfig, context: ParallelContext, console: Console) -> None:
    """Train and evaluate; leaves the run folder behind. Every rank must call."""
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    shape = read_model_shape(config.model.path)
    train = load_train_prompts(config, tokenizer)
    held_out = load_held_out(config, tokenizer)
    num_steps = total_steps(config, len(train.prompts))
    say_start(console, config, shape, num_steps=num_steps)
    console.say(
        f"data: {len(train.prompts)} prompts ({train.num_dropped_overlong} over "
        f"{config.rollout.max_prompt_tokens} tokens dropped), {held_out.num_problems} held-out "
        f"problems ({held_out.num_dropped_overlong} dropped)"
    )
    clock = Clock()
    with ExitStack() as stack:
        with clock("start"):
            actor = build_actor(config, context)
            engine = build_engine(config, context, tokenizer)
            sync = build_sync(config, actor, engine)
        stack.callback(engine.close)
        _say_deliveries(console, sync)
        # Only now: a model or an engine that cannot be built leaves no folder behind.
        folder = open_folder(config, context, [config.data.train, *config.evaluation.files])
        metrics = MetricsLog(folder, config.logging, as_options(config))
        stack.callback(metrics.close)
        grader = stack.enter_context(build_grader(config)) if context.rank == 0 else None
        loop = OsftLoop(
            config=config,
            num_steps=num_steps,
            prompts=train.prompts,
            actor=actor,
            engine=engine,
            sync=sync,
            evaluator=_evaluator(config, engine, held_out, tokenizer, grader),
            folder=folder,
            metrics=metrics,
            console=console,
            clock=clock,
            decode=tokenizer.decode,
        )
        with clock("sync"):
            _say_push(console, sync.push())
        start = loop.score_start()
        clock.flush()
        loop.fit()
        end = loop.evaluate(num_steps, config.evaluation.temperature)
        if config.checkpoint.final:
            loop.save("hf")
        summary = summarise(loop, start, end, context.topology)
        folder.write_json("summary.json", summary)
        print_summary(console, summary)


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


def build_grader(config: RunConfig) -> Grader:
    """The grader of the one rank that grades; its workers start when they are first needed."""
    return Grader(config.evaluation.grader_workers, config.evaluation.grader_timeout_s)


def build_engine(
    config: RunConfig, context: ParallelContext, tokenizer: ChatTokenizer
) -> VllmEngine:
    """The rollout engine of this world, without weights."""
    return VllmEngine(
        config.model.path,
        rollout=config.rollout,
        dtype=torch.bfloat16 if config.model.dtype == "bf16" else torch.float32,
        seed=config.seed,
        stop_token_ids=sorted(tokenizer.eos_token_ids),
        context=context,
        live_weights=config.sync.mode != "reload",
    )


def build_sync(config: RunConfig, actor: Actor, engine: VllmEngine) -> WeightSync:
    """The bridge between the two, its plan computed and compared over all ranks."""
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
        engine_layouts(actor.shape, context.topology),
        hf_layouts(actor.shape),
        ends,
        config.sync,
        alias_forbidden=alias_forbidden(config.sync, config.rollout),
    )


def _evaluator(
    config: RunConfig,
    engine: VllmEngine,
    held_out: HeldOut,
    tokenizer: ChatTokenizer,
    grader: Grader | None,
) -> Evaluator | None:
    if not held_out.by_source:
        return None
    return Evaluator(
        engine,
        held_out.by_source,
        tokenizer.decode,
        grader,
        num_samples=config.evaluation.num_samples,
        top_p=config.evaluation.top_p,
        max_tokens=config.rollout.max_response_tokens,
        seed=config.seed,
    )
