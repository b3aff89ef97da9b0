"""The tensors that training goes on from: weights, fp32 copies, Adam's moments."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from osft_mcore.checkpoint.index import Kind


@dataclass(frozen=True, slots=True, kw_only=True)
class StateTensor:
    """Elements start:stop of one parameter, as they are in memory now."""

    kind: Kind
    param: str
    start: int
    stop: int
    tensor: Tensor
    """In the parameter's shape if it is whole, else flat."""
    owned: bool
    """True on one of the ranks that hold it."""


def training_state(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], *, copies: int, copy: int
) -> list[StateTensor]:
    """Everything that this rank trains with, in the order of `parameters`.

    Adam's moments are made (zero) where no update has made them yet. The distributed optimizer
    holds a part of a parameter, or none, on each rank that has a copy of the weights.
    """
    held = {id(part.param): part for part in _held(optimizer)}
    state: list[StateTensor] = []
    for number, (name, param) in enumerate(parameters.items()):
        # Every copy is whole; they share the work of writing it.
        owner = number % copies == copy
        state.append(_tensor("weight", name, param, param.data, 0, param.numel(), owned=owner))
        if id(param) not in held:
            continue
        part = held[id(param)]
        own = part.sharded or owner
        span = (part.start, part.stop)
        if part.main.dtype != param.dtype:
            state.append(_tensor("master", name, param, part.main, *span, owned=own))
        moments = _moments(part.inner, part.main)
        kinds: tuple[Kind, Kind] = ("exp_avg", "exp_avg_sq")
        for kind in kinds:
            state.append(_tensor(kind, name, param, moments[kind], *span, owned=own))
    return state


def adam_step(optimizer: Any) -> int:
    """Number of updates that Adam has made; its bias correction depends on it."""
    steps = {int(step) for part in _held(optimizer) for step in _steps(part.inner, part.main)}
    assert len(steps) <= 1, f"parameters were updated {sorted(steps)} times"
    return steps.pop() if steps else 0


def set_adam_step(optimizer: Any, step: int) -> None:
    """Make Adam go on from update `step`; its moments must exist."""
    for part in _held(optimizer):
        if _counts_by_parameter(part.inner):
            part.inner.state[part.main]["step"].fill_(step)
        else:
            for group in part.inner.param_groups:
                group["step"] = step


@dataclass(frozen=True, slots=True, kw_only=True)
class _Held:
    param: nn.Parameter
    inner: Any
    """The optimizer that Megatron-Core wraps."""
    main: Tensor
    """What the optimizer updates: the parameter itself, an fp32 copy, or a part of either."""
    start: int
    stop: int
    sharded: bool
    """True if no other rank has these elements of the main tensor."""


def _held(optimizer: Any) -> Iterator[_Held]:
    for wrapper in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = wrapper.optimizer
        if isinstance(wrapper, DistributedOptimizer):
            for param, (group, order) in wrapper.model_param_group_index_map.items():
                span = wrapper._get_model_param_range_map(param)["param"]
                yield _Held(
                    param=param,
                    inner=inner,
                    main=inner.param_groups[group]["params"][order],
                    start=span.start,
                    stop=span.end,
                    sharded=True,
                )
        else:
            for param, main in _pairs(wrapper):
                yield _Held(
                    param=param, inner=inner, main=main, start=0, stop=param.numel(), sharded=False
                )


def _pairs(wrapper: Any) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Each model parameter with what is updated in its place."""
    if isinstance(wrapper, Float16OptimizerWithFloat16Params):
        groups = zip(wrapper.float16_groups, wrapper.fp32_from_float16_groups, strict=True)
        for params, mains in groups:
            yield from zip(params, mains, strict=True)
        for params in wrapper.fp32_from_fp32_groups:
            yield from ((param, param) for param in params)
    else:
        for group in wrapper.optimizer.param_groups:
            yield from ((param, param) for param in group["params"])


def _tensor(
    kind: Kind, name: str, param: Tensor, tensor: Tensor, start: int, stop: int, *, owned: bool
) -> StateTensor:
    flat = tensor.detach().view(-1)
    assert flat.numel() == stop - start, f"{kind} of {name} has {flat.numel()} elements"
    whole = (start, stop) == (0, param.numel())
    return StateTensor(
        kind=kind,
        param=name,
        start=start,
        stop=stop,
        tensor=flat.view(param.shape) if whole else flat,
        owned=owned,
    )


def _moments(inner: Any, main: Tensor) -> dict[str, Tensor]:
    moments: dict[str, Tensor] = inner.state[main]
    if "exp_avg" not in moments:
        moments["exp_avg"] = torch.zeros_like(main)
        moments["exp_avg_sq"] = torch.zeros_like(main)
    if _counts_by_parameter(inner) and "step" not in moments:
        # As torch's fused Adam starts: a float beside the weights.
        moments["step"] = torch.zeros((), dtype=torch.float32, device=main.device)
    return moments


def _counts_by_parameter(inner: Any) -> bool:
    """torch's Adam counts updates for each parameter, the fused ones for each group."""
    return isinstance(inner, torch.optim.Adam | torch.optim.AdamW)


def _steps(inner: Any, main: Tensor) -> Iterator[float]:
    if _counts_by_parameter(inner):
        if "step" in inner.state[main]:
            yield float(inner.state[main]["step"])
    else:
        yield from (group["step"] for group in inner.param_groups if "step" in group)
