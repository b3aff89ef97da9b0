"""A run on two hosts, by the script that users start; then one of the hosts is lost."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hosts import Host, HostsRefused, ended, two_hosts, wait_for
from program import no_process_left, outcome, started

from osft_mcore.data.arithmetic import ArithmeticTask, TinyModel, write_arithmetic
from osft_mcore.errors import DeadlinePassed

SCRIPT = Path(__file__).parents[2] / "examples" / "multi_node_torchrun.sh"
TASK = ArithmeticTask(num_sft=16, num_train=24, num_eval=8, num_addends=2, max_addend=12)
MODEL = TinyModel(hidden=64, num_layers=2, num_heads=2, num_kv_heads=2, ffn=128)
NUM_STEPS = 5
LOST_AFTER = 2
"""Steps."""
DEADLINE_S = 15
START_S = 200.0
"""Generous: other tests may run beside."""
OPTIONS = [
    "model.path=data/model", "model.init=random", "model.dtype=fp32", "parallel.tp=2",
    "rollout.tp=2", "rollout.max_prompt_tokens=16", "rollout.max_response_tokens=24",
    "rollout.kv_cache_gib=0.05", "data.train=data/train.parquet", f"train.steps={NUM_STEPS}",
    "train.prompts_per_step=8", "train.prompts_per_update=8", "train.micro_batch_size=4",
    "train.lr=3e-4", "train.lr_warmup_steps=0", "checkpoint.every=1", "evaluation.files=[]",
    "evaluation.every=0", "report.at_end=false", "report.every_minutes=0",
]  # fmt: skip
DEADLINES = [
    *(f"deadlines.{phase}={DEADLINE_S / 60}" for phase in ("rollout", "train", "sync", "save")),
    f"checkpoint.timeout_minutes={DEADLINE_S / 120}",
]  # fmt: skip
Process = subprocess.Popen[bytes]
# What is waited for has limits of its own.
pytestmark = pytest.mark.timeout(900)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Two hosts and a folder that both see, with a model and data."""

    root: Path
    hosts: tuple[Host, Host]

    def start(
        self, number: int, name: str, *options: str, **variables: str
    ) -> tuple[Process, Path]:
        """The script on one host, for the run `name`; also its log."""
        host = self.hosts[number]
        log = self.root / f"{name}_{host.name}.log"
        command = ["bash", str(SCRIPT), "2", f"{self.hosts[0].name}:29500"]
        process = host.start(
            [*command, f"output_dir={name}", *OPTIONS, *options],
            self.root,
            log,
            **{"OSFT_PYTHON": sys.executable, "OSFT_GPUS": "1", "OSFT_MAX_RESTARTS": "1"},
            **variables,
        )
        return process, log


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    write_arithmetic(root / "data", TASK, MODEL)
    try:
        with no_process_left(), two_hosts(root) as hosts:
            yield Cluster(root=root, hosts=hosts)
    except HostsRefused as refused:
        pytest.skip(f"no network namespaces here: {refused}")


@pytest.fixture(scope="module")
def one_host(cluster: Cluster) -> Path:
    """The same run, on this host alone and undisturbed."""
    result = outcome(
        started(["train", "output_dir=one", *OPTIONS], cluster.root), timeout_s=START_S
    )
    assert (result.code, result.err) == (0, ""), result
    return cluster.root / "one"


def figures(run: Path) -> list[dict[str, Any]]:
    """All that was logged but times, rates and memory."""
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def assert_same_run(run: Path, other: Path) -> None:
    assert [row["step"] for row in figures(other)] == list(range(1, NUM_STEPS + 1))
    assert figures(run) == figures(other)
    [ours], [theirs] = (list((one / "hf").glob("*.safetensors")) for one in (run, other))
    assert ours.read_bytes() == theirs.read_bytes()


def test_two_hosts_compute_what_one_does_and_a_lost_one_comes_back(
    cluster: Cluster, one_host: Path
) -> None:
    """The power of one fails in the middle of a step: it sends no more, not even an end."""
    (first, log), (second, _) = (cluster.start(number, "lost", *DEADLINES) for number in range(2))
    host, processes = cluster.hosts[1], [first, second]
    try:
        wait_for(log, f"osft {LOST_AFTER}/{NUM_STEPS}", timeout_s=START_S)
        host.plug(cable=False)
        second.kill()
        began = time.monotonic()
        told = wait_for(log, "(host host-b) does not answer: ", timeout_s=DEADLINE_S + 10)
        assert told - began > 1, "the end of a connection was seen"
        assert re.search(r"^rank 1 .* last seen in .+$", log.read_text(), re.M)
        wait_for(log, f"exitcode: {DeadlinePassed.exit_code}", timeout_s=DEADLINE_S + 10)
        assert not (cluster.root / "lost" / "hf").exists()

        host.plug(cable=True)
        again, log_again = cluster.start(1, "lost", *DEADLINES)
        processes.append(again)
        assert ended(again, log_again, timeout_s=START_S) == 0, log_again.read_text()[-4000:]
        assert ended(first, log, timeout_s=60) == 0, log.read_text()[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    [begun] = re.findall(r"going on from lost/checkpoints/step_(\d)", log.read_text())
    assert LOST_AFTER - 1 <= int(begun) < NUM_STEPS
    assert_same_run(cluster.root / "lost", one_host)
