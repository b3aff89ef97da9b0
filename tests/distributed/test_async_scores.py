"""What ranks leave for the evaluator and take from it; the test answers in its place."""

import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from torch_engine import TorchEngine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.actor.actor import Actor
from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer, load_tokenizer
from osft_mcore.errors import ConfigError
from osft_mcore.evaluation.results import Answer
from osft_mcore.log.console import Console
from osft_mcore.log.metrics import Clock, MetricsLog
from osft_mcore.log.run_folder import ASKED, RunFolder
from osft_mcore.parallel.groups import ParallelContext, all_gather_json, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.rollout.engine import RolloutEngine
from osft_mcore.train.evaluator_process import LEAVES_S, EvaluatorProcess
from osft_mcore.train.follow import run_follow
from osft_mcore.train.inputs import load_held_out
from osft_mcore.train.scores import AsyncScores, _go_on, open_scores
from osft_mcore.train.scoring import Scoring, open_scoring
from osft_mcore.train.snapshots import (
    READY,
    At,
    Entry,
    announce_end,
    entry_folder,
    fail_damaged,
    is_waiting,
    publish,
    snapshots_folder,
    waiting,
    withdraw,
)
from osft_mcore.train.start import build_actor

TP2 = Topology(tp=2, pp=1, dp=1, rollout_tp=2)
SLEEPS = (sys.executable, "-c", "import time; time.sleep(600)")
FULL = "as many weights wait already as evaluation.max_waiting = 1 allows"
ENDED = "the evaluator had ended"
Json = dict[str, Any]


def answer(scoring: Scoring, step: int, temperature: float) -> None:
    """What the evaluator would leave behind, if every answer were right."""
    answers = [
        Answer(
            data_source=source, prompt_id=prompt.prompt_id, sample_index=sample, text="",
            ground_truth=prompt.ground_truth, prediction="", num_tokens=1, truncated=False,
            score=1.0, correct=True, status="ok",
        )
        for source, prompts in scoring.held_out.by_source.items()
        for prompt in prompts
        for sample in range(4)
    ]  # fmt: skip
    scoring.keep(step, temperature, answers)


def opened(config: RunConfig, scoring: Scoring, actor: Actor, queue: Path) -> AsyncScores:
    return AsyncScores(
        config=config, num_steps=9, scoring=scoring, actor=actor, queue=queue,
        console=Console(enabled=False), evaluator=None, pending=[], unscored={}, num_asked=0,
    )  # fmt: skip


def life(rank: int, start: Start, out: Path) -> Json:
    context = join_groups(TP2, device=torch.device("cpu"))
    config = toy_config(start, out, TP2)
    evaluation = replace(config.evaluation, mode="async", max_waiting=1, wait_minutes=0.0)
    config = replace(config, evaluation=evaluation)
    folder = RunFolder(out, writer=rank == 0)
    folder.create()
    with ExitStack() as stack:
        scoring = stack.enter_context(scoring_without_engine(config, context, folder))
        assert scoring is not None
        scores = opened(config, scoring, build_actor(config, context), out / "snapshots")
        return lived(scores, rank, context)


def scoring_without_engine(config: RunConfig, context: ParallelContext, folder: RunFolder) -> Any:
    tokenizer = load_tokenizer(config.model.path, None)
    engine: RolloutEngine = None  # type: ignore[assignment]
    return open_scoring(
        config, context, engine, load_held_out(config, tokenizer), tokenizer, folder=folder,
        metrics=MetricsLog(folder, config.logging, {}), console=Console(enabled=False),
        clock=Clock(),
    )  # fmt: skip


def lived(scores: AsyncScores, rank: int, context: ParallelContext) -> Json:
    """The same calls on both ranks; the first one also plays the evaluator, and sees to its end."""
    told: Json = {}
    if rank == 0:
        scores.evaluator = EvaluatorProcess(scores.config, SLEEPS)
    for step in (0, 2, 4):
        scores.ask(step, 1.0)
    if rank == 0:
        told["waiting"] = [(entry.step, bool(entry.weights)) for entry in waiting(scores.queue)]
        snapshot = waiting(scores.queue)[1].weights
        told["snapshot"] = load_file(Path(snapshot) / "model.safetensors")
        answer(scores.scoring, 0, 1.0)
        withdraw(scores.queue, (0, 1.0))
    scores.drain()
    if rank == 0:
        told["gone on"] = gone_on(scores)
        told["refused"] = refused(scores)
        told["damaged"] = damaged(scores)
        told["end unheard"] = end_unheard(scores)
        # Nothing can be written there any more.
        scores.queue.rename(scores.queue.with_name("moved"))
        scores.queue.write_text("")
    scores.ask(6, 1.0)
    if rank == 0:
        scores.queue.unlink()
        scores.queue.with_name("moved").rename(scores.queue)
        assert scores.evaluator is not None
        os.kill(scores.evaluator.pid, signal.SIGKILL)
        while not scores.evaluator.ended():
            time.sleep(0.01)
    scores.drain()
    scores.ask(8, 1.0)
    scores.finish(lambda: "")
    # Both are here: neither has waited for the other in vain.
    told["waited"] = "wait" in scores.scoring.clock.totals
    told["ranks"] = all_gather_json(rank, context)
    told["unscored"] = {step: reason for (step, _), reason in scores.unscored.items()}
    told["left"] = scores.queue.exists()
    return told


def gone_on(scores: AsyncScores) -> Json:
    """What a start after this one would take up, if this one ended here after step 4."""
    found = {}
    for what in ("kept", "lost"):
        queue = scores.queue.with_name(what)
        again = opened(scores.config, scores.scoring, scores.actor, queue)
        for entry in waiting(scores.queue):
            again.publish(entry.at, entry_folder(queue, entry.at))
        again.pending.clear()
        if what == "lost":
            withdraw(queue, (2, 1.0))
        _go_on(again, 4)
        found[what] = (again.pending, again.unscored, is_waiting(queue, (2, 1.0)))
    return found


def damaged(scores: AsyncScores) -> list[At]:
    """What becomes of an entry that the evaluator cannot read, and of the one after it."""
    again = opened(scores.config, scores.scoring, scores.actor, scores.queue.with_name("damaged"))
    for step in (1, 3):
        again.publish((step, 1.0), None)
    (entry_folder(again.queue, (1, 1.0)) / READY).write_text("{")
    again.drain()
    assert [step for step, _ in again.pending] == [1, 3], "the evaluator has not seen it"
    [line] = fail_damaged(again.queue)
    again.drain()
    assert again.unscored == {(1, 1.0): line}
    return again.pending


def end_unheard(scores: AsyncScores) -> float:
    """Seconds until an evaluator has ended that cannot be told to."""
    again = opened(scores.config, scores.scoring, scores.actor, scores.queue.with_name("file"))
    again.queue.write_text("")
    again.evaluator = EvaluatorProcess(scores.config, SLEEPS)
    began = time.monotonic()
    again.finish(lambda: "")
    assert again.evaluator.ended()
    return time.monotonic() - began


def refused(scores: AsyncScores) -> list[str]:
    """What starts say that find something else than a folder of snapshots."""
    queue, said = scores.queue.with_name("not_a_folder"), []
    queue.write_text("")
    inline = replace(scores.config, evaluation=replace(scores.config.evaluation, mode="inline"))
    inline = replace(inline, output_dir=str(queue.with_name("other")))
    snapshots_folder(inline).parent.mkdir()
    snapshots_folder(inline).write_text("")
    again = opened(scores.config, scores.scoring, scores.actor, queue)
    for start in (
        lambda: _go_on(again, 4),
        lambda: open_scores(inline, None, scores.actor, scores.console, None, 9).__enter__(),
    ):
        with pytest.raises(ConfigError) as caught:
            start()
        said += caught.value.problems
    return said


def test_both_ranks_go_on_whatever_becomes_of_the_evaluator(tmp_path: Path) -> None:
    start, out = write_start(tmp_path), tmp_path / "run"
    first, second = run_ranks(life, 2, start=start, out=out)
    assert first["ranks"] == second["ranks"] == [0, 1]
    assert first["waited"]
    assert second["waited"], "every rank passes the same phases"
    assert first["waiting"] == [(0, False), (2, True)], "step 4 had no room"
    weights = load_file(start[1] / "model.safetensors")
    assert set(weights) == set(first["snapshot"])
    assert all(torch.equal(weights[name], tensor) for name, tensor in first["snapshot"].items())
    reasons = first["unscored"]
    assert "could not be written to" in reasons.pop(6)
    assert reasons == {2: ENDED, 4: FULL, 8: ENDED}
    assert second["unscored"] == {}
    assert first["left"] is False
    assert first["damaged"] == [(3, 1.0)]
    assert first["end unheard"] < LEAVES_S
    for queue, said in zip(("not_a_folder", "other/snapshots"), first["refused"], strict=True):
        assert said.startswith(f"evaluation.snapshots: {out / queue}, which an earlier start")
        assert "cannot be cleared and written again: Not a directory; remove it" in said
    [row] = read_lines(out / "evaluations.jsonl")
    assert (row["step"], row["eval/temperature"], row["eval/pass_at_1"]) == (0, 1.0, 1.0)
    asked = [(row["step"], row["refusal"][:8]) for row in read_lines(out / ASKED)]
    assert asked == [(0, ""), (2, ""), (4, FULL[:8]), (6, "its weig"), (8, ENDED[:8])]


def test_a_later_start_takes_up_what_waits_and_remembers_what_was_left_out(
    tmp_path: Path,
) -> None:
    first, _ = run_ranks(life, 2, start=write_start(tmp_path), out=tmp_path / "run")
    assert first["gone on"] == {
        "kept": ([(2, 1.0)], {(4, 1.0): FULL}, True),
        "lost": (
            [],
            {
                (2, 1.0): "its weights did not outlive an earlier start of the run",
                (4, 1.0): FULL,
            },
            False,
        ),
    }


def stays(_rank: int, start: Start, out: Path) -> set[tuple[str, str]]:
    """Phase and option of the limit while the evaluator's engine samples."""
    topology, found = Topology(tp=1, pp=1, dp=1), set[tuple[str, str]]()
    config = toy_config(start, out, topology)
    queue = snapshots_folder(config)
    for number, temperature in enumerate((0.0, 1.0)):
        publish(queue, Entry(step=0, temperature=temperature, number=number, weights=""))
    announce_end(queue)

    class Seen(TorchEngine):
        def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
            stay = self.context.watch._stay
            found.add((stay.place.phase, stay.limit.option))
            return super().generate(prompts, sampling)

    def build(config: RunConfig, context: ParallelContext, tokenizer: ChatTokenizer) -> Seen:
        stop = sorted(tokenizer.eos_token_ids)
        return Seen(config.model.path, stop_token_ids=stop, context=context)

    context = join_groups(topology, device=torch.device("cpu"))
    run_follow(config, context, Console(enabled=False), build)
    assert not waiting(queue)
    return found


def test_an_evaluator_scores_under_the_deadline_of_evaluations(tmp_path: Path) -> None:
    """Not under that of its start, which is shorter."""
    [found] = run_ranks(stays, 1, start=write_start(tmp_path), out=tmp_path / "run")
    assert found == {("evaluate", "deadlines.evaluate")}
