"""Online SFT: generate, train, sync, evaluate, save, log."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from osft_mcore.actor.actor import Actor
from osft_mcore.actor.result import UpdateResult
from osft_mcore.config.evaluation import due, start_temperatures
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.order import batch_rows, steps_per_epoch
from osft_mcore.errors import DataError
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.records import Example, Prompt, Response, Sampling
from osft_mcore.rollout.engine import RolloutEngine, reported_temperature
from osft_mcore.train.edge import StepEdge
from osft_mcore.train.gate import check_agreement, check_logprobs, check_versions
from osft_mcore.train.performance import performance_metrics
from osft_mcore.train.schedules import learning_rate, sampling_temperature, train_temperature
from osft_mcore.train.scores import Scores
from osft_mcore.train.skipped import SkippedUpdates, answer_rows
from osft_mcore.train.step_metrics import (
    push_metrics,
    response_metrics,
    rollout_rows,
    shown,
    update_metrics,
)
from osft_mcore.weights.sync import PushReport, WeightSync


@dataclass(frozen=True, slots=True, kw_only=True)
class OsftLoop:
    """The collaborators of one run, and the loop over them. Every rank runs it."""

    config: RunConfig
    num_steps: int
    num_done: int
    """Steps that earlier starts of the run have done."""
    prompts: Sequence[Prompt]
    actor: Actor
    engine: RolloutEngine
    sync: WeightSync
    scores: Scores
    folder: RunFolder
    metrics: MetricsLog
    console: Console
    clock: Clock
    edge: StepEdge
    decode: Callable[[Sequence[int]], str]
    skipped: SkippedUpdates = field(default_factory=SkippedUpdates)

    def fit(self) -> None:
        """Train for the rollout batches that are left. Raises Stopped when told to, and saved."""
        cfg, done = self.config, self.num_done
        bar = self.console.steps("osft", self.num_steps, every=cfg.logging.every, done=done)
        self.edge.stop_before(done)
        with bar as progress:
            for step in range(done + 1, self.num_steps + 1):
                self.scores.drain()
                tau = self.tau_sample(step)
                with self.clock("rollout"):
                    responses = self.engine.generate(self.batch(step), self.sampling(step, tau))
                self.sync.close()
                with self.clock("train"):
                    updates = self.train_on(responses, step, tau)
                push = self.push()
                if due(cfg.evaluation.every, step) and step < self.num_steps:
                    self.ask_scores(step)
                progress.finished(step, self.log_step(step, tau, responses, updates, push))
                self.edge.passed(step, sound=not self.skipped.any, weight_version=self.sync.version)
            self.edge.finish()

    def push(self) -> PushReport:
        """Hand the actor's weights to the engine, which samples while the actor rests."""
        with self.clock("sync"):
            report = self.sync.push()
            self.actor.rest()
        return report

    def tau_sample(self, step: int) -> float:
        """Sampling temperature of step `step` (from 1)."""
        return sampling_temperature(
            self.config.rollout.tau_sample,
            self.config.rollout.annealing,
            step=step,
            steps_per_epoch=steps_per_epoch(len(self.prompts), self.config.train.prompts_per_step),
        )

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of step `step` (from 1)."""
        cfg = self.config
        rows = batch_rows(
            len(self.prompts),
            cfg.train.prompts_per_step,
            seed=cfg.seed,
            step=step - 1,
            shuffle=cfg.data.shuffle,
        )
        return [self.prompts[row] for row in rows]

    def sampling(self, step: int, tau: float) -> Sampling:
        """How the training answers of step `step` are drawn."""
        rollout = self.config.rollout
        return Sampling(
            temperature=tau,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            num_samples=rollout.num_samples,
            max_tokens=rollout.max_response_tokens,
            seed=self.config.seed,
            step=step,
        )

    def train_on(self, responses: Sequence[Response], step: int, tau: float) -> list[UpdateResult]:
        """The optimizer updates of one rollout batch, gated on agreement with the engine.

        The gate uses the first update that was not skipped: after it the actor has moved.
        """
        cfg = self.config
        check_versions(responses, version=self.sync.version, step=step)
        check_logprobs(responses, step=step)
        lr = learning_rate(cfg.train, step=step, total_steps=self.num_steps)
        examples = [_example(r, cfg.algorithm.train_on_truncated) for r in responses]
        gate_tau = reported_temperature(tau, top_p=cfg.rollout.top_p, top_k=cfg.rollout.top_k)
        size = cfg.train.prompts_per_update * cfg.rollout.num_samples
        updates: list[UpdateResult] = []
        for start in range(0, len(examples), size):
            if not any(example.trained for example in examples[start : start + size]):
                raise DataError(
                    f"step {step}: every answer of an update was cut off at "
                    f"rollout.max_response_tokens = {cfg.rollout.max_response_tokens} and "
                    "algorithm.train_on_truncated is false, so there is nothing to train on; "
                    "change one of the two"
                )
            update = self.actor.update(
                examples[start : start + size],
                tau_train=train_temperature(cfg.algorithm, tau),
                tau_sample=gate_tau,
                lr=lr,
            )
            self.skipped.note(
                update,
                answer_rows(responses[start : start + size], tokens=cfg.logging.rollouts),
                step=step,
                number=len(updates) + 1,
                actor=self.actor,
                folder=self.folder,
                console=self.console,
            )
            if not update.skipped and all(earlier.skipped for earlier in updates):
                check_agreement(
                    update.agreement,
                    sync=cfg.sync,
                    dtype=cfg.model.dtype,
                    step=step,
                    tau_sample=gate_tau,
                )
            updates.append(update)
        return updates

    def ask_scores(self, step: int, exported: Path | None = None) -> None:
        """Have the weights of `step` scored, now or later; `exported` has them, if it is given."""
        # Whoever asked for the actor's weights since the push, as an export does, has them.
        self.actor.rest()
        self.scores.ask(step, self.config.evaluation.temperature, exported=exported)

    def ask_scores_of_start(self) -> None:
        """Have the starting model scored, at all its temperatures. Raises Stopped when told to."""
        for tau in start_temperatures(self.config.evaluation):
            # What is scored so far is left behind: the run begins with an evaluation of its own.
            self.edge.stop_if_told(0)
            self.scores.ask(0, tau)

    def log_step(
        self,
        step: int,
        tau: float,
        responses: Sequence[Response],
        updates: Sequence[UpdateResult],
        push: PushReport,
    ) -> dict[str, float]:
        """Write the step's metrics and answers; returns the few that the console shows."""
        cfg = self.config
        seconds = self.clock.flush()
        record = {
            "rollout/tau_sample": tau,
            "loss/tau_train": train_temperature(cfg.algorithm, tau),
            "optim/lr": learning_rate(cfg.train, step=step, total_steps=self.num_steps),
            **response_metrics(responses),
            **update_metrics(updates),
            **push_metrics(push),
            **seconds,
            **performance_metrics(
                self.actor,
                lengths=[len(r.prompt.token_ids) + len(r.token_ids) for r in responses],
                num_sampled=sum(len(r.token_ids) for r in responses),
                seconds=seconds,
            ),
        }
        self.metrics.write(step, record)
        if cfg.logging.rollouts and self.folder.writer:
            self.folder.write_lines(
                f"rollouts/step_{step}.jsonl", rollout_rows(responses, self.decode)
            )
        return shown(record, "loss/nll", "rollout/response_length_mean", "sync/logprob_diff_max")


def _example(response: Response, train_on_truncated: bool) -> Example:
    return Example(
        prompt_token_ids=response.prompt.token_ids,
        response_token_ids=response.token_ids,
        rollout_logprobs=response.token_logprobs,
        replica=response.replica,
        trained=train_on_truncated or not response.truncated,
    )
