"""Hands the actor's weights to the rollout engine: shard to shard, one version at a time."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.weights.execute import TransferReport, execute
from osft_mcore.weights.plan import Layouts, ReshardPlan, check_all_used
from osft_mcore.weights.schedule import make_schedule
from osft_mcore.weights.transport import check_same


class WeightTarget(Protocol):
    """Where weights arrive: a rollout engine."""

    def begin_update(self) -> dict[str, Tensor]:
        """Stop sampling and give access to the live parameters."""
        ...

    def finish_update(self, version: int) -> None:
        """Sampling may go on, under this version."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """One push, on this rank."""

    version: int
    seconds: float
    transfer: TransferReport


class WeightSync:
    """Pushes the actor's parameters into the engine's, by a plan made once."""

    def __init__(
        self,
        plan: ReshardPlan,
        sources: Layouts,
        *,
        rank: int,
        source_params: Callable[[], Mapping[str, Tensor]],
        target: WeightTarget,
        dtype: torch.dtype,
        bucket_bytes: int,
        group: ProcessGroup,
        device: torch.device,
    ) -> None:
        check_all_used(sources, plan)
        check_same(plan.digest, group, device)
        self.version = 0
        self._schedule = make_schedule(plan, rank, dtype=dtype, bucket_bytes=bucket_bytes)
        self._source_params, self._target, self._group = source_params, target, group

    def push(self) -> PushReport:
        """Deliver the actor's weights as the next version. Collective over the world.

        If it raises, the engine stays closed: nothing samples from half-delivered weights.
        """
        started = time.monotonic()
        target_params = self._target.begin_update()
        report = execute(self._schedule, self._source_params(), target_params, group=self._group)
        self.version += 1
        self._target.finish_update(self.version)
        return PushReport(version=self.version, seconds=time.monotonic() - started, transfer=report)
