"""The job scripts of examples/, with a fake Slurm on the path."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SLURM = EXAMPLES / "slurm"
BATCH = ("train.sbatch", "evaluate_sweep.sbatch", "convert.sbatch")
CONTAINER_LINES = re.compile(r"^# (container=\(.*\n)#(   .*\)\n)", re.MULTILINE)
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *SLURM.glob("*.sbatch")])

SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then tr ',' '\\n' <<<"$3"; else echo "scontrol $*" >> "$FAKE/said"; fi
"""
SRUN = """#!/usr/bin/env bash
printf '%s\\n' "$@" > "$FAKE/arguments"
env > "$FAKE/environment"
if [[ $SRUN_DOES == told ]]; then
  kill "-${SIGNAL:-USR1}" "$PPID"
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
        self,
        script: str,
        *arguments: str,
        nodes: int = 1,
        srun: str = "0",
        in_container: bool = False,
        log: Path | None = None,
        **env: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the script as Slurm would on its first node, from a copy in another folder."""
        copy = self.folder / "slurm_script"
        text = (SLURM / script).read_text()
        copy.write_text(CONTAINER_LINES.sub(r"\1\2", text) if in_container else text)
        with open(log or os.devnull, "a") as out:
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
                stdout=out,
                stderr=subprocess.PIPE,
                text=True,
                timeout=60,
                check=False,
            )

    @property
    def command(self) -> str:
        """What srun was given."""
        return " ".join((self.folder / "arguments").read_text().splitlines())

    @property
    def environment(self) -> dict[str, str]:
        """Of srun."""
        lines = (self.folder / "environment").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

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
    # Ranks of a node that comes back find the others.
    assert slurm.environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert (
        "-m torch.distributed.run --signals-to-handle SIGINT,SIGHUP,SIGQUIT "
        f"--nnodes {nodes} --nproc-per-node 8 --max-restarts 3 "
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


WORKER = """
import os, signal, sys, time

heard = []
signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
print("ready", os.getppid(), flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(1.5)
print("saved", flush=True)
"""


def task_of(slurm: Slurm, port: int, worker: Path) -> list[str]:
    """What srun would start, with `worker` for the program, and `port` of this host for the meeting
    point of the first node."""
    slurm.submit("train.sbatch", str(slurm.run), OSFT_PYTHON=sys.executable, SLURM_GPUS_ON_NODE="1")
    given = (slurm.folder / "arguments").read_text().splitlines()
    command = given[given.index("bash") : given.index("-m", given.index("--nnodes"))]
    here = [f"localhost:{port}" if word == "node1:24242" else word for word in command]
    assert here.count(f"localhost:{port}") == 2, "torchrun meets where the doctor has looked"
    return [*here, str(worker)]


@pytest.fixture
def free_port() -> int:
    """Nobody listens there."""
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def test_a_port_that_is_taken_is_told_before_torchrun_waits_for_it(
    slurm: Slurm, tmp_path: Path
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text('print("started")')
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        command = task_of(slurm, port, worker)
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"meeting point: port {port} of " in done.stderr


@pytest.mark.parametrize(("job", "port"), [("1", 20001), ("11999", 31999), ("4239999", 23999)])
def test_the_port_is_none_that_the_kernel_hands_out(slurm: Slurm, job: str, port: int) -> None:
    """By default it does from 32768 on, to any program."""
    slurm.submit("train.sbatch", str(slurm.run), SLURM_JOB_ID=job)
    assert f"--rdzv-endpoint node1:{port} " in slurm.command


def test_a_preempted_task_has_the_time_to_save(
    slurm: Slurm, tmp_path: Path, free_port: int
) -> None:
    """What Slurm does then: SIGTERM to all processes of the step. torchrun would end its ranks, and
    fail."""
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    command = task_of(slurm, free_port, worker)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None, "stdout was asked to be a pipe"
    assert process.stdout.readline() == f"ready {process.pid}\n"
    os.killpg(process.pid, signal.SIGTERM)
    time.sleep(0.5)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    for rank in ranks:
        os.kill(int(rank), signal.SIGTERM)
    assert process.communicate(timeout=60)[0] == "saved\n"
    assert process.returncode == 0


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate_sweep.sbatch"])
def test_a_job_that_slurm_ends_saves_but_does_not_queue_itself_again(
    slurm: Slurm, script: str
) -> None:
    """It may have been cancelled; of a preempted one Slurm knows by itself."""
    job = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "99", "SRUN_CODE": "85"}
    folder = slurm.run if script == "train.sbatch" else slurm.run / "temperature_0.3"
    done = slurm.submit(script, str(slurm.run), srun="told", SIGNAL="TERM", RUN=str(folder), **job)
    assert done.returncode == 85, done.stderr
    assert slurm.said == ""
    assert (folder / "stopped").exists()


FULL_DISK = """#!/usr/bin/env bash
cat /dev/zero
kill -USR1 "$PPID"
sleep 0.3
exit 85
"""


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate_sweep.sbatch"])
def test_a_full_disk_does_not_end_a_job_that_is_told_to_stop(
    slurm: Slurm, script: str, small_disk: Path
) -> None:
    """Neither the file nor a line of the job's log can be written; the run saves elsewhere."""
    for name, text in (("srun", FULL_DISK), ("touch", "#!/bin/sh\nexit 1\n")):
        (slurm.folder / name).write_text(text)
        (slurm.folder / name).chmod(0o755)
    job = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_JOB_ID": "4242"}
    done = slurm.submit(script, str(slurm.run), log=small_disk / "job.log", **job)
    assert (small_disk / "job.log").stat().st_size > 2**20
    assert done.returncode == 85, done.stderr
    assert slurm.said == f"scontrol requeue 4242{'' if script == 'train.sbatch' else '_3'}\n"


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate_sweep.sbatch"])
def test_ranks_know_since_when_a_wish_to_stop_is_theirs(slurm: Slurm, script: str) -> None:
    before = int(time.time())
    slurm.submit(script, str(slurm.run), SLURM_ARRAY_TASK_ID="0")
    assert before <= int(slurm.environment["OSFT_STARTED"]) <= time.time()


def test_what_an_earlier_attempt_left_is_no_answer(slurm: Slurm) -> None:
    slurm.run.mkdir()
    (slurm.run / "stopped").touch()
    assert slurm.submit("train.sbatch", str(slurm.run)).returncode == 0
    assert slurm.said == ""


def test_a_job_that_cannot_be_queued_again_says_so(slurm: Slurm) -> None:
    (slurm.folder / "scontrol").write_text(SCONTROL + "[[ $1 == show ]]\n")
    done = slurm.submit("train.sbatch", str(slurm.run), srun="85")
    assert done.returncode == 85
    assert "submit it again" in done.stderr


@pytest.mark.parametrize("script", BATCH)
@pytest.mark.parametrize("cores", ["64", ""])
def test_the_step_gets_the_cores_of_the_job(slurm: Slurm, script: str, cores: str) -> None:
    job = {"SLURM_ARRAY_TASK_ID": "0", "OSFT_REPOSITORY": "/repo"}
    if cores:
        job["SLURM_CPUS_PER_TASK"] = cores
    slurm.submit(script, str(slurm.run), "experiment=arithmetic_osft", **job)
    assert slurm.environment.get("SRUN_CPUS_PER_TASK", "") == cores


@pytest.mark.parametrize("script", BATCH)
def test_the_lines_for_a_container_hold(slurm: Slurm, script: str) -> None:
    job = {"SLURM_ARRAY_TASK_ID": "0", "OSFT_REPOSITORY": "/repo", "OSFT_PYTHON": "python"}
    slurm.submit(script, str(slurm.run), "/b", in_container=True, **job)
    options, program = slurm.command.split(" bash " if script == "train.sbatch" else " python ", 1)
    assert "--container-image=osft.sqsh" in options
    mounts = options.split("--container-mounts=")[1].split(",")
    # Models and data are looked for where the job was submitted.
    assert f"{slurm.folder}:{slurm.folder}" in mounts
    assert f"--container-workdir={slurm.folder}" in options
    if script != "convert.sbatch":
        assert f"{slurm.run}:{slurm.run}" in mounts
    assert "--container" not in program


@pytest.mark.parametrize("script", BATCH)
def test_an_empty_array_is_nothing_to_an_old_bash(script: str) -> None:
    # Before 4.4, "${empty[@]}" with `set -u` ends the script; none so old is at hand.
    text = (SLURM / script).read_text()
    guarded = '${container[@]+"${container[@]}"}'
    assert guarded in text
    assert '"${container[@]}"' not in text.replace(guarded, "")


def test_a_crash_after_the_signal_is_no_requeue(slurm: Slurm) -> None:
    done = slurm.submit("train.sbatch", str(slurm.run), srun="told", SRUN_CODE="1")
    assert done.returncode == 1
    assert slurm.said == ""


@pytest.mark.parametrize("script", ["train.sbatch", "evaluate_sweep.sbatch"])
def test_a_job_is_not_queued_again_for_ever(slurm: Slurm, script: str) -> None:
    limits = {"SLURM_RESTART_COUNT": "2", "OSFT_MAX_REQUEUES": "2", "SLURM_ARRAY_TASK_ID": "0"}
    done = slurm.submit(script, str(slurm.run), srun="85", **limits)
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
    # Preempted while it started.
    slurm.submit("evaluate_sweep.sbatch", str(slurm.run), srun="143", **job)
    assert slurm.said == f"scontrol requeue 99_{index}\n" * 2


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
