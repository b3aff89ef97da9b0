"""Fill parameters from the rows of other parameters: read from files, or drawn at random."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.weights.execute import shape_mismatches, zero_rows
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.params import hf_layouts, hf_tensors
from osft_mcore.weights.plan import Copy, Padding, make_plan

Rows = Callable[[Copy], Tensor]
"""The rows that a copy takes from its source."""


def fill(
    params: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    sources: Layouts,
    rows: Rows,
    *,
    rank: int = 0,
) -> None:
    """Fill `params`, one after the other; padding becomes zero. Not collective.

    Where several sources hold the same rows, source `rank` is preferred. Raises WeightError if the
    parameters do not fit the layouts or rows have no source.
    """
    shapes = {name: layout.shape for name, layout in layouts.items()}
    problems = shape_mismatches("target", shapes, params)
    if problems:
        raise WeightError("\n".join(problems))
    for name, parts in _parts(layouts, sources, rank):
        _write(params[name], parts, rows)


def filled(
    layouts: Mapping[str, Layout],
    sources: Layouts,
    rows: Rows,
    *,
    dtype: Callable[[str], torch.dtype],
    rank: int = 0,
) -> Iterator[tuple[str, Tensor]]:
    """The parameters of `layouts` in order, new and on the CPU; only one exists at a time.

    `dtype` says which dtype a parameter gets. Errors and `rank` as in `fill`.
    """
    for name, parts in _parts(layouts, sources, rank):
        param = torch.empty(layouts[name].shape, dtype=dtype(name), device="cpu")
        _write(param, parts, rows)
        yield name, param


def random_into(
    params: Mapping[str, Tensor], layouts: Mapping[str, Layout], shape: ModelShape, seed: int
) -> None:
    """Fill `params` with a random initialisation that is the same for every layout.

    The values of a Hugging Face tensor depend on (seed, its name) alone: norms are one, biases
    zero, the rest normal with standard deviation shape.init_std. Not collective.
    """
    sizes = hf_tensors(shape)
    # All parts of a tensor that one parameter takes come one after the other.
    last: dict[str, Tensor] = {}

    def rows(copy: Copy) -> Tensor:
        name = copy.src_param
        if name not in last:
            last.clear()
            last[name] = random_tensor(name, sizes[name], seed, shape.init_std)
        return last[name].narrow(copy.dim, copy.src_start, copy.length)

    fill(params, layouts, {0: hf_layouts(shape)}, rows)


def _parts(
    layouts: Mapping[str, Layout], sources: Layouts, rank: int
) -> list[tuple[str, Sequence[Copy | Padding]]]:
    """What each parameter is made of, ordered by where it comes from."""
    plan = make_plan(sources, {rank: layouts})
    parts: dict[str, list[Copy | Padding]] = defaultdict(list)
    for padding in plan.paddings:
        parts[padding.param].append(padding)
    for copy in sorted(plan.copies, key=lambda copy: (copy.src_rank, copy.src_param)):
        parts[copy.dst_param].append(copy)
    return [(name, parts[name]) for name in layouts]


@torch.no_grad()
def _write(param: Tensor, parts: Sequence[Copy | Padding], rows: Rows) -> None:
    for part in parts:
        if isinstance(part, Padding):
            zero_rows(param, part)
        else:
            param.narrow(part.dim, part.dst_start, part.length).copy_(rows(part))


def random_tensor(name: str, size: tuple[int, ...], seed: int, std: float) -> Tensor:
    """What `random_into` says of a whole Hugging Face tensor; fp32, on the CPU."""
    if name.endswith("norm.weight"):
        return torch.ones(size, device="cpu")
    if name.endswith(".bias"):
        return torch.zeros(size, device="cpu")
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "big", signed=True))
    return torch.normal(0.0, std, size, generator=generator, device="cpu")
