"""Every layout that an actor can have is what its checkpoints say of themselves."""

from pathlib import Path

import pytest
from models import save_random_model
from ranks import run_ranks
from test_checkpoints import Case, config_of, join

from osft_mcore.checkpoint.folder import checkpoints_in
from osft_mcore.checkpoint.verify import verify
from osft_mcore.config.schema import CheckpointConfig
from osft_mcore.log.console import Console
from osft_mcore.train.checkpoints import Checkpoints
from osft_mcore.train.start import build_actor
from osft_mcore.weights.side_files import read_side_files

CASES = {
    "one rank": Case(),
    "tp2 dp2, sharded optimizer": Case(tp=2, dp=2, dtype="bf16"),
    "dp2, whole optimizer": Case(dp=2, distributed_optimizer=False),
    "tp2 pp2": Case(tp=2, pp=2, dtype="bf16"),
    "pp2 vpp2 dp2": Case(pp=2, vpp=2, dp=2),
}


def save(rank: int, model: Path, root: Path, case: Case) -> None:
    actor = build_actor(config_of(model, case), join(case))
    files = read_side_files(model, dtype=actor.dtype)
    checkpoints = Checkpoints(root, CheckpointConfig(), actor, files, Console(enabled=False))
    checkpoints.save_now(1, {})


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_what_an_actor_saves_is_laid_out_as_stated(tmp_path: Path, case: Case, tied: bool) -> None:
    """Five layers divide by no number of stages."""
    model = save_random_model(tmp_path / "model", "qwen2", tied=tied, layers=5)
    run_ranks(save, case.world, model=model, root=tmp_path / "run", case=case)
    [folder] = checkpoints_in(tmp_path / "run")
    checks = list(verify(folder, hf_config=None, hf=None))
    assert {"layout", "exp_avg_sq"} < {check.name for check in checks}
    assert [problem for check in checks for problem in check.problems] == []
