"""Whole runs: what `osft sft` and then `osft train` leave behind, and bf16, the default dtype."""

import hashlib
import json
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from check_listeners import is_loopback, listeners
from engines_vllm import bare_loop, join, random_prompts, run_config, start_engine
from models import save_random_model
from program import children, forked, no_process_left, outcome, read_until, started
from ranks import run_ranks
from safetensors.torch import load_file

from osft_mcore.actor.export import export_hf
from osft_mcore.config.check import check
from osft_mcore.config.load import load_config
from osft_mcore.config.schema import SyncConfig, TrainConfig
from osft_mcore.data.arithmetic import PROBLEM_SCHEMA, ArithmeticTask, TinyModel, write_arithmetic
from osft_mcore.data.solutions import convert_solutions
from osft_mcore.errors import AgreementError
from osft_mcore.model.kernels import installed, kernel_lines, kernels_in_use
from osft_mcore.parallel.topology import Topology
from osft_mcore.rollout.vllm_engine import VllmEngine
from osft_mcore.train.osft import build_sync
from osft_mcore.train.start import build_actor
from osft_mcore.weights.sync import WeightSync

TASK = ArithmeticTask(
    num_sft=24, num_train=16, num_eval=8, num_addends=2, max_addend=10, wrong_share=0.0
)
MODEL = TinyModel(hidden=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn=128)
NUM_SEEN = 4
"""Problems that the SFT phase learned by heart: the scores are neither 0 nor 1."""
NUM_STEPS = 3
NUM_SAMPLES = 2
MAX_RESPONSE = 24
SHARED = [
    "model.dtype=fp32", "parallel.tp=2", "rollout.max_prompt_tokens=16",
    f"rollout.max_response_tokens={MAX_RESPONSE}", "train.lr_warmup_steps=0",
]  # fmt: skip
SFT = [
    *SHARED, "output_dir=sft", "model.path=data/model", "model.init=random",
    "data.train=data/sft.parquet", "train.steps=50", "train.prompts_per_step=24",
    "train.prompts_per_update=24", "train.micro_batch_size=24", "train.lr=4e-3",
]  # fmt: skip
OSFT = [
    *SHARED, "output_dir=osft", "model.path=sft/hf", "rollout.tp=2", "rollout.kv_cache_gib=0.05",
    "data.train=data/train.parquet", f"train.steps={NUM_STEPS}", "train.prompts_per_step=16",
    "train.prompts_per_update=8", "train.micro_batch_size=4", "train.lr=3e-4",
    "evaluation.files=[data/eval.parquet,data/seen.parquet]", "evaluation.every=2",
    f"evaluation.num_samples={NUM_SAMPLES}", "evaluation.baseline_temperatures=[0]",
    "checkpoint.every=2",
]  # fmt: skip
OFFLINE = [
    *SHARED, "output_dir=offline", "model.path=sft/hf", "data.train=solutions.parquet",
    "train.steps=1", "train.micro_batch_size=1", "train.lr=3e-4",
]  # fmt: skip
TRACKED = ["logging.wandb=true"]
SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "feedbeef",
    "HF_TOKEN": "hf_" + "aB3" * 11,
    "SOME_SERVICE_TOKEN": "planted.token",
    "SOME_SECRET": "planted-secret",
    "DATABASE_PASSWORD": "planted.password",
}
"""What nothing that a run writes or says may hold."""
OFFLINE_WANDB = {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
Listener = tuple[str, int, str]
Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runs:
    """An SFT run and the OSFT run that started from it; nothing writes to them."""

    root: Path
    """Where both were started; holds data/, sft/, osft/."""
    said: str
    """By `osft train`."""
    listened: frozenset[Listener]
    """Where `osft train` and what it started listened: address, port, program."""

    @property
    def osft(self) -> Path:
        return self.root / "osft"

    @property
    def summary(self) -> Json:
        return json.loads((self.osft / "summary.json").read_text())

    @property
    def metrics(self) -> list[Json]:
        return json_lines(self.osft / "metrics.jsonl")

    def answers(self, step: int, temperature: int) -> list[Json]:
        name = f"step_{step}_temperature_{temperature}.jsonl"
        return json_lines(self.osft / "evaluations" / name)


def json_lines(path: Path) -> list[Json]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("runs")
    write_arithmetic(root / "data", TASK, MODEL)
    write_seen_problems(root / "data")
    for arguments in (["sft", *SFT], ["train", *OSFT, *TRACKED]):
        with no_process_left():
            process = started(arguments, root, SECRETS | OFFLINE_WANDB)
            found: set[Listener] = set()
            # A thread: somebody must read what the process says.
            watch = threading.Thread(target=watch_listeners, args=(process, found))
            watch.start()
            result = outcome(process, timeout_s=240.0)
            watch.join()
        assert (result.code, result.err) == (0, ""), result
    return Runs(root=root, said=result.out, listened=frozenset(found))


def watch_listeners(process: "subprocess.Popen[str]", found: set[Listener]) -> None:
    while process.returncode is None:
        found |= listeners(process.pid)
        time.sleep(0.3)


def write_seen_problems(data: Path) -> None:
    """The first SFT questions as problems of a second, smaller data source."""
    rows = []
    for number, row in enumerate(pq.read_table(data / "sft.parquet").to_pylist()[:NUM_SEEN]):
        [truth] = re.findall(r"boxed\{(\d+)\}", row["response"])
        rows.append(
            {"prompt": row["prompt"], "data_source": "seen", "ability": "math",
             "reward_model": {"ground_truth": truth, "style": "rule"}, "id": f"seen/{number}"}
        )  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows, schema=PROBLEM_SCHEMA), data / "seen.parquet")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def pass_at_1(answers: Sequence[Json]) -> float:
    """Mean over data sources of the mean over problems of the share of correct answers."""
    by_problem: dict[str, dict[str, list[bool]]] = {}
    for answer in answers:
        source = by_problem.setdefault(answer["data_source"], {})
        source.setdefault(answer["prompt_id"], []).append(answer["correct"])
    sizes = {source: len(problems) for source, problems in by_problem.items()}
    assert sizes == {"arithmetic": TASK.num_eval, "seen": NUM_SEEN}
    return mean([mean([mean(p) for p in problems.values()]) for problems in by_problem.values()])


def test_summary_tells_layouts_versions_and_times(runs: Runs) -> None:
    summary = runs.summary
    assert set(summary) == {
        "steps", "tau_sample", "tau_train", "actor_layout", "rollout_layout", "weight_version",
        "weights_to_vllm",
        "sync/logprob_diff_max", "sync/logprob_diff_mean", "base_pass_at_1",
        "base_best_temperature", "base_best_temperature_pass_at_1",
        "base_pass_at_1_by_temperature", "osft_pass_at_1", "evaluation_temperature", "gain",
        "gain_ci95", "gain_p_value", "seconds",
    }  # fmt: skip
    assert (summary["steps"], summary["weight_version"]) == (NUM_STEPS, NUM_STEPS + 1)
    assert (summary["tau_sample"], summary["tau_train"]) == (0.6, 1.0)
    assert summary["actor_layout"] == {"tp": 2, "cp": 1, "pp": 1, "vpp": 1, "dp": 1}
    assert summary["rollout_layout"] == {"tp": 2, "replicas": 1}
    [line] = summary["weights_to_vllm"]
    assert line.startswith("alias 100.0%: embed_tokens, ")
    differences = [record["sync/logprob_diff_max"] for record in runs.metrics]
    # Not 0 either: two implementations computed them.
    assert 0 < summary["sync/logprob_diff_max"] == max(differences) <= 1e-3
    assert set(summary["seconds"]) == {"start", "rollout", "train", "sync", "evaluate", "save"}
    assert all(seconds >= 0 for seconds in summary["seconds"].values())


def test_both_runs_left_a_report(runs: Runs) -> None:
    assert "report: osft/report.html\n" in runs.said
    for folder in ("sft", "osft"):
        page = (runs.root / folder / "report.html").read_text(encoding="utf-8")
        assert page.startswith("<!doctype html>"), folder


def test_nothing_listens_beyond_this_machine(runs: Runs) -> None:
    """The launcher's store, two ranks with gloo groups of Megatron and of vLLM, and wandb."""
    assert len(runs.listened) > 10
    assert [found for found in runs.listened if not is_loopback(found[0])] == []


def held_by(folder: Path, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Which files hold which of the texts, and which names of files do."""
    paths = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [
        (str(path.relative_to(folder)), text)
        for path in paths
        for text in texts
        if text in path.name or text.encode() in path.read_bytes()
    ]


def test_no_secret_of_the_environment_is_written_or_said(runs: Runs) -> None:
    written = {path.name for path in runs.osft.rglob("*")}
    assert {"config.yaml", "manifest.json", "state.json", "README.md"} <= written
    assert any(name.endswith(".wandb") for name in written)
    page = ["report", "osft", "--samples", "2", "--out", "shown/report.html"]
    (runs.root / "shown").mkdir()
    assert forked(page, runs.root, SECRETS).code == 0
    for folder in ("sft", "osft", "shown"):
        assert list((runs.root / folder).iterdir())
        assert held_by(runs.root / folder, list(SECRETS.values())) == []
    assert not [value for value in SECRETS.values() if value in runs.said]


def test_an_option_with_a_secret_is_refused_before_anything_is_written(runs: Runs) -> None:
    given = [
        *OSFT, "output_dir=refused", "data.train=https://me:planted.password@host/x",
        "data.system_prompt=planted-secret", "logging.wandb_project=planted.token",
    ]  # fmt: skip
    result = forked(["train", *given], runs.root, SECRETS)
    assert result.code == 2
    for option in ("data.train", "data.system_prompt", "logging.wandb_project"):
        assert f"{option}: found what looks like a password or a token" in result.err
    assert not [value for value in SECRETS.values() if value in result.out + result.err]
    assert not (runs.root / "refused").exists()


def test_the_tracker_has_no_prompts_and_no_answers(runs: Runs) -> None:
    rows = json_lines(runs.osft / "rollouts" / "step_1.jsonl")
    answers = [*runs.answers(0, 1), *runs.answers(0, 0)]
    texts = {row[name] for row in rows for name in ("prompt", "response")}
    texts |= {answer["text"] for answer in answers} | {"boxed{"}
    assert held_by(runs.osft / "rollouts", ["boxed{"]), "nothing to be found"
    assert held_by(runs.osft / "wandb", sorted(text for text in texts if len(text) > 3)) == []


def test_scores_are_those_of_the_kept_answers(runs: Runs) -> None:
    summary = runs.summary
    base, greedy = pass_at_1(runs.answers(0, 1)), pass_at_1(runs.answers(0, 0))
    after = pass_at_1(runs.answers(NUM_STEPS, 1))
    assert all(0 < score < 1 for score in (base, greedy, after)), (
        "no score to tell from a wrong one"
    )
    assert summary["base_pass_at_1"] == pytest.approx(base)
    assert summary["base_pass_at_1_by_temperature"] == pytest.approx({"1": base, "0": greedy})
    assert summary["base_best_temperature_pass_at_1"] == pytest.approx(max(base, greedy))
    assert summary["base_best_temperature"] == (0.0 if greedy > base else 1.0)
    assert summary["osft_pass_at_1"] == pytest.approx(after)
    assert summary["evaluation_temperature"] == 1.0
    assert summary["gain"] == pytest.approx(after - base)
    low, high = summary["gain_ci95"]
    assert -1 <= low <= summary["gain"] <= high <= 1


def test_kept_answers_are_graded_against_the_ground_truth(runs: Runs) -> None:
    for step, temperature, samples in ((0, 1, NUM_SAMPLES), (0, 0, 1), (2, 1, NUM_SAMPLES)):
        answers = runs.answers(step, temperature)
        assert len(answers) == samples * (TASK.num_eval + NUM_SEEN)
        for answer in answers:
            box = re.findall(r"\\boxed\{(\d+)\}", answer["text"])
            assert answer["correct"] == (box[-1:] == [answer["ground_truth"]]), answer


def test_answers_given_once_are_those_of_the_first_step(runs: Runs) -> None:
    """osft generate, the converter, and osft sft on what came of it."""
    root = runs.root
    with no_process_left():
        result = outcome(started(["generate", *OSFT, "output_dir=solutions"], root))
    assert (result.code, result.err) == (0, ""), result
    assert "generate 1/1  response_length_mean" in result.out
    rows = json_lines(root / "solutions" / "solutions.jsonl")
    sampled = json_lines(runs.osft / "rollouts" / "step_1.jsonl")
    assert len(rows) == TASK.num_train
    names = ("prompt_id", "sample", "response", "response_token_ids", "truncated")
    # The same starting weights, read without an actor.
    assert [[row[n] for n in names] for row in rows] == [[row[n] for n in names] for row in sampled]
    questions = pq.read_table(root / "data" / "train.parquet").to_pylist()
    for row in rows:
        asked = questions[row["row"]]
        assert (row["prompt"], row["tau_sample"]) == (asked["prompt"], 0.6)
        assert row["ground_truth"] == asked["reward_model"]["ground_truth"]
    summary = json.loads((root / "solutions" / "summary.json").read_text())
    assert (summary["batches"], summary["prompts"], summary["answers"]) == (1, 16, 16)
    cut_off = sum(row["truncated"] for row in rows)
    assert summary["cut_off_ratio"] == cut_off / 16
    assert summary["response_tokens"] == sum(len(row["response_token_ids"]) for row in rows)

    done = convert_solutions(
        root / "solutions" / "solutions.jsonl", root / "solutions.parquet", truncated="keep"
    )
    offline = [
        *OFFLINE, "data.prompt_key=prompt_token_ids", "data.response_key=response_token_ids",
        f"train.prompts_per_step={done.num_train}", f"train.prompts_per_update={done.num_train}",
    ]  # fmt: skip
    result = outcome(started(["sft", *offline], root))
    assert (result.code, result.err) == (0, ""), result
    [record] = json_lines(root / "offline" / "metrics.jsonl")
    assert record["loss/num_tokens"] == done.num_train_tokens


def test_a_model_is_scored_alone_as_a_run_scores_its_start(runs: Runs) -> None:
    command = ["evaluate", *OSFT, "output_dir=scores"]
    result = outcome(started(command, runs.root))
    assert (result.code, result.err) == (0, ""), result
    scores, folder = runs.summary, runs.root / "scores"
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["pass_at_1"] == scores["base_pass_at_1"]
    assert summary["pass_at_1_by_temperature"] == scores["base_pass_at_1_by_temperature"]
    assert summary["best_temperature"] == scores["base_best_temperature"]
    low, high = summary["pass_at_1_ci95"]
    assert 0 <= low <= summary["pass_at_1"] <= high <= 1
    for name in ("step_0_temperature_1.jsonl", "step_0_temperature_0.jsonl"):
        kept = json_lines(folder / "evaluations" / name)
        assert kept == json_lines(runs.osft / "evaluations" / name)
    theirs = json_lines(runs.osft / "evaluations.jsonl")
    # The actor's look at some of the answers: here is no actor.
    without = [{k: v for k, v in row.items() if "/probe_" not in k} for row in theirs]
    assert json_lines(folder / "evaluations.jsonl") == [r for r in without if r["step"] == 0]
    # Options that no score depends on may be others.
    again = forked([*command, "logging.every=7", "train.lr=1e-3"], runs.root)
    assert again.code == 86
    assert "to score anew choose another output_dir" in again.err
    other = forked([*command, "model.path=osft/hf"], runs.root)
    assert other.code == 2
    assert "model.path: 'sft/hf' -> 'osft/hf'" in other.err


INTERRUPTED = [*OSFT, "output_dir=interrupted", "checkpoint.every=1"]


def start_again(runs: Runs) -> "subprocess.Popen[str]":
    return started(["train", *INTERRUPTED], runs.root)


def test_an_interrupted_run_is_the_run_left_alone(runs: Runs) -> None:
    """Killed with everything it started, then asked to stop, then left alone."""
    run = runs.root / "interrupted"
    with no_process_left():
        first = start_again(runs)
        assert f"osft 1/{NUM_STEPS}" in read_until(first, "osft 1/")
        first.kill()
        assert outcome(first).code == -signal.SIGKILL
        second = start_again(runs)
        assert f"/{NUM_STEPS}  nll" in read_until(second, "  nll")
        # Any rank may be told: the ranks agree.
        os.kill(children(second.pid)[1], signal.SIGTERM)
        stopped = outcome(second)
        assert stopped.code == 85, stopped
        assert "SIGTERM: saving after this step, then stopping" in stopped.err
        assert re.search(r"rank 1: SIGTERM; stopped after step [23] of 3 and saved", stopped.err)
        last = outcome(start_again(runs), timeout_s=240.0)
    assert (last.code, last.err) == (0, ""), last
    assert re.search(r"going on from interrupted/checkpoints/step_[23]: [23] of 3", last.out)
    assert figures(run) == figures(runs.osft)
    for folder in ("rollouts", "evaluations"):
        ours, theirs = (sorted((at / folder).iterdir()) for at in (run, runs.osft))
        assert [path.name for path in ours] == [path.name for path in theirs]
        for mine, other in zip(ours, theirs, strict=True):
            assert mine.read_text() == other.read_text(), mine.name
    ours, theirs = weights(run / "hf"), weights(runs.osft / "hf")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    mine, other = (json.loads((at / "summary.json").read_text()) for at in (run, runs.osft))
    assert mine | {"seconds": None} == other | {"seconds": None}
    nothing = outcome(start_again(runs))
    assert nothing.code == 86
    assert f"{NUM_STEPS} of {NUM_STEPS} steps are done, nothing is left to do" in nothing.err


def figures(run: Path) -> list[Json]:
    """Everything that was logged but times, rates and memory."""
    rows = [*json_lines(run / "metrics.jsonl"), *json_lines(run / "evaluations.jsonl")]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def documented(section: str) -> set[str]:
    """Names in the first column of a table of docs/metrics.md, written out."""
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
    table = text.split(f"## {section}\n")[1].split("\n## ")[0]
    names = set()
    for row in table.splitlines():
        if row.startswith("| `"):
            first, *more = re.findall(r"`([^`]+)`", row.split("|")[1])
            names |= {first} | {written_out(first, short) for short in more}
    assert names, section
    return names


def written_out(first: str, short: str) -> str:
    """`a/b_mean` and `_max` mean `a/b_max`; `a/b` and `c` mean `a/c`."""
    if short.startswith("_"):
        return first.rsplit("_", 1)[0] + short
    return short if first.split("/")[0] in short else first.rsplit("/", 1)[0] + f"/{short}"


def test_every_step_logs_the_documented_metrics(runs: Runs) -> None:
    expected = documented("Every step")
    assert [record["step"] for record in runs.metrics] == list(range(1, NUM_STEPS + 1))
    for record in runs.metrics:
        names = set(record) - {"step"}
        # Step 2 alone scores; a save is counted with the step after it.
        idle = {"time/evaluate_s"} if record["step"] != 2 else set()
        idle |= {"time/save_s"} if record["step"] != 3 else set()
        # No reference and no GPU here.
        idle |= {"loss/kl", "perf/mfu", "perf/peak_gpu_memory_gib"}
        assert names == expected - idle
        assert all(math.isfinite(value) for value in record.values()), record
        assert record["sync/weight_version"] == record["step"] + 1
        assert record["rollout/num_tokens"] == record["loss/num_tokens"]
        assert record["optim/num_updates"] == 2
        assert record["loss/perplexity"] == pytest.approx(math.exp(record["loss/nll"]))
    assert len({record["loss/nll"] for record in runs.metrics}) == NUM_STEPS


def test_every_evaluation_logs_the_documented_metrics(runs: Runs) -> None:
    records = json_lines(runs.osft / "evaluations.jsonl")
    order = [(record["step"], record["eval/temperature"]) for record in records]
    assert order == [(0, 1.0), (0, 0.0), (2, 1.0), (NUM_STEPS, 1.0)]
    for record in records:
        expected = {
            name.replace("<source>", source).replace("@k", f"@{k}").replace("@n", f"@{NUM_SAMPLES}")
            for name in documented("Every evaluation")
            for source in ("arithmetic", "seen")
            for k in (1, NUM_SAMPLES)
        }
        # A share of nothing is not there.
        shares = {name for name in expected if "_given_" in name}
        assert expected - shares <= set(record) - {"step"} <= expected
        scored = pass_at_1(runs.answers(record["step"], int(record["eval/temperature"])))
        assert record["eval/pass_at_1"] == pytest.approx(scored)


def test_sft_logs_documented_metrics_and_learns(runs: Runs) -> None:
    records = json_lines(runs.root / "sft" / "metrics.jsonl")
    assert [record["step"] for record in records] == list(range(1, 51))
    names = {name for record in records for name in record} - {"step"}
    assert names <= documented("Every step")
    assert records[-1]["loss/nll"] < 0.1 * records[0]["loss/nll"]
    summary = json.loads((runs.root / "sft" / "summary.json").read_text())
    assert (summary["steps"], summary["nll"]) == (50, records[-1]["loss/nll"])


def test_rollouts_keep_what_was_trained_on(runs: Runs) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(runs.root / "data" / "model")
    questions = {
        row["id"]: f"<bos>{row['prompt'][0]['content']}\n"
        for row in pq.read_table(runs.root / "data" / "train.parquet").to_pylist()
    }
    for record in runs.metrics:
        rows = json_lines(runs.osft / "rollouts" / f"step_{record['step']}.jsonl")
        # 16 prompts, 16 a step: every step is one pass over them.
        assert {row["prompt_id"]: row["prompt"] for row in rows} == questions
        assert len(rows) == len(questions)
        lengths = [len(row["response_token_ids"]) for row in rows]
        assert lengths == [row["num_tokens"] for row in rows]
        assert sum(lengths) == record["rollout/num_tokens"]
        for row in rows:
            ids = row["response_token_ids"]
            assert tokenizer.decode(ids, skip_special_tokens=True) == row["response"]
            assert row["truncated"] == (ids[-1] != tokenizer.eos_token_id)
            assert (row["weight_version"], row["replica"]) == (record["step"], 0)


def test_config_and_manifest_tell_how_to_run_it_again(runs: Runs) -> None:
    assert load_config([], runs.root / "sft") == load_config(SFT)
    assert load_config([], runs.osft) == load_config([*OSFT, *TRACKED])
    manifest = json.loads((runs.osft / "manifest.json").read_text())
    assert (manifest["seed"], manifest["world_size"]) == (1, 2)
    assert manifest["command"][1:] == ["train", *OSFT, *TRACKED]
    assert manifest["packages"]["torch"] == torch.__version__
    assert manifest["packages"]["transformers"] == transformers.__version__
    assert {"osft-mcore", "megatron-core", "math-verify"} <= set(manifest["packages"])
    kernels = kernels_in_use(installed())
    assert manifest["kernels"] == {kernel.part: kernel.choice for kernel in kernels}
    assert "\n".join(kernel_lines(kernels)) in runs.said
    assert manifest["data_sha256"] == {
        name: hashlib.sha256((runs.root / name).read_bytes()).hexdigest()
        for name in ("data/train.parquet", "data/eval.parquet", "data/seen.parquet")
    }


def weights(folder: Path) -> Mapping[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def num_changed(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> int:
    assert set(before) == set(after)
    return sum(not torch.equal(before[name], after[name]) for name in before)


def test_exports_load_in_transformers_and_move(runs: Runs) -> None:
    start, end = weights(runs.root / "sft/hf"), weights(runs.osft / "hf")
    assert num_changed(start, end) == len(start)
    assert all(greedy_answers(runs.osft / "hf", runs.answers(0, 0), runs.root / "data"))


def test_transformers_gives_the_greedy_answers_of_the_starting_model(runs: Runs) -> None:
    kept = runs.answers(0, 0)
    texts = [answer["text"] for answer in kept]
    assert greedy_answers(runs.root / "sft/hf", kept, runs.root / "data") == texts


def greedy_answers(folder: Path, asked: Sequence[Json], data: Path) -> list[str]:
    """What transformers answers to the problems of `asked` with everything read from `folder`."""
    tables = [pq.read_table(data / f"{name}.parquet") for name in ("eval", "seen")]
    prompts = {row["id"]: row["prompt"] for table in tables for row in table.to_pylist()}
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for answer in asked:
        text = tokenizer.apply_chat_template(prompts[answer["prompt_id"]], tokenize=False)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")
        [tokens] = model.generate(**ids, do_sample=False, max_new_tokens=MAX_RESPONSE)
        new_ids = tokens[ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new_ids, skip_special_tokens=True))
    return answers


BF16_LAYOUT = Topology(tp=2, pp=1, dp=1, rollout_tp=1)
VOCAB = 67


def stop_pushing(sync: WeightSync, engine: VllmEngine) -> None:
    """After the first push version numbers move on and weights do not."""
    real, reports = sync.push, []

    def push() -> Any:
        if sync.version < 1:
            reports.append(real())
            return reports[-1]
        engine.begin_update()
        sync.version += 1
        engine.finish_update(sync.version)
        return reports[-1]

    sync.push = push  # type: ignore[method-assign]


def fit_bf16(_rank: int, folder: Path, out: Path, stale: bool) -> str:
    """The real loop in bf16; returns the gate's message, or nothing after an export to hf/."""
    context = join(BF16_LAYOUT)
    train = TrainConfig(
        steps=NUM_STEPS, prompts_per_step=16, prompts_per_update=8, micro_batch_size=4,
        lr=0.01, lr_warmup_steps=0,
    )  # fmt: skip
    config = run_config(folder, BF16_LAYOUT, train=train)
    config = replace(
        config,
        model=replace(config.model, dtype="bf16"),
        sync=SyncConfig(mode="copy" if stale else "auto"),
    )
    check(config, world_size=BF16_LAYOUT.world_size, phase="train", device="cpu", need_files=False)
    actor, engine = build_actor(config, context), start_engine(config, context)
    sync = build_sync(config, actor, engine)
    prompts = random_prompts(32, vocab=VOCAB)
    loop = bare_loop(config, actor, engine, sync, prompts=prompts, num_steps=NUM_STEPS, out=out)
    if stale:
        stop_pushing(sync, engine)
    sync.push()
    try:
        loop.fit()
    except AgreementError as error:
        return str(error)
    export_hf(actor, out / "hf", max_shard_bytes=2**30, bucket_bytes=2**20)
    return ""


def run_bf16(tmp_path: Path, *, stale: bool) -> tuple[str, list[Json]]:
    """The gate's message and the metrics of the completed steps."""
    folder = save_random_model(tmp_path / "model", vocab=VOCAB, hidden=128, dtype=torch.bfloat16)
    out = tmp_path / "run"
    messages = run_ranks(fit_bf16, BF16_LAYOUT.world_size, folder=folder, out=out, stale=stale)
    assert len(set(messages)) == 1, messages
    return messages[0], json_lines(out / "metrics.jsonl")


def test_bf16_run_stays_within_its_gate(tmp_path: Path) -> None:
    message, metrics = run_bf16(tmp_path, stale=False)
    assert message == ""
    assert [record["step"] for record in metrics] == list(range(1, NUM_STEPS + 1))
    assert all(math.isfinite(value) for record in metrics for value in record.values())
    assert max(record["sync/logprob_diff_mean"] for record in metrics) <= 0.05
    # Rounding shows: this is not fp32 under another name.
    assert min(record["sync/logprob_diff_mean"] for record in metrics) > 1e-4
    start, end = weights(tmp_path / "model"), weights(tmp_path / "run" / "hf")
    assert {tensor.dtype for tensor in end.values()} == {torch.bfloat16}
    assert num_changed(start, end) == len(start)


def test_stale_weights_stop_a_bf16_run(tmp_path: Path) -> None:
    message, metrics = run_bf16(tmp_path, stale=True)
    assert [record["step"] for record in metrics] == [1]
    assert re.match(r"step 2: rollout .*disagree by \S+ nats", message), message
    assert re.search(r"option sync\.(max|mean)_logprob_diff", message), message
