"""The card of a real run's model: the exported one, and a checkpoint's that left its run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from toy_run import Start, toy_config, write_start

from osft_mcore.checkpoint.convert import mcore_to_hf
from osft_mcore.checkpoint.reshard import reshard
from osft_mcore.config.schema import CheckpointConfig, DataConfig, RunConfig
from osft_mcore.data.parquet import data_sha256
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.sft import run_sft

ONE_RANK = Topology(tp=1, pp=1, dp=1)
QUIET = Console(enabled=False)


def sft_from_random_weights(start: Start, out: Path) -> RunConfig:
    config = toy_config(start, out, ONE_RANK)
    return replace(
        config,
        model=replace(config.model, init="random"),
        train=replace(config.train, steps=2),
        data=DataConfig(train=str(start[0] / "sft.parquet")),
        rollout=replace(config.rollout, max_response_tokens=24),
        checkpoint=CheckpointConfig(every=1, async_=False),
    )


def program(_rank: int, config: RunConfig) -> None:
    run_sft(config, join_groups(ONE_RANK, device=torch.device("cpu")), QUIET)


def rows_of(folder: Path) -> dict[str, str]:
    """The table of the card by its first column."""
    lines = (folder / "README.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return {row[0]: row[1] for row in cells if len(row) == 2}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Of a run that has ended."""
    folder = tmp_path_factory.mktemp("card")
    config = sft_from_random_weights(write_start(folder / "start"), folder / "run")
    run_ranks(program, 1, config=config)
    return config


def test_the_exported_model_says_what_it_began_from(config: RunConfig) -> None:
    rows = rows_of(Path(config.output_dir) / "hf")
    assert rows["base model"] == f"random weights, configuration of `{config.model.path}`"
    assert rows["training temperature"] == "1.0"
    assert "sampling temperature" not in rows


def test_a_resharded_step_knows_its_options(config: RunConfig, tmp_path: Path) -> None:
    """Converted where it lies, it has all; away from its run, all but what only that knows."""
    step, moved = Path(config.output_dir) / "checkpoints" / "step_1", tmp_path / "moved"
    reshard(
        step,
        moved,
        topology=Topology(tp=2, pp=1, dp=1),
        vocab_multiple=64,
        hashes=True,
        console=QUIET,
    )
    options: dict[str, Any] = {"hf_config": None, "dtype": None, "hashes": True, "console": QUIET}
    for source, out in ((step, "a"), (moved, "b")):
        mcore_to_hf(source, tmp_path / out, max_shard_bytes=2**30, **options)
    there, here = rows_of(tmp_path / "a"), rows_of(tmp_path / "b")
    assert here["resharded from"] == f"`{step}`"
    assert here["options"] == "from the checkpoint's state.json"
    assert here[f"SHA-256 of `{config.data.train}`"] == f"`{data_sha256(config.data.train)}`"
    assert here["step"] == "1"
    assert there["step"] == "1 of 2"
    different = {name for name in {*there, *here} if there.get(name) != here.get(name)}
    of_the_run = {"SHA-256 of config.yaml", "source commit", "packages",
                  "negative log-likelihood of the last batch"}  # fmt: skip
    assert different == of_the_run | {"resharded from", "options", "step"}
