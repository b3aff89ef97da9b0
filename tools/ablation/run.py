"""Runs the commands of a plan one after the other, each once."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ablation.plan import Job
from osft_mcore.config.load import as_options, load_config


class JobFailed(Exception):
    """A command did not leave its result behind."""


def run_jobs(jobs: Sequence[Job], *, logs: Path) -> None:
    """Run what has no result yet, one line each; what the commands print goes to `logs`.

    Raises JobFailed at the first that fails, or that was run with other options before, ConfigError
    before any is run if the options of one are refused.
    """
    # Before anything runs: an option that is refused is refused here.
    records = [_record(job) for job in jobs]
    logs.mkdir(parents=True, exist_ok=True)
    for number, (job, record) in enumerate(zip(jobs, records, strict=True), start=1):
        place = f"[{number}/{len(jobs)}] {job.name}"
        log = logs / f"{number:02}_{'_'.join(job.name.replace(',', '').replace(':', '').split())}"
        _check_options(job, record, log.with_suffix(".json"))
        if job.result.is_file():
            print(f"{place}: is there", flush=True)
            continue
        began = time.monotonic()
        with log.with_suffix(".log").open("w", encoding="utf-8") as output:
            # The programs of this Python, not those that PATH may find first.
            program = Path(sys.executable).parent / job.command[0]
            code = subprocess.run(
                [program, *job.command[1:]], stdout=output, stderr=subprocess.STDOUT, check=False
            ).returncode
        if code or not job.result.is_file():
            tail = log.with_suffix(".log").read_text(encoding="utf-8").splitlines()[-15:]
            raise JobFailed(
                "\n".join([*tail, f"{place}: exit code {code}; see {log.with_suffix('.log')}"])
            )
        print(f"{place}: {time.monotonic() - began:.0f} s", flush=True)


def _record(job: Job) -> dict[str, Any]:
    """The command, and what its options come to with all files of conf/."""
    options = as_options(load_config(job.command[2:])) if job.command[0] == "osft" else {}
    found: dict[str, Any] = json.loads(json.dumps({"command": job.command, "options": options}))
    return found


def _check_options(job: Job, record: dict[str, Any], path: Path) -> None:
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        if before != record:
            raise JobFailed(
                f"{job.name}: {path.parent.parent} holds results of other options; remove it or "
                f"choose another --out; what they were is in {path}"
            )
    path.write_text(json.dumps(record), encoding="utf-8")
