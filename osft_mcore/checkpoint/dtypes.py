"""Which dtype every converted parameter gets: the stored one, unless another was asked for."""

from collections.abc import Mapping
from typing import Final

import torch

from osft_mcore.errors import WeightError
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.source import WeightSource

DTYPES: Final = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""What --dtype offers."""


def stored_dtypes(source: WeightSource) -> dict[str, torch.dtype]:
    """The dtype of every Hugging Face tensor that `source` holds rows of.

    Raises WeightError if rows of one tensor are stored in several dtypes.
    """
    found: dict[str, torch.dtype] = {}
    problems = []
    for shard, layouts in source.layouts.items():
        for param, layout in layouts.items():
            dtype = source.dtype(shard, param)
            for tensor in tensors_of(layout):
                if found.setdefault(tensor, dtype) != dtype:
                    problems.append(
                        f"{param!r} (shard {shard}) holds rows of {tensor} as {dtype}, another "
                        f"holds rows of it as {found[tensor]}"
                    )
    if problems:
        raise WeightError("\n".join(problems))
    return found


def target_dtypes(
    targets: Layouts, stored: Mapping[str, torch.dtype], wanted: torch.dtype | None
) -> dict[int, dict[str, torch.dtype]]:
    """Shard -> parameter -> dtype.

    Raises WeightError, naming all of them, if tensors of several dtypes are fused into one
    parameter and `wanted` does not say which it shall have.
    """
    problems: dict[str, None] = {}
    dtypes: dict[int, dict[str, torch.dtype]] = {}
    sources = {
        param: tensors
        for layouts in targets.values()
        for param, layout in layouts.items()
        if (tensors := tensors_of(layout))
    }
    for shard, layouts in targets.items():
        dtypes[shard] = {}
        for param, layout in layouts.items():
            # A shard of the vocabulary may be padding alone: then as in the other shards.
            tensors = tensors_of(layout) or sources[param]
            found = {tensor: stored[tensor] for tensor in tensors}
            if wanted is None and len(set(found.values())) > 1:
                parts = ", ".join(f"{tensor} ({dtype})" for tensor, dtype in found.items())
                problems[f"one parameter fuses tensors of several dtypes: {parts}"] = None
            dtypes[shard][param] = wanted or next(iter(found.values()))
    if problems:
        advice = f"--dtype: give one of {', '.join(DTYPES)} to store all parameters alike"
        raise WeightError("\n".join([*problems, advice]))
    return dtypes


def uniform(dtypes: Mapping[str, torch.dtype]) -> torch.dtype | None:
    """The dtype of all of them; None if there are several."""
    return next(iter(dtypes.values())) if len(set(dtypes.values())) == 1 else None


def tensors_of(layout: Layout) -> list[str]:
    """The Hugging Face tensors that a parameter holds rows of."""
    names = (interval.tensor for interval in layout.intervals)
    return list(dict.fromkeys(name for name in names if name is not None))
