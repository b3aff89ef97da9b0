"""Supervised fine-tuning on given answers, with the same actor: the phase before OSFT."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.result import UpdateResult
from osft_mcore.config.load import as_options
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.order import batch_rows
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.records import Example
from osft_mcore.train.edge import StepEdge
from osft_mcore.train.inputs import load_sft_examples, load_sft_tokenizer, total_steps
from osft_mcore.train.live_report import live_report
from osft_mcore.train.performance import performance_metrics
from osft_mcore.train.resume import SUMMARY
from osft_mcore.train.schedules import learning_rate
from osft_mcore.train.skipped import SkippedUpdates, example_rows
from osft_mcore.train.start import (
    build_actor,
    build_edge,
    export_final,
    find_resume_point,
    open_folder,
    restore_rng,
    say_start,
)
from osft_mcore.train.step_metrics import shown, update_metrics
from osft_mcore.train.summary import seconds_of


def run_sft(config: RunConfig, context: ParallelContext, console: Console) -> None:
    """Train on (prompt, response) pairs; leaves the run folder behind. Every rank must call.

    Goes on with an interrupted run. Raises Stopped once it was told to stop and has saved.
    """
    tokenizer = load_sft_tokenizer(config)
    data = load_sft_examples(config, tokenizer)
    num_steps = total_steps(config, len(data.examples))
    say_start(console, config, read_model_shape(config.model.path), num_steps=num_steps)
    console.say(f"data: {len(data.examples)} examples ({data.num_dropped_overlong} dropped)")
    point = find_resume_point(config, "sft", num_steps, context, console)
    clock = Clock(point.seconds if point else None, within=context.watch.phase)
    with clock("start"):
        actor = build_actor(config, context, point)
    with ExitStack() as stack:
        # Only now: a model that cannot be built leaves no folder behind.
        folder = stack.enter_context(
            open_folder(config, "sft", context, console, [config.data.train], point, num_steps)
        )
        stack.enter_context(live_report(folder, config.report, console))
        metrics = MetricsLog(folder, config.logging, as_options(config), console)
        stack.callback(metrics.close)
        restore_rng(point, context)
        loop = SftLoop(
            config=config,
            num_steps=num_steps,
            num_done=point.step if point else 0,
            examples=data.examples,
            actor=actor,
            folder=folder,
            metrics=metrics,
            console=console,
            clock=clock,
            edge=build_edge(config, "sft", num_steps, actor, clock, console, point),
        )
        clock.flush()
        loop.fit()
        if config.checkpoint.final:
            with clock("save"):
                export_final(config, actor, folder, num_steps)
        # Last: it says that nothing is left to do.
        rows = folder.read_lines("metrics.jsonl")
        nll = next((row["loss/nll"] for row in reversed(rows) if "loss/nll" in row), None)
        summary = {"steps": num_steps, "nll": nll, "seconds": seconds_of(clock)}
        folder.write_json(SUMMARY, summary)


@dataclass(frozen=True, slots=True, kw_only=True)
class SftLoop:
    """The collaborators of one run, and the loop over them. Every rank runs it."""

    config: RunConfig
    num_steps: int
    num_done: int
    """Steps that earlier starts of the run have done."""
    examples: Sequence[Example]
    actor: Actor
    folder: RunFolder
    metrics: MetricsLog
    console: Console
    clock: Clock
    edge: StepEdge
    skipped: SkippedUpdates = field(default_factory=SkippedUpdates)

    def fit(self) -> None:
        """Train for the batches that are left. Raises Stopped when told to, and saved."""
        cfg, done = self.config, self.num_done
        bar = self.console.steps("sft", self.num_steps, every=cfg.logging.every, done=done)
        with self.edge.listening(), bar as progress:
            self.edge.stop_before(done)
            for step in range(done + 1, self.num_steps + 1):
                lr = learning_rate(cfg.train, step=step, total_steps=self.num_steps)
                batch = self.batch(step)
                with self.clock("train"):
                    updates = self.train_on(batch, step, lr)
                seconds, lengths = self.clock.flush(), [e.num_tokens for e in batch]
                record = {
                    "loss/tau_train": cfg.algorithm.tau_train,
                    "optim/lr": lr,
                    **update_metrics(updates),
                    **seconds,
                    **performance_metrics(self.actor, lengths=lengths, seconds=seconds),
                }
                self.metrics.write(step, record)
                progress.finished(step, shown(record, "loss/nll", "optim/lr"))
                self.edge.passed(step, sound=not self.skipped.any)
            self.edge.finish()

    def batch(self, step: int) -> list[Example]:
        """The examples of step `step` (from 1)."""
        rows = batch_rows(
            len(self.examples),
            self.config.train.prompts_per_step,
            seed=self.config.seed,
            step=step - 1,
            shuffle=self.config.data.shuffle,
        )
        return [self.examples[row] for row in rows]

    def train_on(self, batch: Sequence[Example], step: int, lr: float) -> list[UpdateResult]:
        """The optimizer updates of one batch."""
        size = self.config.train.prompts_per_update
        # Nothing is sampled here, so there is no tau_sample; its statistics go unused.
        tau = self.config.algorithm.tau_train
        updates: list[UpdateResult] = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            updates.append(self.actor.update(part, tau_sample=tau, lr=lr))
            self.skipped.note(
                updates[-1],
                example_rows(part),
                step=step,
                number=len(updates),
                actor=self.actor,
                folder=self.folder,
                console=self.console,
            )
        return updates
