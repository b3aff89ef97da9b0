"""What training saved, at another layout and as a Hugging Face folder."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_random_model
from ranks import run_ranks
from safetensors.torch import load_file
from test_checkpoints import Case, config_of, join, resume, train

from osft_mcore.actor.export import export_hf
from osft_mcore.checkpoint.convert import mcore_to_hf
from osft_mcore.checkpoint.folder import checkpoints_in
from osft_mcore.checkpoint.reshard import reshard
from osft_mcore.checkpoint.verify import verify
from osft_mcore.config.schema import CheckpointConfig
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.checkpoints import Checkpoints
from osft_mcore.train.start import build_actor
from osft_mcore.weights.side_files import read_side_files

QUIET = Console(enabled=False)


def save_and_export(rank: int, model: Path, run: Path, case: Case) -> None:
    actor = build_actor(config_of(model, case), join(case))
    train(actor, 0, 1)
    files = read_side_files(model, dtype=actor.dtype)
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(), actor, files, QUIET)
    checkpoints.save_now(2, {"num_updates": actor.num_updates})
    export_hf(actor, run / "hf", max_shard_bytes=2**30, bucket_bytes=2**20)


@pytest.mark.parametrize(
    "case", [Case(tp=2, dtype="bf16"), Case(dp=2, dtype="bf16")], ids=["tp2", "dp2"]
)
def test_a_resharded_step_goes_on_as_the_step_itself(tmp_path: Path, case: Case) -> None:
    model = save_random_model(tmp_path / "model", tied=True, layers=4)
    run = tmp_path / "run"
    run_ranks(save_and_export, case.world, model=model, run=run, case=case)
    [step] = checkpoints_in(run / "checkpoints")
    out, pp2 = tmp_path / "resharded", Case(pp=2, dtype="bf16")
    topology = Topology(tp=1, pp=2, dp=1)
    reshard(step, out, topology=topology, vocab_multiple=64, hashes=True, console=QUIET)
    for folder in (step, out):
        checks = list(verify(folder, hf_config=None, hf=run / "hf"))
        assert {"master", "exp_avg", "copies of exp_avg_sq"} < {check.name for check in checks}
        assert [problem for check in checks for problem in check.problems] == []
    expected = run_ranks(resume, pp2.world, model=model, folder=step, case=pp2)
    found = run_ranks(resume, pp2.world, model=model, folder=out, case=pp2)
    for (figures, state), (again, state_again) in zip(expected, found, strict=True):
        assert again == figures
        assert state.keys() == state_again.keys()
        assert all(torch.equal(tensor, state_again[name]) for name, tensor in state.items())


def test_the_converted_step_is_the_exported_model(tmp_path: Path) -> None:
    model = save_random_model(tmp_path / "model", "qwen3", layers=2)
    run, out = tmp_path / "run", tmp_path / "out"
    case = Case(tp=2)
    run_ranks(save_and_export, case.world, model=model, run=run, case=case)
    [step] = checkpoints_in(run / "checkpoints")
    options: dict[str, Any] = {"hf_config": None, "dtype": None, "hashes": True, "console": QUIET}
    mcore_to_hf(step, out, max_shard_bytes=2**30, **options)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, run / "hf"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert not torch.equal(
        ours["model.norm.weight"], load_file(model / "model.safetensors")["model.norm.weight"]
    )
    assert (out / "config.json").read_bytes() == (run / "hf" / "config.json").read_bytes()
    assert "| step | 2 |" in (out / "README.md").read_text()
