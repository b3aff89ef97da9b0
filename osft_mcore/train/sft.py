"""Supervised fine-tuning on given answers, with the same actor: the phase before OSFT."""

from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from osft_mcore.actor.actor import Actor, UpdateResult
from osft_mcore.actor.export import export_hf
from osft_mcore.config.load import as_options
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.order import batch_rows
from osft_mcore.data.tokenizer import load_tokenizer
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.records import Example
from osft_mcore.train.inputs import load_sft_examples, total_steps
from osft_mcore.train.loop import due
from osft_mcore.train.schedules import learning_rate
from osft_mcore.train.start import build_actor, open_folder, say_start
from osft_mcore.train.step_metrics import update_metrics


def run_sft(config: RunConfig, context: ParallelContext, console: Console) -> None:
    """Train on (prompt, response) pairs; leaves the run folder behind. Every rank must call."""
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    data = load_sft_examples(config, tokenizer)
    num_steps = total_steps(config, len(data.examples))
    say_start(console, config, read_model_shape(config.model.path), num_steps=num_steps)
    console.say(f"data: {len(data.examples)} examples ({data.num_dropped_overlong} dropped)")
    clock = Clock()
    with clock("start"):
        actor = build_actor(config, context)
    # Only now: a model that cannot be built leaves no folder behind.
    folder = open_folder(config, context, [config.data.train])
    options = as_options(config)
    with closing(MetricsLog(folder, config.logging, options)) as metrics:
        loop = SftLoop(
            config=config,
            num_steps=num_steps,
            examples=data.examples,
            actor=actor,
            folder=folder,
            metrics=metrics,
            console=console,
            clock=clock,
        )
        clock.flush()
        nll = loop.fit()
    if config.checkpoint.final:
        loop.save("hf")
    seconds = {phase: round(total, 2) for phase, total in clock.totals.items()}
    folder.write_json("summary.json", {"steps": num_steps, "nll": nll, "seconds": seconds})


@dataclass(frozen=True, slots=True, kw_only=True)
class SftLoop:
    """The collaborators of one run, and the loop over them. Every rank runs it."""

    config: RunConfig
    num_steps: int
    examples: Sequence[Example]
    actor: Actor
    folder: RunFolder
    metrics: MetricsLog
    console: Console
    clock: Clock

    def fit(self) -> float:
        """Train for `num_steps` batches; returns the last one's negative log-likelihood."""
        cfg = self.config
        with self.console.steps("sft", self.num_steps, every=cfg.logging.every) as progress:
            for step in range(1, self.num_steps + 1):
                lr = learning_rate(cfg.train, step=step, total_steps=self.num_steps)
                with self.clock("train"):
                    updates = self.train_on(self.batch(step), lr)
                if due(cfg.checkpoint.every, step):
                    self.save(f"checkpoints/step_{step}")
                record = {"optim/lr": lr, **update_metrics(updates), **self.clock.flush()}
                self.metrics.write(step, record)
                progress.finished(step, {"nll": record["loss/nll"], "lr": lr})
        return record["loss/nll"]

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

    def train_on(self, batch: Sequence[Example], lr: float) -> list[UpdateResult]:
        """The optimizer updates of one batch."""
        size = self.config.train.prompts_per_update
        # Nothing is sampled here, so there is no tau_sample; its statistics go unused.
        tau = self.config.algorithm.tau_train
        return [
            self.actor.update(batch[start : start + size], tau_sample=tau, lr=lr)
            for start in range(0, len(batch), size)
        ]

    def save(self, name: str) -> None:
        """Export the weights as a Hugging Face folder inside the run folder."""
        with self.clock("save"):
            export_hf(
                self.actor,
                self.folder.path / name,
                max_shard_bytes=self.config.checkpoint.max_shard_bytes,
                bucket_bytes=self.config.sync.bucket_bytes,
            )
