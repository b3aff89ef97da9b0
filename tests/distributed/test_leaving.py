"""Ranks end together: one that ends early has the launcher lose patience with the others."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch_engine import TorchEngine
from toy_run import Start, toy_config, write_start

from osft_mcore.config.schema import RunConfig
from osft_mcore.data.tokenizer import ChatTokenizer
from osft_mcore.log.console import Console
from osft_mcore.log.run_folder import RunFolder
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.evaluate import run_evaluate
from osft_mcore.train.generate import run_generate
from osft_mcore.train.osft import run_osft
from osft_mcore.train.resume import SUMMARY

DP2 = Topology(tp=1, pp=1, dp=2)
SLOW_S = 0.5
RUNS: dict[str, Callable[..., None]] = {
    "train": run_osft, "generate": run_generate, "evaluate": run_evaluate
}  # fmt: skip


def leave(rank: int, phase: str, start: Start, out: Path) -> bool:
    """Whether the summary, which takes rank 0 long, is there when this rank begins to leave."""
    config = toy_config(start, out, DP2)
    config = replace(config, train=replace(config.train, steps=1))
    found = []

    class Leaving(TorchEngine):
        def close(self) -> None:
            found.append((out / SUMMARY).is_file())

    def build(config: RunConfig, context: ParallelContext, tokenizer: ChatTokenizer) -> Leaving:
        stop = sorted(tokenizer.eos_token_ids)
        return Leaving(config.model.path, stop_token_ids=stop, context=context)

    write_json = RunFolder.write_json

    def slowly(folder: RunFolder, name: str, value: Any) -> None:
        time.sleep(SLOW_S if name == SUMMARY else 0.0)
        write_json(folder, name, value)

    # In this forked process alone.
    RunFolder.write_json = slowly  # type: ignore[method-assign]
    context = join_groups(DP2, device=torch.device("cpu"))
    RUNS[phase](config, context, Console(enabled=False), build)
    [there] = found
    return there


@pytest.mark.parametrize("phase", RUNS)
def test_no_rank_leaves_before_rank_0_has_put_the_results_together(
    tmp_path: Path, phase: str
) -> None:
    start, out = write_start(tmp_path), tmp_path / "run"
    assert run_ranks(leave, 2, phase=phase, start=start, out=out) == [True, True]
