"""Hands the actor's weights to the rollout engine: one version at a time, proven, or not at all."""

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from osft_mcore.config.schema import SyncConfig
from osft_mcore.errors import WeightError
from osft_mcore.weights.alias import choose_aliases, deliveries
from osft_mcore.weights.bound import missing_elements
from osft_mcore.weights.execute import TransferReport
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.plan import make_plan
from osft_mcore.weights.sides import check_sides
from osft_mcore.weights.transport import agree, check_same, lost_ranks
from osft_mcore.weights.ways import Direct, Ends, Reload


@dataclass(frozen=True, slots=True, kw_only=True)
class PushReport:
    """One push over all ranks: seconds and peak of the slowest rank, bytes of all together."""

    version: int
    seconds: float
    pack_s: float
    transfer_s: float
    """Sending and waiting; what is packed and written meanwhile hides a part of it."""
    write_s: float
    verify_s: float
    bytes_received: int
    bytes_least: int
    """What the engines need and the actors of their ranks do not hold: no push receives less."""
    bytes_local: int
    """Copied within ranks."""
    bytes_aliased: int
    """Read by the engines where the actors have them."""
    peak_extra_bytes: int

    @property
    def ratio(self) -> float:
        """bytes_received / bytes_least; 1 if nothing has to move and nothing does."""
        if not self.bytes_least:
            return 1.0 + self.bytes_received
        return self.bytes_received / self.bytes_least


class WeightSync:
    """Pushes the actor's parameters into the engine's, by a plan made once."""

    def __init__(
        self,
        sources: Layouts,
        targets: Layouts,
        tensors: Mapping[str, Layout],
        ends: Ends,
        config: SyncConfig,
        *,
        alias_forbidden: str = "",
        version: int = 0,
    ) -> None:
        """Plan; `tensors` are the layouts of the whole Hugging Face tensors.

        The first push delivers version `version` + 1.

        `alias_forbidden` says why the engine may not share memory; empty if it may. Every rank must
        call. Raises WeightError if the two sides do not fit, sync.mode cannot be had, or ranks
        planned differently.
        """
        check_sides(sources, targets)
        aliases = choose_aliases(config.mode, sources, targets, forbidden=alias_forbidden)
        self.deliveries = deliveries(sources, targets, aliases, forbidden=alias_forbidden)
        self.version = version
        self._ends = ends
        self._bytes_least = sum(missing_elements(sources, targets).values()) * ends.dtype.itemsize
        aliased = sum(delivery.elements for delivery in self.deliveries if delivery.aliased)
        self._bytes_aliased = aliased * ends.dtype.itemsize
        self._way: Direct | Reload
        if config.mode == "reload":
            self._way = Reload(sources, tensors, sorted(targets), ends, config)
        else:
            self._way = Direct(make_plan(sources, targets, aliases=aliases), ends, config)
        # Not the plan alone: ranks that cut it into other rounds would wait for each other.
        agreed = (self._way.digest, ends.dtype, config.mode, config.bucket_bytes, config.verify)
        digest = hashlib.sha256(repr(agreed).encode()).hexdigest()
        check_same(digest, ends.group, ends.device)

    def close(self) -> None:
        """Let nobody sample before the next push: the actor's weights are about to change.

        An engine that reads the actor's memory would mix two versions.
        """
        self._ends.target.begin_update()

    def push(self) -> PushReport:
        """Deliver the actor's weights as the next version. Collective over the group.

        All ranks have the version, or none may sample: if it raises WeightError on one rank, it
        does on all, and engines refuse to generate, with its message, until a push succeeds.
        """
        started = time.monotonic()
        version = self.version + 1
        try:
            transfer = self._way.deliver(version)
            report = self._report(version, transfer, time.monotonic() - started)
            self._open(version)
        except Exception as error:
            self._ends.target.refuse(f"weight version {version} was not delivered: {error}")
            raise
        self.version = version
        return report

    def _open(self, version: int) -> None:
        problems = []
        try:
            self._ends.target.finish_update(version)
        except Exception as error:
            # Whatever it is, the other ranks have to close again.
            what = str(error) if isinstance(error, WeightError) else repr(error)
            problems.append(f"rank {self._ends.rank}: {what}")
        agree(problems, self._ends.group, self._ends.device)

    def _report(self, version: int, transfer: TransferReport, seconds: float) -> PushReport:
        """The same on every rank."""
        mine = torch.tensor(
            [
                seconds,
                transfer.pack_s,
                transfer.transfer_s,
                transfer.write_s,
                transfer.verify_s,
                transfer.peak_extra_bytes,
                transfer.bytes_received,
                transfer.bytes_local,
            ],
            dtype=torch.float64,
            device=self._ends.device,
        )
        by_rank = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._ends.group))]
        with lost_ranks("reporting the push"):
            dist.all_gather(by_rank, mine, group=self._ends.group)
        table = torch.stack(by_rank)
        slowest, together = table.amax(0).tolist(), table.sum(0).tolist()
        return PushReport(
            version=version,
            seconds=slowest[0],
            pack_s=slowest[1],
            transfer_s=slowest[2],
            write_s=slowest[3],
            verify_s=slowest[4],
            peak_extra_bytes=int(slowest[5]),
            bytes_received=int(together[6]),
            bytes_local=int(together[7]),
            bytes_least=self._bytes_least,
            bytes_aliased=self._bytes_aliased,
        )
