"""Training states: saved by one layout, gone on from in any; in the same one, to the bit."""

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_random_model
from ranks import run_ranks

from osft_mcore.actor.actor import Actor
from osft_mcore.checkpoint.folder import STATE, checkpoints_in
from osft_mcore.checkpoint.manifest import problems_of
from osft_mcore.checkpoint.snapshot import Snapshot
from osft_mcore.config.schema import (
    CheckpointConfig,
    ModelConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from osft_mcore.log.console import Console
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.records import Example
from osft_mcore.train.checkpoints import Checkpoints
from osft_mcore.train.resume import ResumePoint
from osft_mcore.train.start import build_actor

CPU = torch.device("cpu")
DELAY_S = 0.3
DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Case:
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    dp: int = 1
    distributed_optimizer: bool = True
    dtype: str = "fp32"
    offload: str = "none"
    fetched: bool = False
    """The weights are there when a save begins, and are put away again while it reads."""

    @property
    def world(self) -> int:
        return self.tp * self.pp * self.dp


def config_of(model: Path, case: Case) -> RunConfig:
    return RunConfig(
        model=ModelConfig(path=str(model), dtype=case.dtype),
        parallel=ParallelConfig(
            tp=case.tp, pp=case.pp, vpp=case.vpp, dp=case.dp,
            distributed_optimizer=case.distributed_optimizer,
        ),
        train=TrainConfig(micro_batch_size=2, eps=1e-3, offload=case.offload),
    )  # fmt: skip


def batch(turn: int) -> list[Example]:
    generator = torch.Generator().manual_seed(turn)
    tokens = torch.randint(0, 67, (8, 12), generator=generator).tolist()
    rows = [(tuple(row[:5]), tuple(row[5:])) for row in tokens]
    return [Example(prompt_token_ids=p, response_token_ids=r) for p, r in rows]


def train(actor: Actor, first: int, last: int) -> list[float]:
    """Losses and gradient norms of updates first..last."""
    results = []
    for turn in range(first, last + 1):
        results.append(actor.update(batch(turn), tau_sample=1.0, lr=1e-2 / (turn + 1)))
        actor.rest()
    return [figure for result in results for figure in (result.loss, result.grad_norm)]


def join(case: Case) -> Any:
    return join_groups(Topology(tp=case.tp, pp=case.pp, vpp=case.vpp, dp=case.dp), device=CPU)


def everything(actor: Actor) -> dict[str, torch.Tensor]:
    return {f"{t.kind}/{t.param}/{t.start}": t.tensor.clone() for t in actor.training_state()}


def read_slowly(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Half of the state is read before the next update, the rest after it; how many were taken."""
    taken = threading.Event()
    left: list[int] = []
    real_values, real_take = Snapshot.values, Snapshot.take

    def values(self: Snapshot) -> Iterator[Iterator[memoryview]]:
        for number, pieces in enumerate(real_values(self)):
            if 2 * number > len(self._live):
                taken.wait(DEADLINE_S)
            yield pieces

    def take(self: Snapshot, deadline: float) -> None:
        while 2 * self._num_read < len(self._live):
            time.sleep(0.01)
        left.append(len(self._live) - self._num_read)
        real_take(self, deadline)
        time.sleep(DELAY_S)
        taken.set()

    monkeypatch.setattr(Snapshot, "values", values)
    monkeypatch.setattr(Snapshot, "take", take)
    return left


def save_and_go_on(rank: int, model: Path, root: Path, case: Case, background: bool) -> Any:
    """Two updates, a save, and two more while the files are written; what these came to."""
    actor = build_actor(config_of(model, case), join(case))
    config = CheckpointConfig(async_=background)
    checkpoints = Checkpoints(root, config, actor, {"config.json": b"{}"}, Console(enabled=False))
    train(actor, 0, 1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        left = read_slowly(monkeypatch) if background else []
        if case.fetched:
            actor.parameters()
        checkpoints.save(2, {"num_updates": actor.num_updates})
        guess = checkpoints.longest_s
        if case.fetched:
            # As they were when it began, also if somebody changes them before the next update.
            weights = actor.parameters()
            kept = {name: weight.clone() for name, weight in weights.items()}
            for weight in weights.values():
                weight.zero_()
            actor.rest()
            for name, weight in actor.parameters().items():
                weight.copy_(kept[name])
        figures = train(actor, 2, 3)
        checkpoints.settle()
    if background:
        owned = sum(tensor.owned for tensor in actor.training_state())
        assert 0 < left[0] < owned or owned == 0
        # What a run that is short of time has to count with.
        assert guess > checkpoints.longest_s > DELAY_S
    return figures, everything(actor)


def resume(rank: int, model: Path, folder: Path, case: Case) -> Any:
    """The two later updates again, from the files."""
    state = json.loads((folder / STATE).read_text())
    point = ResumePoint(folder=folder, state=state, skipped=(), changed=())
    actor = build_actor(config_of(model, case), join(case), point)
    figures = train(actor, 2, 3)
    return figures, everything(actor)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_model(tmp_path_factory.mktemp("model"), tied=True, layers=4)


CASES = {
    "one rank": Case(),
    "tp2": Case(tp=2),
    "pp2 vpp2": Case(pp=2, vpp=2),
    "dp2, sharded optimizer": Case(dp=2),
    "dp2, whole optimizer": Case(dp=2, distributed_optimizer=False),
    "tp2 bf16": Case(tp=2, dtype="bf16"),
    "dp2 bf16": Case(dp=2, dtype="bf16"),
    "dp2 bf16, offload": Case(dp=2, dtype="bf16", offload="all"),
    "pp2 offload, fetched": Case(pp=2, offload="all", fetched=True),
    "dp2 bf16, whole optimizer": Case(dp=2, dtype="bf16", distributed_optimizer=False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_same_layout_goes_on_to_the_bit(model: Path, tmp_path: Path, case: Case) -> None:
    saved = run_ranks(
        save_and_go_on, case.world, model=model, root=tmp_path, case=case, background=True
    )
    [folder] = checkpoints_in(tmp_path)
    assert problems_of(folder, hashes=True) == []
    resumed = run_ranks(resume, case.world, model=model, folder=folder, case=case)
    for (figures, state), (again, state_again) in zip(saved, resumed, strict=True):
        assert again == figures
        assert state.keys() == state_again.keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, state_again[name]), name
