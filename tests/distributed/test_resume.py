"""A run that is killed and started again is the run that was left alone, bit for bit.

Everything is real but the sampler (`TorchEngine` for vLLM): data, actor, bridge, gate, grader.
"""

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RanksFailed, run_ranks
from safetensors.torch import load_file
from torch_engine import TorchEngine, build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.checkpoint.folder import checkpoints_in
from osft_mcore.config.schema import CheckpointConfig, RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.errors import CheckpointError, ConfigError, OsftError
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Prompt, Response, Sampling
from osft_mcore.train.osft import run_osft
from osft_mcore.train.resume import candidates, check_work_left, problems_by_size, resume_point

NUM_STEPS = 12
"""Three epochs of four steps."""
TP2 = Topology(tp=2, pp=1, dp=1, rollout_tp=2)
PP2 = Topology(tp=1, pp=2, dp=1, rollout_tp=1)
CP2 = Topology(tp=1, pp=1, dp=1, cp=2)
TP1 = Topology(tp=1, pp=1, dp=1)
OF_THE_LAYOUT = ("sync/bytes", "sync/peak", "train/padding_share")


def resume_config(start: Start, out: Path, topology: Topology, **options: Any) -> RunConfig:
    config = toy_config(start, out, topology)
    return replace(
        config,
        train=replace(config.train, steps=None, epochs=3, prompts_per_step=4, prompts_per_update=2),
        evaluation=replace(config.evaluation, every=5, num_samples=2),
        checkpoint=CheckpointConfig(**{"every": 1, "async_": False, "keep_last": 3, **options}),
    )


class DyingEngine(TorchEngine):
    """Ends its process, as the machine might, when it is asked for training answers of a step."""

    dies_at: int

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Response]:
        if sampling.step == self.dies_at and sampling.logprobs:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().generate(prompts, sampling)


def program(
    rank: int, config: RunConfig, topology: Topology, dies_at: int = 0, says: bool = False
) -> str:
    """The run; returns what it said when it ended early."""
    context = join_groups(topology, device=torch.device("cpu"))

    def build(config: RunConfig, context: ParallelContext, tokenizer: ChatTokenizer) -> TorchEngine:
        engine = build_torch_engine(config, context, tokenizer)
        if dies_at:
            engine.__class__ = DyingEngine
            engine.dies_at = dies_at
        return engine

    try:
        run_osft(config, context, Console(enabled=says and rank == 0), build)
    except OsftError as error:
        return f"{error.exit_code} {error}"
    return ""


def finish(config: RunConfig, topology: Topology) -> None:
    assert set(run_ranks(program, topology.world_size, config=config, topology=topology)) == {""}


def dies(config: RunConfig, topology: Topology, step: int) -> None:
    with pytest.raises(RanksFailed, match="died with status 9"):
        run_ranks(program, topology.world_size, config=config, topology=topology, dies_at=step)


def figures(run: Path, *left_out: str) -> list[dict[str, Any]]:
    """Every logged figure but times."""
    rows = [*read_lines(run / "metrics.jsonl"), *read_lines(run / "evaluations.jsonl")]
    skipped = ("time/", "perf/", *left_out)
    return [{k: v for k, v in row.items() if not k.startswith(skipped)} for row in rows]


def answers(run: Path) -> dict[str, list[dict[str, Any]]]:
    """Every sampled token of training and evaluation, with its text."""
    files = [*(run / "rollouts").iterdir(), *(run / "evaluations").glob("*.jsonl")]
    return {f"{path.parent.name}/{path.name}": read_lines(path) for path in files}


def tokens(run: Path) -> dict[str, list[list[int]]]:
    """The sampled tokens alone: which replica sampled them is the layout's own."""
    return {
        path.name: [row["response_token_ids"] for row in read_lines(path)]
        for path in (run / "rollouts").iterdir()
    }


def assert_same_run(run: Path, other: Path, *left_out: str) -> None:
    assert figures(run, *left_out) == figures(other, *left_out)
    assert answers(run) == answers(other)
    files = [Path("hf/model.safetensors")]
    newest = checkpoints_in(other / "checkpoints")[0]
    assert newest.name == f"step_{NUM_STEPS}"
    files += [path.relative_to(other) for path in newest.glob("*.safetensors")]
    assert len(files) > 1
    for file in files:
        ours, theirs = load_file(run / file), load_file(other / file)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), f"{file}: {name}"


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="module")
def undisturbed(start: Start, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    runs = {}
    for name, topology in (("tp2", TP2), ("pp2", PP2)):
        runs[name] = tmp_path_factory.mktemp(name) / "run"
        finish(resume_config(start, runs[name], topology), topology)
    return runs


@pytest.mark.parametrize(("name", "topology"), [("tp2", TP2), ("pp2", PP2)])
def test_killed_after_every_step_it_is_the_run_left_alone(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path, name: str, topology: Topology
) -> None:
    config = resume_config(start, tmp_path / "run", topology)
    for step in range(2, NUM_STEPS + 1):
        dies(config, topology, step)
    finish(config, topology)
    assert_same_run(tmp_path / "run", undisturbed[name])


def test_the_layout_may_change_on_the_way(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """TP2, killed, then PP2, killed, then CP2, killed, then one rank."""
    out = tmp_path / "run"
    dies(resume_config(start, out, TP2), TP2, 5)
    dies(resume_config(start, out, PP2), PP2, 9)
    dies(resume_config(start, out, CP2), CP2, 11)
    finish(resume_config(start, out, TP1), TP1)
    ours, theirs = (figures(at, *OF_THE_LAYOUT) for at in (out, undisturbed["tp2"]))
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        for name, value in other.items():
            # Rounding differences between engine and actor are the layout's own; of gradients the
            # norm is held as in test_layout_invariance.py.
            relative = 1e-5 if "grad_norm" in name else 1e-6
            tolerance = 1e-4 if "logprob_diff" in name else 1e-6
            assert mine[name] == pytest.approx(value, rel=relative, abs=tolerance), name
    assert tokens(out) == tokens(undisturbed["tp2"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["resumed_at_step"] == 10
    assert "parallel.cp: 2 -> 1" in manifest["changed_options"]
    assert [at.get("resumed_at_step") for at in manifest["earlier"]] == [None, 4, 8]


def test_what_leaves_the_device_between_uses_comes_back(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """Saved in the background and killed; what a push copies is the choice's own."""
    config = resume_config(start, tmp_path / "run", TP2, async_=True)
    chosen = {
        choice: replace(config, train=replace(config.train, offload=choice))
        for choice in ("all", "optimizer")
    }
    dies(chosen["optimizer"], TP2, 7)
    finish(chosen["all"], TP2)
    assert_same_run(tmp_path / "run", undisturbed["tp2"], *OF_THE_LAYOUT)


def test_a_damaged_checkpoint_is_passed_over(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The one before is gone on from, and the run ends as it should."""
    out = tmp_path / "run"
    config = resume_config(start, out, TP2)
    dies(config, TP2, 5)
    newest, before, *_ = checkpoints_in(out / "checkpoints")
    assert newest.name == "step_4"
    part = newest / "rank_00001.safetensors"
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 16
    part.write_bytes(content)
    told = run_ranks(program, 2, config=config, topology=TP2, says=True)
    assert set(told) == {""}
    said = capfd.readouterr().out
    assert f"skipped a checkpoint: {part} was changed or damaged" in said
    assert f"going on from {before}: 3 of 12 steps are done" in said
    assert f"{newest} is not gone on from; it is now step_4.unused" in said
    assert_same_run(out, undisturbed["tp2"])


def test_no_whole_checkpoint_left_is_an_error(start: Start, tmp_path: Path) -> None:
    config = resume_config(start, tmp_path / "run", TP1)
    dies(config, TP1, 2)
    (tmp_path / "run/checkpoints/step_1/state.json").unlink()
    [message] = run_ranks(program, 1, config=config, topology=TP1)
    assert message.startswith("8 ")
    assert "state.json is missing" in message
    assert "no whole checkpoint is left" in message
    assert (tmp_path / "run" / "metrics.jsonl").is_file(), "nothing was touched"


CHANGES: dict[str, tuple[Callable[[RunConfig], RunConfig], str]] = {
    "seed": (lambda c: replace(c, seed=2), "seed: found 2, the checkpoint was made with 1"),
    "batch": (
        lambda c: replace(c, train=replace(c.train, prompts_per_step=8)),
        "train.prompts_per_step: found 8, the checkpoint was made with 4",
    ),
    "order": (
        lambda c: replace(c, data=replace(c.data, shuffle=False)),
        "data.shuffle: found False, the checkpoint was made with True",
    ),
    "dtype": (
        lambda c: replace(c, model=replace(c.model, dtype="bf16")),
        "model.dtype: found 'bf16', the checkpoint was made with 'fp32'",
    ),
    "data": (
        lambda c: replace(
            c, data=replace(c.data, train=c.data.train.replace("train.parquet", "eval.parquet"))
        ),
        "data.train: data.train is ",
    ),
}


@pytest.fixture(scope="module")
def stopped_early(start: Start, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed after its first step; nobody changes it."""
    out = tmp_path_factory.mktemp("early") / "run"
    dies(resume_config(start, out, TP1), TP1, 2)
    return out


@pytest.mark.parametrize("name", CHANGES)
def test_a_run_that_would_not_be_the_same_is_refused(
    start: Start, stopped_early: Path, name: str
) -> None:
    change, expected = CHANGES[name]
    config = change(resume_config(start, stopped_early, TP1))
    [message] = run_ranks(program, 1, config=config, topology=TP1)
    assert message.startswith("2 ")
    assert expected in message
    assert "cannot go on from" in message


def test_another_model_or_tokenizer_is_refused(
    start: Start, stopped_early: Path, tmp_path: Path
) -> None:
    data, model = start
    for file, key, value, named in (
        ("config.json", "rms_norm_eps", 1e-3, "model.norm_eps is 0.001"),
        ("generation_config.json", "eos_token_id", [1, 2], "tokenizer.generation_config.json is"),
    ):
        other = tmp_path / file
        shutil.copytree(model, other)
        path = other / file
        content = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(content | {key: value}))
        config = resume_config((data, other), stopped_early, TP1)
        [message] = run_ranks(program, 1, config=config, topology=TP1)
        assert message.startswith("2 "), message
        assert f"model.path: {named}" in message


def test_an_sft_run_does_not_go_on_as_osft(start: Start, stopped_early: Path) -> None:
    config = resume_config(start, stopped_early, TP1)
    with pytest.raises(ConfigError, match="is of an `osft train` run"):
        resume_point(config, "sft", lambda _folder: [], candidates(config))


def test_a_named_checkpoint_starts_a_run_of_its_own(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """From the middle of another run, whose folder stays as it is."""
    source = checkpoints_in(undisturbed["tp2"] / "checkpoints")[1]
    before = {path: path.stat().st_mtime_ns for path in undisturbed["tp2"].rglob("*")}
    out = tmp_path / "run"
    finish(resume_config(start, out, TP2, resume=str(source)), TP2)
    assert before == {path: path.stat().st_mtime_ns for path in undisturbed["tp2"].rglob("*")}
    last = [row for row in figures(undisturbed["tp2"]) if row["step"] == NUM_STEPS]
    assert figures(out) == last
    assert not (out / "checkpoints" / source.name).exists()


def test_never_refuses_a_folder_that_holds_a_run(start: Start, stopped_early: Path) -> None:
    config = resume_config(start, stopped_early, TP1, resume="never")
    [message] = run_ranks(program, 1, config=config, topology=TP1)
    assert message.startswith("2 ")
    assert "already holds a run" in message


def test_a_run_killed_before_its_first_checkpoint_begins_anew(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = resume_config(start, out, TP2)
    dies(config, TP2, 1)
    assert checkpoints_in(out / "checkpoints") == []
    finish(config, TP2)
    assert_same_run(out, undisturbed["tp2"])
    assert (out / "unfinished_1" / "manifest.json").is_file()


def test_a_finished_run_says_that_nothing_is_left(
    start: Start, undisturbed: dict[str, Path]
) -> None:
    config = resume_config(start, undisturbed["pp2"], PP2)
    messages = run_ranks(program, 2, config=config, topology=PP2)
    assert len(set(messages)) == 1
    assert messages[0].startswith("86 12 of 12 steps are done, nothing is left to do")


def test_a_finished_run_goes_on_if_it_is_given_more_steps(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    config = resume_config(start, out, TP1)
    finish(replace(config, train=replace(config.train, epochs=1)), TP1)
    first = figures(out)
    finish(replace(config, train=replace(config.train, epochs=2)), TP1)
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == list(range(1, 9))
    assert [row for row in figures(out) if row["step"] <= 3] == [
        row for row in first if row["step"] <= 3
    ]


def test_a_checkpoint_behind_the_end_is_refused(start: Start, stopped_early: Path) -> None:
    config = resume_config(start, stopped_early, TP1)
    point = resume_point(config, "train", lambda _folder: [], candidates(config))
    assert point is not None
    with pytest.raises(ConfigError, match=r"the run shall have 0 steps, but .* has seen 1"):
        check_work_left(config, 0, point)


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_a_state_damaged_at_the_same_size_is_passed_over(
    start: Start, stopped_early: Path, tmp_path: Path, content: bytes
) -> None:
    """The launcher does not read large files, but it does read those that decide."""
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    state = out / "checkpoints" / "step_1" / "state.json"
    state.write_bytes(content.ljust(state.stat().st_size))
    config = resume_config(start, out, TP1)
    with pytest.raises(CheckpointError, match=r"state\.json was changed or damaged"):
        resume_point(config, "train", problems_by_size, candidates(config))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"step": NaN}', b'{"step": 1}', b"[" * 100_000])
def test_a_small_file_that_says_nothing_is_named(
    start: Start, stopped_early: Path, tmp_path: Path, content: bytes
) -> None:
    """Also where its hash is right: what wrote it may have been another program."""
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    config = resume_config(start, out, TP1)
    (out / "checkpoints" / "step_1" / "state.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"state\.json is damaged: "):
        resume_point(config, "train", lambda _folder: [], candidates(config))
    if b"1}" not in content:
        (out / "summary.json").write_bytes(content)
        with pytest.raises(ConfigError, match=r"summary\.json is damaged .*; remove it"):
            check_work_left(config, NUM_STEPS, None)


def test_a_named_checkpoint_is_where_a_run_begins_not_where_it_begins_again(
    start: Start, undisturbed: dict[str, Path], tmp_path: Path
) -> None:
    """Requeued with the same command, it goes on; and the checkpoint stays although it is old."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed["tp2"], out)
    (out / "summary.json").unlink()
    named = out / "checkpoints" / "step_10"
    config = resume_config(start, out, TP1, resume=str(named), keep_last=1)
    dies(config, TP1, 12)
    assert [path.name for path in checkpoints_in(out / "checkpoints")] == ["step_11", "step_10"]
    finish(config, TP1)
    assert json.loads((out / "manifest.json").read_text())["resumed_at_step"] == 11
    assert [row["step"] for row in read_lines(out / "metrics.jsonl")] == list(range(1, 13))


def test_a_named_checkpoint_does_not_mix_with_another_run(
    start: Start, undisturbed: dict[str, Path], stopped_early: Path
) -> None:
    named = checkpoints_in(undisturbed["tp2"] / "checkpoints")[0]
    config = resume_config(start, stopped_early, TP1, resume=str(named))
    with pytest.raises(ConfigError, match="which holds another; choose another output_dir"):
        resume_point(config, "train", lambda _folder: [], candidates(config))


def test_damaged_logs_are_told(
    start: Start, stopped_early: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(stopped_early, out)
    metrics = out / "metrics.jsonl"
    [line] = metrics.read_text().splitlines()
    metrics.write_text(f"not json\n{line}\n" + line[:20])
    config = resume_config(start, out, TP1)
    config = replace(config, train=replace(config.train, steps=2))
    assert run_ranks(program, 1, config=config, topology=TP1, says=True) == [""]
    assert "left out a line that cannot be read: metrics.jsonl, line 1" in capfd.readouterr().out
    assert [row["step"] for row in read_lines(metrics)] == [1, 2]
    (out / "summary.json").write_text("")
    [message] = run_ranks(program, 1, config=config, topology=TP1)
    assert message.startswith("2 ")
    assert "summary.json is damaged" in message
