"""The two ways in which weights reach an engine: into its parameters, or through its own loader."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.config.schema import SyncConfig
from osft_mcore.errors import WeightError
from osft_mcore.weights.execute import TransferReport, combined, execute
from osft_mcore.weights.finite import non_finite
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.phases import Phases
from osft_mcore.weights.plan import ReshardPlan
from osft_mcore.weights.schedule import make_schedule
from osft_mcore.weights.stream import make_portions, stream_tensors
from osft_mcore.weights.transport import agree
from osft_mcore.weights.verify import check_delivered, make_audit


class WeightTarget(Protocol):
    """Where weights arrive: a rollout engine."""

    def begin_update(self) -> dict[str, Tensor]:
        """Stop sampling and give access to the live parameters."""
        ...

    def share(self, memory: Mapping[str, Tensor]) -> None:
        """These parameters are this memory from now on; nobody is sampling."""
        ...

    def reload(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Load every Hugging Face tensor, whole; nobody is sampling."""
        ...

    def finish_update(self, version: int) -> None:
        """Sampling may go on, under this version."""
        ...

    def refuse(self, reason: str) -> None:
        """Sampling may not go on before another update; tell those who ask why."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Ends:
    """Both ends of the bridge on one rank."""

    rank: int
    source_params: Callable[[], Mapping[str, Tensor]]
    """The actor's live parameters, by Megatron name."""
    target: WeightTarget
    dtype: torch.dtype
    """Of both."""
    group: ProcessGroup
    """All ranks of the bridge."""
    device: torch.device


class Direct:
    """Rows go straight from the shards that have them to the shards that need them."""

    def __init__(self, plan: ReshardPlan, ends: Ends, config: SyncConfig) -> None:
        self.digest = plan.digest
        self._ends, self._verify = ends, config.verify
        self._schedule = make_schedule(
            plan, ends.rank, dtype=ends.dtype, bucket_bytes=config.bucket_bytes
        )
        self._audit = make_audit(plan, self._schedule)
        self._aliases = {a.dst_param: a.src_param for a in plan.aliases if a.rank == ends.rank}

    def deliver(self, turn: int) -> TransferReport:
        """Write the engine's parameters and prove it. Collective over the group."""
        ends = self._ends
        sources = ends.source_params()
        targets = ends.target.begin_update()
        phases = Phases(ends.device)
        with phases("verify"):
            problems = non_finite(sources)
        problems += self._share(sources)
        if self._aliases:
            targets = ends.target.begin_update()
        problems += [
            f"target parameter {name!r} is {param.dtype}, the actor's weights are {ends.dtype}"
            for name, param in targets.items()
            if param.dtype != ends.dtype
        ]
        problems += [
            f"target parameter {name!r} should be the memory of {source!r}, but is not"
            for name, source in self._aliases.items()
            if name in targets
            and source in sources
            and targets[name].data_ptr() != sources[source].data_ptr()
        ]
        report = execute(self._schedule, sources, targets, group=ends.group, problems=problems)
        with phases("verify"):
            check_delivered(
                self._audit,
                sources,
                targets,
                verify=self._verify,
                turn=turn,
                group=ends.group,
                device=ends.device,
            )
        return replace(report, verify_s=phases.seconds("verify"))

    def _share(self, sources: Mapping[str, Tensor]) -> list[str]:
        """Problems are for all ranks together: one that raised alone would leave the others."""
        if not self._aliases:
            return []
        # A source that is missing is found, and named, with everything else that is.
        memory = {name: sources[of] for name, of in self._aliases.items() if of in sources}
        try:
            self._ends.target.share(memory)
        except WeightError as error:
            return str(error).splitlines()
        return []


class Reload:
    """Every rank gets all Hugging Face tensors, one portion at a time, for vLLM's own loader."""

    def __init__(
        self,
        sources: Layouts,
        tensors: Mapping[str, Layout],
        receivers: list[int],
        ends: Ends,
        config: SyncConfig,
    ) -> None:
        # Half of the memory for the tensors, half for what is on its way to them. A tensor that is
        # larger than its half is a portion all the same: the loader wants it whole.
        half = config.bucket_bytes // 2
        self._portions = make_portions(
            sources,
            tensors,
            receivers,
            rank=ends.rank,
            dtype=ends.dtype,
            portion_bytes=half,
            bucket_bytes=half,
        )
        digests = "".join(portion.plan.digest for portion in self._portions)
        self.digest = hashlib.sha256(digests.encode()).hexdigest()
        self._ends, self._verify = ends, config.verify

    def deliver(self, turn: int) -> TransferReport:
        """Stream the model into the engine, every portion proven. Collective over the group."""
        ends, reports, broken = self._ends, list[TransferReport](), list[WeightError]()
        ends.target.begin_update()
        sources = ends.source_params()
        # Before the loader has seen anything.
        agree(
            [f"rank {ends.rank}: {line}" for line in non_finite(sources)], ends.group, ends.device
        )
        stream = stream_tensors(
            self._portions,
            sources,
            verify=self._verify,
            turn=turn,
            group=ends.group,
            device=ends.device,
            note=reports.append,
        )

        def watched() -> Iterator[tuple[str, Tensor]]:
            try:
                # Not `yield from`: a loader that gives up would close the stream itself.
                for tensor in stream:  # noqa: UP028
                    yield tensor
            except WeightError as error:
                broken.append(error)
                raise

        started = time.monotonic()
        problems = []
        try:
            ends.target.reload(watched())
        except Exception as error:
            if broken:
                # The stream breaks off on all ranks; there is nothing left to agree on.
                raise broken[0] from error
            # Whatever the loader raises is this rank's alone, and the others do not know yet.
            what = str(error) if isinstance(error, WeightError) else repr(error)
            problems += [f"rank {ends.rank}: {line}" for line in what.splitlines()]
        for _ in stream:
            # The others still need this rank's part of the portions that its engine did not take.
            pass
        agree(problems, ends.group, ends.device)
        moved = combined(reports)
        loading = time.monotonic() - started - moved.seconds
        largest = max(portion.num_elements for portion in self._portions) * ends.dtype.itemsize
        return replace(
            moved,
            write_s=moved.write_s + loading,
            peak_extra_bytes=moved.peak_extra_bytes + largest,
        )
