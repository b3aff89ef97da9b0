"""Supervised fine-tuning on given answers, with the same actor: the phase before OSFT."""

from collections.abc import Sequence
from contextlib import closing

from osft_mcore.actor.actor import Actor, UpdateResult
from osft_mcore.actor.export import export_hf
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
from osft_mcore.train.start import open_folder, say_start
from osft_mcore.train.step_metrics import update_metrics


def run_sft(config: RunConfig, context: ParallelContext, console: Console) -> None:
    """Train on (prompt, response) pairs; leaves the run folder behind. Every rank must call."""
    shape = read_model_shape(config.model.path)
    tokenizer = load_tokenizer(config.model.path, config.data.chat_template)
    data = load_sft_examples(config, tokenizer)
    num_steps = total_steps(config, len(data.examples))
    folder = open_folder(config, context, [config.data.train])
    say_start(console, config, shape, num_steps=num_steps)
    console.say(f"data: {len(data.examples)} examples ({data.num_dropped_overlong} dropped)")
    clock = Clock()
    with clock("start"):
        actor = Actor(shape, config, context)
    with closing(MetricsLog(folder, config.logging)) as metrics:
        clock.flush()
        nll = _fit(actor, data.examples, num_steps, folder, metrics, console, clock)
    if config.checkpoint.final:
        _save(actor, folder, "hf", clock)
    folder.write_json("summary.json", {"steps": num_steps, "nll": nll, "seconds": clock.totals})


def _fit(
    actor: Actor,
    examples: Sequence[Example],
    num_steps: int,
    folder: RunFolder,
    metrics: MetricsLog,
    console: Console,
    clock: Clock,
) -> float:
    """Train for `num_steps` batches; returns the last batch's negative log-likelihood."""
    cfg = actor.config
    with console.steps("sft", num_steps, every=cfg.logging.every) as progress:
        for step in range(1, num_steps + 1):
            lr = learning_rate(cfg.train, step=step, total_steps=num_steps)
            with clock("train"):
                updates = _train_on(actor, _batch(cfg, examples, step), lr)
            if due(cfg.checkpoint.every, step):
                _save(actor, folder, f"checkpoints/step_{step}", clock)
            record = {"optim/lr": lr, **update_metrics(updates), **clock.flush()}
            metrics.write(step, record)
            progress.finished(step, {"nll": record["loss/nll"], "lr": lr})
    return record["loss/nll"]


def _train_on(actor: Actor, batch: Sequence[Example], lr: float) -> list[UpdateResult]:
    size = actor.config.train.prompts_per_update
    # Nothing is sampled here, so there is no tau_sample; its statistics go unused.
    tau = actor.config.algorithm.tau_train
    return [
        actor.update(batch[start : start + size], tau_sample=tau, lr=lr)
        for start in range(0, len(batch), size)
    ]


def _batch(config: RunConfig, examples: Sequence[Example], step: int) -> list[Example]:
    size, shuffle = config.train.prompts_per_step, config.data.shuffle
    rows = batch_rows(len(examples), size, seed=config.seed, step=step - 1, shuffle=shuffle)
    return [examples[row] for row in rows]


def _save(actor: Actor, folder: RunFolder, name: str, clock: Clock) -> None:
    with clock("save"):
        export_hf(
            actor,
            folder.path / name,
            max_shard_bytes=int(actor.config.checkpoint.max_shard_gib * 2**30),
            bucket_bytes=actor.config.sync.bucket_mib * 2**20,
        )
