"""The scripts of examples/paper, and single_node.sh, with programs that note their arguments."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_preparation.catalog import DATA_SETS

from osft_mcore.cli import main
from osft_mcore.command_line import parse
from osft_mcore.config.evaluation import temperatures
from osft_mcore.config.load import load_config
from osft_mcore.config.schema import RunConfig

ROOT = Path(__file__).resolve().parents[2]
PAPER = sorted((ROOT / "examples" / "paper").glob("*.sh"))
SINGLE = ROOT / "examples" / "single_node.sh"
PROGRAM = f"""#!{sys.executable}
import json, os, pathlib, sys

name, *given = pathlib.Path(sys.argv[0]).name, *sys.argv[1:]
with open(os.environ["CALLS"], "a") as file:
    file.write(json.dumps([name, *given]) + "\\n")
if "--out" in given:
    out = pathlib.Path(given[given.index("--out") + 1])
    out.parent.mkdir(exist_ok=True)
    out.touch()
code = json.loads(os.environ["CODES"]).get(given[0], 0)
sys.exit(0 if "--dry-run" in given else code)
"""
PREPARE = re.compile(r"python tools/prepare_data\.py ((?:[a-z0-9]+ ?)+)")

Run = Callable[..., tuple[int, list[list[str]]]]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Runs a script in a copy of examples/; gives its exit code, and what it called. `codes` says
    how a command of osft ends."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("osft", "python", "sbatch"):
        (programs / name).write_text(PROGRAM)
        (programs / name).chmod(0o755)

    def start(script: Path, *given: str, **codes: int) -> tuple[int, list[list[str]]]:
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        environ = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "CALLS": str(calls),
            "CODES": json.dumps(codes),
        }
        # By its path: from another folder, as a person would.
        command = [tmp_path / script.relative_to(ROOT), *given]
        code = subprocess.run(command, env=environ, cwd="/", check=False).returncode
        return code, [json.loads(line) for line in calls.read_text().splitlines()]

    return start


def config_of(call: list[str]) -> RunConfig:
    return load_config(parse(call[1:]).overrides)


def given_to(script: Path) -> tuple[str, ...]:
    """What a person has to give it, and an option."""
    folder = ("/shared/run",) if "70b" in script.name else ()
    return (*folder, "seed=5")


@pytest.mark.parametrize("script", [*PAPER, SINGLE], ids=lambda path: path.stem)
def test_every_command_of_an_example_is_one_that_works(
    run: Run, script: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, calls = run(script, *given_to(script))
    assert code == 0
    seeds = set()
    for program, *given in calls:
        if program == "sbatch":
            nodes, batch, folder, *options = given[1:]
            assert (ROOT / batch).is_file()
            given = ["train", f"output_dir={folder}", *options]
            assert config_of(["osft", *given]).parallel.world_size == 8 * int(nodes)
        if program == "python":
            assert (ROOT / given[0]).is_file()
        elif given[0] != "report":
            seeds.add(config_of(["osft", *given]).seed)
            assert main([*given, *([] if "--dry-run" in given else ["--dry-run"])]) == 0
            assert "# Ranks" in capsys.readouterr().out
    assert 5 in seeds, "options of the command line are passed on"


def test_offline_goes_on_where_it_was(run: Run) -> None:
    script = ROOT / "examples" / "paper" / "offline_qwen2.5_math_7b.sh"
    assert [call[:2] for call in run(script, generate=85)[1]] == [["osft", "generate"]]
    code, calls = run(script, generate=86)
    commands = ["generate", "tools/solutions_to_sft.py", "sft"]
    assert (code, [call[1] for call in calls]) == (0, commands)
    assert calls[1][calls[1].index("--out") + 1] == config_of(calls[2]).data.train
    folder = Path(config_of(calls[0]).output_dir)
    assert calls[1][calls[1].index("--solutions") + 1] == str(folder / "solutions.jsonl")
    code, calls = run(script, sft=1)
    assert (code, [call[1] for call in calls]) == (1, ["sft"])


@pytest.mark.parametrize(("ended", "code", "models"), [(86, 0, 3), (85, 85, 1), (1, 1, 1)])
def test_a_sweep_over_models_goes_on_with_the_next(
    run: Run, ended: int, code: int, models: int
) -> None:
    script = ROOT / "examples" / "paper" / "all_models_tauv.sh"
    found, calls = run(script, evaluate=ended)
    assert (found, len(calls)) == (code, models)


@pytest.mark.parametrize(("ended", "code", "reports"), [(86, 0, 1), (85, 85, 0)])
@pytest.mark.parametrize("given", [(), ("output_dir=/shared/my run", "seed=5")])
def test_a_run_that_is_done_is_reported(
    run: Run, ended: int, code: int, reports: int, given: tuple[str, ...]
) -> None:
    found, calls = run(SINGLE, *given, train=ended)
    folder = config_of(calls[1]).output_dir
    assert (found, calls[2:]) == (code, [["osft", "report", folder]] * reports)


def test_torchrun_is_told_since_when_the_run_is_under_way(tmp_path: Path) -> None:
    """Ranks that it starts again cannot know: their time, and a wish to stop, begin earlier."""
    program, before = tmp_path / "python", int(time.time())
    program.write_text(f'#!/bin/sh\necho "$OSFT_STARTED $*" >> {tmp_path}/calls\n')
    program.chmod(0o755)
    script = ROOT / "examples" / "multi_node_torchrun.sh"
    command = [script, "2", "node-a:29500", "output_dir=/shared/a"]
    subprocess.run(command, env={**os.environ, "OSFT_PYTHON": str(program)}, check=True)
    started, *given = (tmp_path / "calls").read_text().splitlines()[-1].split()
    assert given[:2] == ["-m", "torch.distributed.run"]
    assert before <= int(started) <= time.time()


def test_sweeps_are_those_of_the_releases(run: Run) -> None:
    folder = ROOT / "examples" / "paper"
    _, [call] = run(folder / "base_model_sweep.sh")
    config = config_of(call)
    swept = temperatures(config.evaluation, baseline=False)
    assert sorted(swept) == [n / 10 for n in range(17)]
    assert (config.evaluation.num_samples, config.rollout.tp) == (32, 1)
    assert (config.rollout.gpu_memory_utilization, config.rollout.enforce_eager) == (0.9, False)
    _, [call] = run(folder / "base_model_sweep.sh", "model.path=x", "output_dir=y")
    assert (config_of(call).model.path, config_of(call).output_dir) == ("x", "y")
    _, calls = run(folder / "all_models_tauv.sh")
    configs = [config_of(call) for call in calls]
    assert [Path(config.model.path).name for config in configs] == [
        "Llama-3.1-8B-Instruct", "Qwen2.5-7B", "Qwen2.5-Math-7B"
    ]  # fmt: skip
    for config in configs:
        swept = temperatures(config.evaluation, baseline=False)
        assert sorted(swept) == [n / 10 for n in range(13)]
        assert config.evaluation.num_samples == 8
        assert "amc" in config.evaluation.files
    assert len({config.output_dir for config in configs}) == 3


@pytest.mark.parametrize("script", PAPER, ids=lambda path: path.stem)
def test_a_script_says_where_it_saves_more_often_than_its_preset(run: Run, script: Path) -> None:
    _, calls = run(script, *given_to(script))
    text = script.read_text(encoding="utf-8")
    for call in calls:
        if given := [word for word in call if word.startswith("checkpoint.every=")]:
            options = [word for word in call if word.startswith("experiment=")]
            preset = load_config(options).checkpoint.every
            assert given != [f"checkpoint.every={preset}"]
            assert f"{given[0]} is ours" in text
            assert f"script has {preset}" in text


def test_the_data_of_every_preset_are_among_those_to_fetch() -> None:
    presets = [path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")]
    wanted = {
        name
        for preset in presets
        if not preset.startswith("arithmetic")
        for name in load_config([f"experiment={preset}"]).evaluation.files
    }
    assert wanted <= set(DATA_SETS)
    for file in ("docs/reproducing-the-paper.md", "docs/data.md", "examples/single_node.sh"):
        named = PREPARE.search((ROOT / file).read_text(encoding="utf-8"))
        assert named, file
        assert {*wanted, "deepscaler"} <= set(named[1].split()), file
