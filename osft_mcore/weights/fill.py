"""Fill the parameters of one rank from whole Hugging Face tensors: from a reader, or at random."""

import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.errors import WeightError
from osft_mcore.weights.execute import shape_mismatches, zero_rows
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import hf_layouts, hf_tensors
from osft_mcore.weights.plan import make_plan

Rows = Callable[[str, int, int, int], Tensor]
"""(tensor, dim, first row, number of rows) -> those rows."""


@torch.no_grad()
def fill(
    params: Mapping[str, Tensor],
    layouts: Mapping[str, Layout],
    sources: Mapping[str, Layout],
    rows: Rows,
) -> None:
    """Fill `params` from `sources`, asking for each source tensor in one go.

    Raises WeightError if the parameters do not fit the layouts or rows have no source.
    """
    plan = make_plan({0: sources}, {0: layouts})
    problems = shape_mismatches("target", plan.target_shapes[0], params)
    if problems:
        raise WeightError("\n".join(problems))
    for padding in plan.paddings:
        zero_rows(params[padding.param], padding)
    for copy in sorted(plan.copies, key=lambda copy: copy.src_param):
        values = rows(copy.src_param, copy.dim, copy.src_start, copy.length)
        params[copy.dst_param].narrow(copy.dim, copy.dst_start, copy.length).copy_(values)


def random_into(
    params: Mapping[str, Tensor], layouts: Mapping[str, Layout], shape: ModelShape, seed: int
) -> None:
    """Fill `params` with a random initialisation that is the same for every layout.

    The values of a Hugging Face tensor depend on (seed, its name) alone: norms are one, biases
    zero, the rest normal with standard deviation shape.init_std. Not collective.
    """
    sizes = hf_tensors(shape)
    last: dict[str, Tensor] = {}

    def rows(name: str, dim: int, start: int, length: int) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = _random_tensor(name, sizes[name], seed, shape.init_std)
        return last[name].narrow(dim, start, length)

    fill(params, layouts, hf_layouts(shape), rows)


def _random_tensor(name: str, size: tuple[int, ...], seed: int, std: float) -> Tensor:
    if name.endswith("norm.weight"):
        return torch.ones(size, device="cpu")
    if name.endswith(".bias"):
        return torch.zeros(size, device="cpu")
    key = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(key[:8], "big", signed=True))
    return torch.normal(0.0, std, size, generator=generator, device="cpu")
