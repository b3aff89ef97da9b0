"""The report that a run leaves behind by itself."""

from dataclasses import replace
from pathlib import Path

import torch
from ranks import run_ranks
from torch_engine import build_torch_engine
from toy_run import Start, read_lines, toy_config, write_start

from osft_mcore.config.schema import ReportConfig
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.report.run import read_runs
from osft_mcore.report.scale import written
from osft_mcore.train.osft import run_osft

TOPOLOGY = Topology(tp=1, pp=1, dp=2)


def osft(_rank: int, start: Start, out: Path) -> None:
    context = join_groups(TOPOLOGY, device=torch.device("cpu"))
    config = toy_config(start, out, TOPOLOGY)
    config = replace(
        config, train=replace(config.train, steps=3), report=ReportConfig(every_minutes=0)
    )
    run_osft(config, context, Console(enabled=False), build_torch_engine)


def test_a_run_leaves_a_report_of_all_it_did(tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(osft, TOPOLOGY.world_size, start=write_start(tmp_path), out=out)
    text = (out / "report.html").read_text(encoding="utf-8")
    (run,) = read_runs([out])
    assert run.problems == ()
    assert run.finished
    assert "Finished after 3 steps." in text
    for row in read_lines(out / "metrics.jsonl"):
        assert f"step {row['step']}\nminimised: {written(row['loss/loss'])}" in text
    for row in read_lines(out / "evaluations.jsonl"):
        if row["eval/temperature"] == 1.0:
            score = written(row["eval/arithmetic/pass@1"], percent=True)
            assert f"step {row['step']}\npass@1: {score} (" in text
    assert "gain" in text
    for chart in ("timeline", "memory", "tau"):
        assert f'data-chart="{chart}"' in text
