"""Bad input, interruption and death: one clear error, an exit code on every rank, nothing left."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from program import (
    Outcome,
    as_rank,
    children,
    forked,
    no_process_left,
    outcome,
    read_until,
    started,
)
from safetensors.torch import save_file

from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.data.arithmetic import ArithmeticTask, TinyModel, write_arithmetic
from osft_mcore.weights.params import hf_tensors

TASK = ArithmeticTask(num_sft=24, num_train=24, num_eval=8, num_addends=2, max_addend=30)
MODEL = TinyModel(hidden=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn=96)
FIRST_WEIGHT = "model.layers.0.mlp.down_proj.weight"
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": "1"}
CONFIG, DATA, WEIGHT = 2, 3, 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """Good and bad inputs; nothing writes to them."""

    root: Path

    def options(self, phase: str, *more: str) -> list[str]:
        """A run on two ranks that works, then what a case changes. It would write to `out`."""
        data = "train.parquet" if phase == "train" else "sft.parquet"
        return [
            phase,
            "output_dir=out",
            f"model.path={self.root / 'model'}",
            "model.init=random",
            "model.dtype=fp32",
            "parallel.tp=2",
            "rollout.tp=2",
            "rollout.max_prompt_tokens=32",
            "rollout.max_response_tokens=16",
            "rollout.kv_cache_gib=0.05",
            f"data.train={self.root / data}",
            "train.prompts_per_step=8",
            "train.prompts_per_update=8",
            "train.micro_batch_size=4",
            "train.steps=100000",
            *more,
        ]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    root = tmp_path_factory.mktemp("inputs")
    write_arithmetic(root, TASK, MODEL, overwrite=True)
    _model_without(root, "no_type", "config.json", "model_type")
    _model_without(root, "no_eos", "tokenizer_config.json", "eos_token")
    _edit(root / "no_eos" / "generation_config.json", lambda c: c.pop("eos_token_id"))
    _model_without(root, "no_template", "tokenizer_config.json", "chat_template")
    (root / "no_template" / "chat_template.jinja").unlink(missing_ok=True)
    _model(root, "gpt2", lambda c: c.update(model_type="gpt2"))
    _model(root, "head_dim", lambda c: c.update(head_dim=24))
    _model(root, "rope", lambda c: c.update(model_type="llama", rope_parameters=LLAMA3))
    _model(root, "words", lambda c: c.update(num_key_value_heads="two", rms_norm_eps=[]))
    (_model(root, "broken", lambda c: None) / "config.json").write_text('{"model_type": ')
    folder = _model(root, "no_tokenizer", lambda c: None)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    tensors = {
        name: torch.zeros(shape) for name, shape in hf_tensors(read_model_shape(folder)).items()
    }
    wrong = tensors | {FIRST_WEIGHT: torch.zeros(3, 5)}
    missing = {name: tensor for name, tensor in tensors.items() if name != FIRST_WEIGHT}
    save_file(wrong, _model(root, "wrong_shape", lambda c: None) / "model.safetensors")
    save_file(missing, _model(root, "missing_tensor", lambda c: None) / "model.safetensors")
    (_model(root, "cut_off", lambda c: None) / "model.safetensors").write_bytes(b"\x08\0\0")
    pq.write_table(pq.read_table(root / "train.parquet").slice(0, 0), root / "empty.parquet")
    (root / "text.parquet").write_text("prompt,response\n")
    for name, token_id in (("ids", 5), ("foreign_ids", 5000)):
        rows = [{"prompt": [token_id], "response": [5]}] * 24
        pq.write_table(pa.Table.from_pylist(rows), root / f"{name}.parquet")
    return Files(root=root)


def _model(root: Path, name: str, change: Callable[[dict[str, Any]], None]) -> Path:
    folder = shutil.copytree(root / "model", root / name)
    _edit(folder / "config.json", change)
    return folder


def _model_without(root: Path, name: str, file: str, key: str) -> None:
    folder = shutil.copytree(root / "model", root / name)
    _edit(folder / file, lambda content: content.pop(key, None))


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


PRETRAINED = "model.init=pretrained"
CASES: dict[str, tuple[str, list[str], int, list[str]]] = {
    "unknown option": (
        "train",
        ["train.lrr=1"],
        CONFIG,
        ["train.lrr: unknown option; did you mean train.lr?"],
    ),
    "no model type": ("train", ["model.path={root}/no_type"], CONFIG, ["model.path", "model_type"]),
    "unknown model type": ("sft", ["model.path={root}/gpt2"], CONFIG, ["model.path", "'gpt2'"]),
    "no model folder": ("train", ["model.path={root}/gone"], CONFIG, ["model.path", "config.json"]),
    "config.json cut off": ("sft", ["model.path={root}/broken"], CONFIG, ["model.path", "JSON"]),
    "half a llama3 rope section": (
        "train",
        ["model.path={root}/rope"],
        CONFIG,
        ["model.path", "low_freq_factor is '1'", "high_freq_factor is missing", "original_max_pos"],
    ),
    "words for numbers": (
        "sft",
        ["model.path={root}/words"],
        CONFIG,
        ["model.path", "num_key_value_heads is 'two'", "rms_norm_eps is []"],
    ),
    "no EOS": ("train", ["model.path={root}/no_eos"], CONFIG, ["model.path", "end-of-text"]),
    "no tokenizer": (
        "sft",
        ["model.path={root}/no_tokenizer"],
        CONFIG,
        ["model.path", "tokenizer"],
    ),
    "no template": ("train", ["model.path={root}/no_template"], CONFIG, ["data.chat_template"]),
    "no such columns": (
        "train",
        ["data.train={root}/sft.parquet"],
        DATA,
        ["data.train", "'data_source', 'reward_model'"],
    ),
    "no response column": ("sft", ["data.train={root}/train.parquet"], DATA, ["'response'"]),
    "no such held-out columns": (
        "train",
        ["evaluation.files=[{root}/sft.parquet]"],
        DATA,
        ["evaluation.files", "'data_source'"],
    ),
    "one file twice": (
        "train",
        ["evaluation.files=[{root}/eval.parquet,{root}/eval.parquet]"],
        DATA,
        ["evaluation.files", "used more than once"],
    ),
    "a template for token ids": (
        "sft",
        ["data.train={root}/ids.parquet", "data.chat_template={root}/model/chat_template.jinja"],
        DATA,
        ["data.train", "column 'prompt' holds token ids", "without data.chat_template"],
    ),
    "token ids of another model, but no template, which they do not need": (
        "sft",
        ["data.train={root}/foreign_ids.parquet", "model.path={root}/no_template"],
        DATA,
        ["data.train", "24 of 24 rows cannot be used", "token id 5000"],
    ),
    "no rows": ("train", ["data.train={root}/empty.parquet"], DATA, ["data.train", "no rows"]),
    "not parquet": ("sft", ["data.train={root}/text.parquet"], DATA, ["data.train", "parquet"]),
    "all prompts too long": (
        "train",
        ["rollout.max_prompt_tokens=4"],
        DATA,
        ["data.train", "all 24 prompts", "rollout.max_prompt_tokens = 4"],
    ),
    "all examples too long": (
        "sft",
        ["rollout.max_prompt_tokens=4", "rollout.max_response_tokens=4"],
        DATA,
        ["data.train", "all 24 examples", "= 8"],
    ),
    "fewer prompts than a step takes": (
        "train",
        ["train.prompts_per_step=32"],
        DATA,
        ["train.prompts_per_step = 32", "data.train", "24"],
    ),
    "no weights": ("train", [PRETRAINED], WEIGHT, ["model.path", "model.init"]),
    "a tensor missing": (
        "train",
        [PRETRAINED, "model.path={root}/missing_tensor"],
        WEIGHT,
        ["model.path", f"{FIRST_WEIGHT} is missing"],
    ),
    "a tensor of another shape": (
        "sft",
        [PRETRAINED, "model.path={root}/wrong_shape"],
        WEIGHT,
        ["model.path", f"{FIRST_WEIGHT} has shape (3, 5), config.json asks for (64, 96)"],
    ),
    "weights cut off": ("sft", [PRETRAINED, "model.path={root}/cut_off"], WEIGHT, ["model.path"]),
    "rollout.tp that does not fit": ("train", ["rollout.tp=3"], CONFIG, ["rollout.tp: 3"]),
    "output_dir inside a file": (
        "sft",
        ["output_dir={root}/text.parquet/out"],
        CONFIG,
        ["output_dir", "text.parquet"],
    ),
    "head_dim that vLLM's CPU build refuses": (
        "train",
        ["model.path={root}/head_dim"],
        CONFIG,
        ["model.path", "head_dim is 24"],
    ),
}


def assert_one_error(result: Outcome, code: int, expected: list[str]) -> None:
    assert result.code == code, result.err
    assert result.out == ""
    assert result.err.count("osft: ") == 1, result.err
    assert "Traceback" not in result.err
    assert [text for text in expected if text not in result.err] == [], result.err


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_one_error_before_a_rank_starts_and_on_every_rank(
    case: str, files: Files, tmp_path: Path
) -> None:
    if "head_dim" in case and torch.cuda.is_available():
        pytest.skip("a GPU build of vLLM takes any head_dim")
    phase, changes, code, expected = CASES[case]
    options = files.options(phase, *(change.format(root=files.root) for change in changes))
    with no_process_left():
        alone = forked(options, tmp_path)
        first, second = (forked(options, tmp_path, as_rank(rank, 2)) for rank in range(2))
    assert_one_error(alone, code, expected)
    assert (first.code, first.err) == (alone.code, alone.err)
    assert (second.code, second.err.count("\n")) == (code, 1)
    assert second.err.startswith("[rank 1] ")
    assert list(tmp_path.iterdir()) == []


def test_an_interface_that_is_not_there_is_an_error_beside_the_others(
    files: Files, tmp_path: Path
) -> None:
    options = files.options("train", "data.prompt_key=question")
    names = {"GLOO_SOCKET_IFNAME": "ib7"}
    for launcher in (names, as_rank(0, 2) | names):
        result = forked(options, tmp_path, launcher)
        assert result.code == CONFIG
        assert "GLOO_SOCKET_IFNAME: no interface ib7 on this host, " in result.err
        assert "interfaces here: lo" in result.err
        assert "no column 'question'" in result.err
    # Where it is only planned, the network may be another.
    assert forked([*files.options("train"), "--dry-run"], tmp_path, names).code == 0
    assert list(tmp_path.iterdir()) == []


def test_a_master_port_in_use_is_told_by_the_rank_that_needs_it(
    files: Files, tmp_path: Path
) -> None:
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        launcher = as_rank(0, 2) | {"MASTER_PORT": str(port)}
        result = forked(files.options("train"), tmp_path, launcher)
    assert result.code == CONFIG, result
    told = result.err[result.err.index("osft: ConfigError") :].splitlines()
    assert len(told) == 2
    assert told[1].startswith(f"  - MASTER_PORT: port {port} of {socket.gethostname()} is in use")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("launcher", "expected"),
    [
        (as_rank(0, 3), ["parallel: tp * cp * pp * dp = 2 * 1 * 1 * 1 = 2", "3 processes"]),
        ({"RANK": "0"}, ["WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT: not set, but RANK set"]),
        ({"WORLD_SIZE": "2", "RANK": "1"}, ["MASTER_ADDR", "LOCAL_RANK"]),
        (as_rank(0, 2) | {"WORLD_SIZE": "two"}, ["WORLD_SIZE: found 'two'"]),
        (as_rank(0, 2) | {"LOCAL_RANK": "-1"}, ["LOCAL_RANK: found '-1'"]),
        (as_rank(0, 2) | {"RANK": "2"}, ["RANK: found 2", "WORLD_SIZE = 2"]),
    ],
)
def test_a_launcher_that_does_not_fit_is_told(
    launcher: dict[str, str], expected: list[str], files: Files, tmp_path: Path
) -> None:
    result = forked(files.options("train"), tmp_path, launcher)
    assert_one_error(result, CONFIG, expected)
    assert list(tmp_path.iterdir()) == []


def as_left_by(folder: Path, files: dict[str, str]) -> set[str]:
    """A run folder with these files; returns their paths."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)
    return set(files)


def files_in(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("left", "options", "code", "expected"),
    [
        (
            {"manifest.json": "{}"},
            ["checkpoint.resume=never"],
            CONFIG,
            ["output_dir: 'out' already holds a run", "checkpoint.resume=auto"],
        ),
        (
            {"manifest.json": "{}", "summary.json": '{"steps": 100000}'},
            [],
            86,
            ["100000 of 100000 steps are done", "raise train.steps"],
        ),
        (
            {"manifest.json": "{}", "summary.json": '{"steps": 7}'},
            [],
            CONFIG,
            ["output_dir: the run in 'out' ended after 7 steps and kept no checkpoint"],
        ),
        (
            {"manifest.json": "{}", "checkpoints/step_4/rank_00000.safetensors": ""},
            [],
            8,
            ["step_4: no manifest.json", "no whole checkpoint is left in out/checkpoints"],
        ),
        ({"other.txt": ""}, ["checkpoint.resume=out"], CONFIG, ["checkpoint.resume: 'out' is nei"]),
    ],
    ids=["never", "finished", "ended without a checkpoint", "damaged", "no checkpoint"],
)
def test_a_run_folder_that_cannot_be_gone_on_with_stays_as_it_is(
    files: Files,
    tmp_path: Path,
    left: dict[str, str],
    options: list[str],
    code: int,
    expected: list[str],
) -> None:
    names = as_left_by(tmp_path / "out", left)
    result = forked(files.options("train", *options), tmp_path)
    assert_one_error(result, code, expected)
    assert files_in(tmp_path / "out") == names


def test_a_second_job_on_the_same_folder_is_refused(files: Files, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with held_by_another_process(tmp_path / "out") as pid:
        result = forked(files.options("train"), tmp_path)
    assert_one_error(result, CONFIG, [f"output_dir: out is in use by process {pid} on "])


@contextmanager
def held_by_another_process(folder: Path) -> Iterator[int]:
    code = (
        "import sys\nfrom pathlib import Path\nfrom osft_mcore.log.lock import run_lock\n"
        "with run_lock(Path(sys.argv[1]), job_id=None):\n    print(flush=True)\n    input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None, "asked to be a pipe"
    holder.stdout.readline()
    yield holder.pid
    holder.communicate(b"\n")
    assert holder.returncode == 0


def test_everything_wrong_with_the_files_is_reported_at_once(files: Files, tmp_path: Path) -> None:
    evaluation = f"evaluation.files=[{files.root / 'empty.parquet'}]"
    data = f"data.train={files.root / 'text.parquet'}"
    output = f"output_dir={files.root / 'text.parquet'}"
    result = forked(files.options("train", PRETRAINED, evaluation, data, output), tmp_path)
    headings = [line for line in result.err.splitlines() if line.startswith("osft: ")]
    kinds = ["ConfigError", "WeightError", "DataError", "DataError"]
    assert headings == [f"osft: {kind}" for kind in kinds], result.err
    assert result.code == CONFIG


def test_as_processes(files: Files, tmp_path: Path) -> None:
    """The installed script without a launcher, then `python -m` twice as torchrun would."""
    column = files.options("sft", f"data.train={files.root / 'train.parquet'}")
    eos = files.options("train", f"model.path={files.root / 'no_eos'}")
    module = (sys.executable, "-m", "osft_mcore.cli")
    with no_process_left():
        alone = outcome(started(column, tmp_path))
        processes = [started(eos, tmp_path, as_rank(r, 2), program=module) for r in range(2)]
        ranks = [outcome(process) for process in processes]
    assert_one_error(alone, DATA, ["data.train", "no column 'response'"])
    assert_one_error(ranks[0], CONFIG, ["model.path", "end-of-text"])
    assert ranks[1].code == CONFIG
    assert ranks[1].err.startswith("[rank 1] ConfigError: model.path")
    assert ranks[1].err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_overlong_prompts_are_counted_and_ctrl_c_ends_a_run(files: Files, tmp_path: Path) -> None:
    limit = 8
    prompts = pq.read_table(files.root / "train.parquet")["prompt"].to_pylist()
    # One token per character, one for the start of the text, one for the end of the line.
    num_dropped = sum(len(prompt[0]["content"]) + 2 > limit for prompt in prompts)
    assert 0 < num_dropped <= len(prompts) - 8
    with no_process_left():
        run = started(files.options("train", f"rollout.max_prompt_tokens={limit}"), tmp_path)
        out = read_until(run, "osft 2/")
        run.send_signal(signal.SIGINT)
        result = outcome(run)
    kept = len(prompts) - num_dropped
    assert f"data: {kept} prompts ({num_dropped} over {limit} tokens dropped)" in out, result.err
    assert "osft 2/" in out, result.err
    assert result.code == 128 + signal.SIGINT
    assert "Traceback" not in result.err
    assert result.err.splitlines()[-1] == "osft: stopped by SIGINT"
    assert not list(Path("/dev/shm").glob("osft-*"))


def test_sigterm_ends_ranks_that_are_still_starting(files: Files, tmp_path: Path) -> None:
    with no_process_left():
        run = started(files.options("sft"), tmp_path)
        ranks = _ranks(run.pid)
        run.send_signal(signal.SIGTERM)
        result = outcome(run)
    assert len(ranks) == 2
    assert (result.code, result.err) == (128 + signal.SIGTERM, "osft: stopped by SIGTERM\n")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_rank_ends_the_run(files: Files, tmp_path: Path) -> None:
    with no_process_left():
        run = started(files.options("sft"), tmp_path)
        out = read_until(run, "sft 2/")
        ranks = _ranks(run.pid)
        os.kill(ranks[1], signal.SIGKILL)
        result = outcome(run)
    assert "sft 2/" in out, result.err
    assert result.code == 128 + signal.SIGKILL
    assert "osft: rank 1 was ended by SIGKILL" in result.err


def test_ranks_end_with_a_killed_launcher(files: Files, tmp_path: Path) -> None:
    with no_process_left():
        run = started(files.options("sft", "train.steps=10000"), tmp_path)
        out = read_until(run, "sft 2/")
        run.kill()
        outcome(run)
    assert "sft 2/" in out


def _ranks(launcher: int, count: int = 2) -> dict[int, int]:
    """Process of each rank, once all have been started; fewer if the launcher ended."""
    found: dict[int, int] = {}
    deadline = time.monotonic() + 60
    while len(found) < count and time.monotonic() < deadline:
        time.sleep(0.02)
        for pid in children(launcher):
            variables = dict(
                pair.split("=", 1)
                for pair in Path(f"/proc/{pid}/environ").read_text().split("\0")
                if "=" in pair
            )
            if "RANK" in variables:
                found[int(variables["RANK"])] = pid
    return found
