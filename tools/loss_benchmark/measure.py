"""Passes on the ranks of one case: of all ways in turns, or of one, with its memory."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from loss_benchmark.cases import Case
from loss_benchmark.ways import Inputs, Way, make_inputs, run
from osft_mcore.parallel.groups import ParallelContext, all_gather_json, wait_for_all

FEW: Final = 64
"""Tokens on which gradients are compared."""
TOLERANCE: Final = {"fp32": 1e-5, "bf16": 2e-3}
"""Relative, of a loss. Others round their logits to bf16, ours does not."""
GRADIENT_TOLERANCE: Final = {"fp32": 1e-4, "bf16": 3e-2}
"""Relative, of a gradient's norm."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """One pass, forward and backward; of times and peaks the largest of all ranks."""

    way: str
    seconds: float
    cpu_seconds: float
    loss: float
    peak_bytes: int | None = None
    """Beyond inputs and gradients; None: not weighed."""


def in_turns(case: Case, context: ParallelContext) -> list[dict[str, Any]]:
    """All passes but the weighed ones, as dictionaries of `Pass`; the ways take turns.

    Every rank must call. Raises ArithmeticError if two ways differ in gradients.
    """
    inputs = make_inputs(case, context)
    ways: tuple[Way, ...] = ("ours", *case.baselines)
    _check_gradients(case, inputs.first(FEW), ways)
    passes = []
    for way in (case.rounds - 1) * ways:
        inputs.forget_gradients()
        passes.append(_one_pass(way, inputs, context))
    return passes


def weighed(case: Case, way: Way, context: ParallelContext) -> dict[str, Any]:
    """A dictionary of one `Pass` with its peak.

    On CUDA of the allocator, on CPU of the process, which must be one that did nothing else.
    Every rank must call.
    """
    # What is loaded at first use would count; so little leaves no mark on the peak.
    run(way, make_inputs(replace(case, num_tokens=FEW, vocab=64 * case.tp, hidden=64), context))
    inputs = make_inputs(case, context)
    cuda = context.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else _resident("VmRSS")
    found = _one_pass(way, inputs, context)
    peak = torch.cuda.max_memory_allocated() if cuda else _resident("VmHWM")
    found["peak_bytes"] = max(all_gather_json(peak - before - inputs.gradient_bytes, context))
    return found


def _one_pass(way: Way, inputs: Inputs, context: ParallelContext) -> dict[str, Any]:
    wait_for_all(context)
    wall, cpu = time.perf_counter(), time.process_time()
    loss = run(way, inputs)
    own = (time.perf_counter() - wall, time.process_time() - cpu)
    wall, cpu = (max(of_ranks) for of_ranks in zip(*all_gather_json(own, context), strict=True))
    return asdict(Pass(way=way, seconds=wall, cpu_seconds=cpu, loss=loss))


def check_losses(losses: Mapping[str, float], *, tolerance: float) -> None:
    """Raise ArithmeticError if a way's loss is not ours."""
    for way, loss in losses.items():
        # So put, a NaN is no match either.
        if not abs(loss - losses["ours"]) <= tolerance * abs(losses["ours"]):
            raise ArithmeticError(
                f"found a loss of {losses['ours']!r} by ours and {loss!r} by {way}, expected them "
                f"to agree to {tolerance:g}: times of different things are not compared"
            )


def _check_gradients(case: Case, inputs: Inputs, ways: tuple[Way, ...]) -> None:
    """On a few tokens. Warms up every way as well. Collective over the group of `inputs`."""
    expected: tuple[Tensor, Tensor] | None = None
    losses: dict[str, float] = {}
    for way in ways:
        inputs.forget_gradients()
        losses[way] = run(way, inputs)
        hidden, weight = inputs.hidden_TH.grad, inputs.weight_VH.grad
        assert hidden is not None
        assert weight is not None
        if expected is None:
            expected = hidden, weight
        errors = [_distance(ours, at) for ours, at in zip(expected, (hidden, weight), strict=True)]
        _check_errors(way, max(errors), inputs, GRADIENT_TOLERANCE[case.dtype])
    check_losses(losses, tolerance=TOLERANCE[case.dtype])
    inputs.forget_gradients()


def _check_errors(way: Way, error: float, inputs: Inputs, tolerance: float) -> None:
    # All ranks raise together: one that goes on would wait for the others.
    worst = inputs.hidden_TH.new_tensor(error, dtype=torch.float32)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX, group=inputs.tp_group)
    if not float(worst) <= tolerance:
        raise ArithmeticError(
            f"found gradients by ours and by {way} that differ by {float(worst):g} of their norm, "
            f"expected {tolerance:g} at most: times of different things are not compared"
        )


def _distance(expected: Tensor, found: Tensor) -> float:
    """Norm of the difference over that of `expected`."""
    exact = torch.promote_types(expected.dtype, torch.float32)
    return float((found.to(exact) - expected.to(exact)).norm() / expected.to(exact).norm())


def _resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far (Linux)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise OSError(f"/proc/self/status: no {field}; the peak on a CPU is measured on Linux only")
