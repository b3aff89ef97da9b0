"""The evaluator of a run: scores the weights that the run leaves it, one after the other."""

import dataclasses
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from osft_mcore.config.schema import RunConfig
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.deadlines import IDLE
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.train.inputs import load_chat_tokenizer, load_held_out
from osft_mcore.train.sampler import BuildEngine, fill_engine
from osft_mcore.train.scored import Scored
from osft_mcore.train.scoring import open_scoring
from osft_mcore.train.snapshots import (
    Entry,
    end_announced,
    fail_damaged,
    snapshots_folder,
    waiting,
    withdraw,
)

POLL_S: Final = 0.2


def run_follow(
    config: RunConfig, context: ParallelContext, console: Console, build_engine: BuildEngine
) -> None:
    """Score until the run says that nothing will come and nothing is left. Every rank must call.

    Writes the evaluations/ of the run's folder; the run itself tells of them.
    """
    queue, clock = snapshots_folder(config), Clock(within=context.watch.phase)
    tokenizer = load_chat_tokenizer(config)
    held_out = load_held_out(config, tokenizer)
    folder = RunFolder(config.output_dir, writer=context.rank == 0)
    with ExitStack() as stack:
        engine = build_engine(config, context, tokenizer)
        stack.callback(engine.close)
        scoring = stack.enter_context(
            open_scoring(
                config, context, engine, held_out, tokenizer, folder=folder,
                metrics=MetricsLog(folder, config.logging, {}), console=console, clock=clock,
            )
        )  # fmt: skip
        assert scoring is not None, "the run's options were checked: there are evaluation.files"
        console.say("ready")
        in_engine = None
        while (entry := _next_entry(queue, context, console)) is not None:
            if in_engine != entry.step:
                exported = Path(entry.weights) if entry.weights else None
                fill_engine(engine, config, context, Scored(step=entry.step, exported=exported))
                in_engine = entry.step
            scoring.answer(*entry.at)
            if folder.writer:
                withdraw(queue, entry.at)
            seconds = clock.flush()["time/evaluate_s"]
            console.say(f"step {entry.step}, temperature {entry.temperature:g}: {seconds:.1f} s")


def _next_entry(queue: Path, context: ParallelContext, console: Console) -> Entry | None:
    """What to score next, waited for; None at the end. Rank 0 looks. Collective."""
    with context.watch.phase(IDLE):
        while True:
            ended, found = False, list[Entry]()
            if context.rank == 0:
                ended = end_announced(queue)
                for line in fail_damaged(queue):
                    console.say(f"not scored: {line}")
                found = waiting(queue)
            first = dataclasses.asdict(found[0]) if found else None
            ended, first = all_gather_json([ended, first], context)[0]
            if first is not None:
                return Entry(**first)
            if ended:
                return None
            time.sleep(POLL_S)
