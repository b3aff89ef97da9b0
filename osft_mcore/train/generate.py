"""Answers of one model to all training prompts, once: what offline OSFT is trained on."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from osft_mcore.config.schema import RunConfig
from osft_mcore.data.parquet import data_sha256
from osft_mcore.data.solutions import Solution, read_solutions, solution_lines
from osft_mcore.errors import Stopped
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import BATCHES
from osft_mcore.parallel.groups import ParallelContext, all_gather_json, wait_for_all
from osft_mcore.parallel.stop import StopSignals, agreed_stop, deadline
from osft_mcore.records import Prompt, Sampling
from osft_mcore.train.earlier import (
    SOLUTIONS,
    batches_of,
    check_earlier,
    check_pass_left,
    sweep_batches,
)
from osft_mcore.train.identity import start_fingerprint
from osft_mcore.train.inputs import load_chat_tokenizer, load_train_prompts
from osft_mcore.train.resume import SUMMARY
from osft_mcore.train.sampler import BuildEngine, Sampler, open_sampler, say_start
from osft_mcore.train.step_metrics import response_metrics, shown
from osft_mcore.train.summary import seconds_of


def run_generate(
    config: RunConfig, context: ParallelContext, console: Console, build_engine: BuildEngine
) -> None:
    """Sample answers to data.train and leave solutions.jsonl behind. Every rank must call.

    Goes on after the last whole batch. Raises Stopped when it was told to stop.
    """
    tokenizer = load_chat_tokenizer(config)
    data = load_train_prompts(config, tokenizer)
    batches = batches_of(config, data.prompts)
    say_start(console, config, context)
    console.say(
        f"data: {len(data.prompts)} prompts ({data.num_dropped_overlong} over "
        f"{config.rollout.max_prompt_tokens} tokens dropped), {len(batches)} batches"
    )
    rollout = config.rollout
    console.say(f"tau_sample {rollout.tau_sample:g}, {rollout.num_samples} answers a prompt")
    goes_on = check_earlier(config)
    check_pass_left(config, len(batches))
    with open_sampler(
        config, "generate", context, console, build_engine, tokenizer, keep=goes_on
    ) as sampler:
        generation = Generation(
            config=config,
            batches=batches,
            context=context,
            sampler=sampler,
            console=console,
            decode=tokenizer.decode,
        )
        generation.run()
        generation.finish()
        # No rank ends before that, which may take long: their launcher would not wait so long.
        wait_for_all(context)


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """The collaborators of one run, and the loop over its batches. Every rank runs it."""

    config: RunConfig
    batches: Sequence[Sequence[Prompt]]
    context: ParallelContext
    sampler: Sampler
    console: Console
    decode: Callable[[Sequence[int]], str]

    def run(self) -> None:
        """Sample the batches that are left. Raises Stopped between two of them, when told to."""
        total, done = len(self.batches), self._num_done()
        self._forget_after(done)
        if done:
            self.console.say(f"going on: {done} of {total} batches are done")
        limit, longest_s = deadline(self.config.checkpoint.stop_after), 0.0
        every = self.config.logging.every
        bar = self.console.steps("generate", total, every=every, done=done)
        told = StopSignals(self.context.rank, self.sampler.folder.path)
        with told as signals, bar as progress:
            signals.promise = "finishing this batch, then stopping"
            for number in range(done + 1, total + 1):
                lacks_time = limit.near(time.time(), longest_step_s=longest_s, longest_save_s=0.0)
                if reason := agreed_stop(signals.received or lacks_time, self.context):
                    raise Stopped(
                        f"{reason}; stopped after batch {number - 1} of {total}; the same command "
                        "goes on from there"
                    )
                began = time.monotonic()
                progress.finished(number, self._sample(number))
                longest_s = max(longest_s, time.monotonic() - began)

    def sampling(self, number: int) -> Sampling:
        """As step `number` (from 1) of `osft train` samples."""
        rollout = self.config.rollout
        return Sampling(
            temperature=rollout.tau_sample,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            num_samples=rollout.num_samples,
            logprobs=False,
            max_tokens=rollout.max_response_tokens,
            seed=self.config.seed,
            step=number,
        )

    def finish(self) -> None:
        """Put the batches together. The summary comes last: it says that all is there."""
        folder = self.sampler.folder
        if folder.writer:
            folder.join(SOLUTIONS, [_file(n + 1) for n in range(len(self.batches))])
            solutions = read_solutions(folder.path / SOLUTIONS, option="output_dir")
            summary = self._summary(solutions)
            folder.write_json(SUMMARY, summary)
            sweep_batches(folder.path)
            self.console.say(
                f"{summary['answers']} answers to {summary['prompts']} prompts, "
                f"{summary['response_tokens']} tokens; cut off: {summary['cut_off_ratio']:.1%}, "
                f"empty: {summary['empty']}"
            )
            self.console.say(f"written: {folder.path / SOLUTIONS}")

    def _num_done(self) -> int:
        """Batches that are whole, from the first on; rank 0 looks. Collective."""
        folder, done = self.sampler.folder.path, 0
        if self.context.rank == 0:
            while done < len(self.batches) and (folder / _file(done + 1)).is_file():
                done += 1
        return int(all_gather_json(done, self.context)[0])

    def _forget_after(self, done: int) -> None:
        """Metrics of a batch that is not there go; seconds of those that are count."""
        folder, totals = self.sampler.folder, self.sampler.clock.totals
        for lost in folder.keep_until(done, last=False):
            self.console.say(f"left out a line that cannot be read: {lost}")
        if folder.writer:
            for row in folder.read_lines("metrics.jsonl"):
                totals["rollout"] = totals.get("rollout", 0.0) + row["time/rollout_s"]

    def _sample(self, number: int) -> dict[str, float]:
        clock, folder, tau = self.sampler.clock, self.sampler.folder, self.config.rollout.tau_sample
        with clock("rollout"):
            responses = self.sampler.engine.generate(
                self.batches[number - 1], self.sampling(number)
            )
        record = {"rollout/tau_sample": tau, **response_metrics(responses), **clock.flush()}
        # Before the batch: if only this is there, the next start forgets it.
        self.sampler.metrics.write(number, record)
        if folder.writer:
            # In one step: a file that is there is whole.
            text = solution_lines(responses, self.decode, tau_sample=tau)
            folder.write_text(_file(number), text)
        return shown(record, "rollout/response_length_mean", "rollout/cut_off_ratio")

    def _summary(self, solutions: Sequence[Solution]) -> dict[str, Any]:
        cfg, topology = self.config, self.context.topology
        lengths = [len(solution.response_token_ids) for solution in solutions]
        return {
            "batches": len(self.batches),
            "prompts": len({solution.row for solution in solutions}),
            "answers": len(solutions),
            "response_tokens": sum(lengths),
            "response_length_mean": sum(lengths) / len(lengths),
            "cut_off_ratio": sum(solution.truncated for solution in solutions) / len(solutions),
            "empty": sum(solution.empty for solution in solutions),
            "tau_sample": cfg.rollout.tau_sample,
            "top_p": cfg.rollout.top_p,
            "top_k": cfg.rollout.top_k,
            "seed": cfg.seed,
            "model": {"path": cfg.model.path, "weights": start_fingerprint(cfg)},
            "solutions_sha256": data_sha256(self.sampler.folder.path / SOLUTIONS),
            "rollout_layout": {"tp": topology.rollout_tp, "replicas": topology.num_replicas},
            "seconds": seconds_of(self.sampler.clock),
        }


def _file(number: int) -> str:
    return f"{BATCHES}/batch_{number}.jsonl"
