"""Runs the commands of a plan one after the other, each once."""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ablation.plan import Job


class JobFailed(Exception):
    """A command did not leave its result behind."""


def run_jobs(jobs: Sequence[Job], *, logs: Path) -> None:
    """Run what has no result yet, one line each; what the commands print goes to `logs`.

    Raises JobFailed at the first that fails, or that was run with other options before.
    """
    logs.mkdir(parents=True, exist_ok=True)
    for number, job in enumerate(jobs, start=1):
        place = f"[{number}/{len(jobs)}] {job.name}"
        log = logs / f"{number:02}_{'_'.join(job.name.replace(',', '').replace(':', '').split())}"
        _check_options(job, log.with_suffix(".json"))
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


def _check_options(job: Job, record: Path) -> None:
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        if before != list(job.command):
            raise JobFailed(
                f"{job.name}: {record.parent.parent} holds results of other options; remove it or "
                f"choose another --out\n  found:    {' '.join(before)}\n"
                f"  expected: {' '.join(job.command)}"
            )
    record.write_text(json.dumps(job.command), encoding="utf-8")
