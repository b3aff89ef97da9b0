"""What is wrong with a start is told once, all of it, before anything is built."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
from toy_run import Start, toy_config, write_start

from osft_mcore.checkpoint.manifest import write_manifest
from osft_mcore.config.load import as_options
from osft_mcore.config.schema import ModelConfig, Phase, RunConfig
from osft_mcore.files import json_bytes, record_of
from osft_mcore.model import kernels
from osft_mcore.model.kernels import Installed
from osft_mcore.parallel.topology import Topology
from osft_mcore.train import preflight
from osft_mcore.train.identity import identity
from osft_mcore.train.preflight import input_errors


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    return write_start(tmp_path_factory.mktemp("start"))


@pytest.fixture
def config(start: Start, tmp_path: Path) -> RunConfig:
    """Of a run whose model and reference lie in folders of their own."""
    for name in ("model", "reference"):
        shutil.copytree(start[1], tmp_path / name)
    config = toy_config(start, tmp_path / "run", Topology(tp=1, pp=1, dp=1))
    algorithm = replace(config.algorithm, kl_coef=0.5, reference=str(tmp_path / "reference"))
    model = ModelConfig(path=str(tmp_path / "model"), dtype="fp32")
    return replace(config, model=model, algorithm=algorithm)


def lines_of(config: RunConfig, phase: Phase = "train") -> list[str]:
    return [line for error in input_errors(config, phase) for line in str(error).splitlines()]


def leave_checkpoint(config: RunConfig) -> None:
    """What a start looks at of a checkpoint, but its weights."""
    folder = Path(config.output_dir) / "checkpoints" / "step_1"
    folder.mkdir(parents=True)
    state = {
        "step": 1,
        "phase": "train",
        "options": as_options(config),
        "identity": identity(config, "train"),
    }
    (folder / "state.json").write_bytes(json_bytes(state))
    write_manifest(folder, {"state.json": record_of(folder / "state.json")}, {})


def lose_weights(folder: str) -> str:
    """The line that tells of it, without the option."""
    (Path(folder) / "model.safetensors").unlink()
    return f"{folder}: "


def test_a_run_that_goes_on_is_told_once_of_a_reference_without_weights(config: RunConfig) -> None:
    leave_checkpoint(config)
    assert lines_of(config) == []
    problem = lose_weights(config.algorithm.reference)
    [line] = lines_of(config)
    assert line.startswith(f"algorithm.reference: {problem}")
    # The run goes on without these; whether it could is not known.
    lose_weights(config.model.path)
    assert lines_of(config) == [line]


def test_a_run_of_the_same_job_on_another_host_keeps_its_folder(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    holder = {"host": "elsewhere", "pid": 1, "job_id": "7", "started": "x", "attempt": ""}
    Path(config.output_dir).mkdir()
    (Path(config.output_dir) / "run.lock").write_text(json.dumps(holder))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    [line] = lines_of(config)
    assert "is locked by process 1 on elsewhere (Slurm job 7" in line
    # Slurm has ended that one before it queued the job again.
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert lines_of(config) == []


def test_also_where_the_starting_model_is_the_reference(config: RunConfig) -> None:
    config = replace(config, algorithm=replace(config.algorithm, reference=""))
    leave_checkpoint(config)
    problem = lose_weights(config.model.path)
    [line] = lines_of(config)
    assert line.startswith(f"model.path: {problem}")
    unpenalised = replace(config, algorithm=replace(config.algorithm, kl_coef=0.0))
    assert lines_of(unpenalised) == []


def test_a_run_that_begins_is_told_of_both_models(config: RunConfig) -> None:
    lines = [
        f"{option}: {lose_weights(folder)}"
        for option, folder in (
            ("model.path", config.model.path),
            ("algorithm.reference", config.algorithm.reference),
        )
    ]
    found = sorted(lines_of(config), reverse=True)
    assert len(found) == 2
    assert all(line.startswith(start) for line, start in zip(found, lines, strict=True))


def test_another_checkpoint_is_named_beside_a_reference_without_weights(config: RunConfig) -> None:
    leave_checkpoint(config)
    lose_weights(config.algorithm.reference)
    elsewhere = replace(config.checkpoint, resume=config.model.path)
    first, second = lines_of(replace(config, checkpoint=elsewhere))
    assert "checkpoint.resume: " in first
    assert second.startswith("algorithm.reference: ")


def test_a_pass_that_goes_on_is_told_once_of_a_model_without_weights(config: RunConfig) -> None:
    out = Path(config.output_dir)
    out.mkdir()
    began = {
        "phase": "generate",
        "options": as_options(config),
        "identity": identity(config, "generate"),
    }
    (out / "manifest.json").write_bytes(json_bytes(began))
    assert lines_of(config, "generate") == []
    problem = lose_weights(config.model.path)
    [line] = lines_of(config, "generate")
    assert line.startswith(f"model.path: {problem}")


@pytest.mark.parametrize("engine", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("option", ["", "train.max_tokens_per_micro_batch", "parallel.cp"])
def test_packing_in_fp32_is_refused_where_transformer_engine_serves(
    option: str,
    dtype: Literal["fp32", "bf16"],
    engine: bool,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The device and what is installed are pretended; no kernel runs here."""
    found = Installed(cuda=True, transformer_engine=engine, adam="torch")
    monkeypatch.setattr(kernels, "installed", lambda: found)
    monkeypatch.setattr(preflight, "device_type", lambda: "cuda")
    budget = 64 if option.startswith("train") else None
    config = replace(
        config,
        train=replace(config.train, max_tokens_per_micro_batch=budget),
        parallel=replace(config.parallel, cp=2 if option.endswith("cp") else 1),
        model=replace(config.model, dtype=dtype),
    )
    lines = lines_of(config)
    if engine and dtype == "fp32" and option:
        [line] = lines
        assert f"{option}: found it with model.dtype=fp32, but attention is" in line
    else:
        assert lines == []
