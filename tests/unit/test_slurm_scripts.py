"""The job scripts of examples/, with a fake Slurm on the path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SLURM = EXAMPLES / "slurm"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *SLURM.glob("*.sbatch")])

SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then tr ',' '\\n' <<<"$3"; else echo "scontrol $*" >> "$FAKE/said"; fi
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/arguments"
if [[ $SRUN_DOES == told ]]; then
  kill -USR1 "$PPID"
  until [[ -e $RUN/stop ]]; do sleep 0.01; done
  mv "$RUN/stop" "$RUN/stopped"
  exit "${SRUN_CODE:-0}"
fi
exit "$SRUN_DOES"
"""


class Slurm:
    """A folder with srun and scontrol that write down what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "run"
        for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)

    def submit(
        self, script: str, *arguments: str, nodes: int = 1, srun: str = "0", **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the script as Slurm would on its first node, from a copy in another folder."""
        copy = self.folder / "slurm_script"
        shutil.copy(SLURM / script, copy)
        return subprocess.run(
            ["bash", copy, *arguments],
            cwd=self.folder,
            env={
                **{key: value for key, value in os.environ.items() if "SLURM" not in key},
                "PATH": f"{self.folder}:{os.environ['PATH']}",
                "FAKE": str(self.folder),
                "RUN": str(self.run),
                "SRUN_DOES": srun,
                "SLURM_JOB_ID": "4242",
                "SLURM_NNODES": str(nodes),
                "SLURM_JOB_NODELIST": ",".join(f"node{n}" for n in range(1, nodes + 1)),
                "SLURM_GPUS_ON_NODE": "8",
            }
            | env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    @property
    def command(self) -> str:
        """What srun was given."""
        return " ".join((self.folder / "arguments").read_text().splitlines())

    @property
    def said(self) -> str:
        """What scontrol was asked to do."""
        file = self.folder / "said"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    """A fake Slurm of its own."""
    return Slurm(tmp_path)


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_one_torchrun_a_node_meets_at_the_first(slurm: Slurm, nodes: int) -> None:
    options = ("experiment=arithmetic_osft", "data.prompt_suffix=two words")
    done = slurm.submit("train.sbatch", str(slurm.run), *options, nodes=nodes)
    assert done.returncode == 0, done.stderr
    assert "--kill-on-bad-exit=1" in slurm.command
    assert (
        f"-m torch.distributed.run --nnodes {nodes} --nproc-per-node 8 --max-restarts 3 "
        "--rdzv-backend c10d --rdzv-id 4242.0 --rdzv-endpoint node1:24242 -m osft_mcore.cli train "
        f"output_dir={slurm.run} experiment=arithmetic_osft data.prompt_suffix=two words"
    ) in slurm.command
    assert slurm.said == ""
    assert (slurm.run / "logs" / "latest").resolve().name == "attempt_0"


@pytest.mark.parametrize(("code", "requeued"), [("85", True), ("1", False), ("137", False)])
def test_only_a_run_that_was_told_to_stop_is_queued_again(
    slurm: Slurm, code: str, requeued: bool
) -> None:
    done = slurm.submit("train.sbatch", str(slurm.run), srun=code)
    assert done.returncode == int(code)
    assert slurm.said == ("scontrol requeue 4242\n" if requeued else "")


def test_a_signal_becomes_the_stop_file_and_the_answer_to_it_a_requeue(slurm: Slurm) -> None:
    done = slurm.submit("train.sbatch", str(slurm.run), srun="told", SLURM_RESTART_COUNT="3")
    assert done.returncode == 85, done.stderr
    assert slurm.said == "scontrol requeue 4242\n"
    assert (slurm.run / "logs" / "latest").resolve().name == "attempt_3"
    assert "--rdzv-id 4242.3" in slurm.command


def test_a_crash_after_the_signal_is_no_requeue(slurm: Slurm) -> None:
    done = slurm.submit("train.sbatch", str(slurm.run), srun="told", SRUN_CODE="1")
    assert done.returncode == 1
    assert slurm.said == ""


def test_a_job_is_not_queued_again_for_ever(slurm: Slurm) -> None:
    limits = {"SLURM_RESTART_COUNT": "2", "OSFT_MAX_REQUEUES": "2"}
    done = slurm.submit("train.sbatch", str(slurm.run), srun="85", **limits)
    assert done.returncode == 85
    assert slurm.said == ""
    assert "OSFT_MAX_REQUEUES" in done.stderr


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate_sweep.sbatch"])
@pytest.mark.parametrize("arguments", [(), ("runs/relative",)])
def test_a_folder_that_nodes_may_not_share_is_refused(
    slurm: Slurm, script: str, arguments: tuple[str, ...]
) -> None:
    done = slurm.submit(script, *arguments, SLURM_ARRAY_TASK_ID="0")
    assert done.returncode != 0
    assert "usage" in done.stderr or "absolute" in done.stderr
    assert not (slurm.folder / "arguments").exists()


@pytest.mark.parametrize(("index", "tau"), [("0", "0.0"), ("7", "0.7"), ("16", "1.6")])
def test_a_job_of_the_array_scores_at_its_temperature(slurm: Slurm, index: str, tau: str) -> None:
    job = {"SLURM_ARRAY_TASK_ID": index, "SLURM_ARRAY_JOB_ID": "99"}
    done = slurm.submit("evaluate_sweep.sbatch", str(slurm.run), "seed=3", **job)
    assert done.returncode == 0, done.stderr
    assert (
        f"-m osft_mcore.cli evaluate output_dir={slurm.run}/temperature_{tau} "
        f"evaluation.temperature={tau} evaluation.baseline_temperatures=[] seed=3"
    ) in slurm.command
    assert slurm.submit("evaluate_sweep.sbatch", str(slurm.run), srun="86", **job).returncode == 0
    assert slurm.said == ""
    assert slurm.submit("evaluate_sweep.sbatch", str(slurm.run), srun="85", **job).returncode == 85
    assert slurm.said == f"scontrol requeue 99_{index}\n"


def test_the_conversion_names_the_checkpoint_and_verifies_it(slurm: Slurm) -> None:
    done = slurm.submit("convert.sbatch", "/a/step_3", "/b", OSFT_REPOSITORY="/repo")
    assert done.returncode == 0, done.stderr
    assert slurm.command == "python /repo/tools/verify_checkpoint.py /a/step_3 --hf /b"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(script: Path) -> None:
    assert subprocess.run(["bash", "-n", script], check=False).returncode == 0
    shellcheck = shutil.which(
        "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    )
    assert shellcheck, "shellcheck is in requirements-dev.txt"
    found = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
