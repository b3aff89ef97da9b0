"""Whole Hugging Face tensors, one portion of the model after the other."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from osft_mcore.weights.execute import TransferReport, execute
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.phases import Phases
from osft_mcore.weights.plan import ReshardPlan, make_plan
from osft_mcore.weights.schedule import RankSchedule, make_schedule
from osft_mcore.weights.verify import Verify, check_delivered, make_audit


@dataclass(frozen=True, slots=True, kw_only=True)
class Portion:
    """Some tensors of the model, and one rank's part in bringing them to the receivers."""

    plan: ReshardPlan
    schedule: RankSchedule
    layouts: Mapping[str, Layout]
    """Of the tensors that this rank receives; empty if it only sends."""

    @property
    def num_elements(self) -> int:
        """Received by this rank."""
        return sum(at.shape[at.dim] * at.row_elements for at in self.layouts.values())


def make_portions(
    sources: Layouts,
    tensors: Mapping[str, Layout],
    receivers: Sequence[int],
    *,
    rank: int,
    dtype: torch.dtype,
    portion_bytes: int,
    bucket_bytes: int,
) -> tuple[Portion, ...]:
    """Plan the stream: portions of at most `portion_bytes`, or of one tensor that is larger."""
    portions = []
    for part in _cut(tensors, portion_bytes // dtype.itemsize):
        plan = make_plan(sources, dict.fromkeys(receivers, part))
        portions.append(
            Portion(
                plan=plan,
                schedule=make_schedule(plan, rank, dtype=dtype, bucket_bytes=bucket_bytes),
                layouts=part if rank in receivers else {},
            )
        )
    return tuple(portions)


def stream_tensors(
    portions: Sequence[Portion],
    source_params: Mapping[str, Tensor],
    *,
    verify: Verify,
    turn: int,
    group: ProcessGroup,
    device: torch.device,
    note: Callable[[TransferReport], None] = lambda _report: None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) to the receivers, in order; tensors are new and may be kept.

    Collective over `group`: every rank must exhaust it. `note` gets the report of each portion.
    Raises WeightError on every rank if what arrived is not what was sent.
    """
    for portion in portions:
        received = {
            name: torch.empty(layout.shape, dtype=portion.schedule.dtype, device=device)
            for name, layout in portion.layouts.items()
        }
        report = execute(portion.schedule, source_params, received, group=group)
        phases = Phases(device)
        with phases("verify"):
            check_delivered(
                make_audit(portion.plan, portion.schedule),
                source_params,
                received,
                verify=verify,
                turn=turn,
                group=group,
                device=device,
            )
        note(replace(report, verify_s=phases.seconds("verify")))
        while received:
            # Taken out one by one, so that what the receiver is done with is freed.
            name = next(iter(received))
            yield name, received.pop(name)


def _cut(tensors: Mapping[str, Layout], max_elements: int) -> Iterator[dict[str, Layout]]:
    part: dict[str, Layout] = {}
    size = 0
    for name, layout in tensors.items():
        num_elements = layout.shape[layout.dim] * layout.row_elements
        if part and size + num_elements > max_elements:
            yield part
            part, size = {}, 0
        part[name] = layout
        size += num_elements
    yield part
