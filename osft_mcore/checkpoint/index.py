"""What a checkpoint's files hold: which interval of which parameter each tensor is."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any, Final, Literal, get_args

from osft_mcore.errors import WeightError
from osft_mcore.weights.layout import Interval, Layout, Layouts

INDEX: Final = "index.json"
FORMAT: Final = "osft-mcore checkpoint 1"
Kind = Literal["weight", "master", "exp_avg", "exp_avg_sq"]
"""weight: as the model computes with it. master: the optimizer's fp32 copy, where that is another
tensor. exp_avg, exp_avg_sq: Adam's moments."""
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
MOMENTS: Final[tuple[Kind, ...]] = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One tensor of one file: elements start:stop of a flattened parameter of a shard.

    A whole parameter keeps its shape in the file; a part of one is flat.
    """

    file: str
    kind: Kind
    shard: int
    param: str
    start: int
    stop: int

    @property
    def tensor(self) -> str:
        """Its name in the file."""
        return f"{self.kind}/{self.shard}/{self.param}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Index:
    """The parameters of every shard, and where their values are."""

    topology: Mapping[str, int]
    """tp, cp, pp, vpp, dp of the world that wrote it; nothing is read by them, verify_checkpoint
    holds the layouts against them."""
    layouts: Layouts
    """Shard (pp_rank * tp + tp_rank) -> parameter -> which rows of which Hugging Face tensors."""
    pieces: tuple[Piece, ...]

    def of_kind(self, kind: Kind) -> dict[tuple[int, str], list[Piece]]:
        """The pieces of every parameter, in order of their elements.

        Raises WeightError if they do not make up the parameter exactly.
        """
        parts: dict[tuple[int, str], list[Piece]] = {}
        for piece in self.pieces:
            if piece.kind == kind:
                parts.setdefault((piece.shard, piece.param), []).append(piece)
        problems = []
        for (shard, param), found in parts.items():
            found.sort(key=lambda piece: piece.start)
            size = prod(self.layouts[shard][param].shape)
            edges = [(0, 0), *((piece.start, piece.stop) for piece in found), (size, size)]
            if any(last[1] != start[0] for last, start in pairwise(edges)):
                ranges = ", ".join(f"{piece.start}:{piece.stop}" for piece in found)
                problems.append(
                    f"{kind} of {param!r} (shard {shard}): elements {ranges} of {size} are there"
                )
        if problems:
            raise WeightError("\n".join(problems))
        return parts


def to_json(index: Index) -> dict[str, Any]:
    """As plain values for index.json."""
    files: dict[str, list[dict[str, Any]]] = {}
    for piece in index.pieces:
        files.setdefault(piece.file, []).append(
            {
                "tensor": piece.tensor,
                "kind": piece.kind,
                "shard": piece.shard,
                "param": piece.param,
                "elements": [piece.start, piece.stop],
            }
        )
    return {
        "format": FORMAT,
        "topology": dict(index.topology),
        "parameters": {
            str(shard): {name: _layout_to_json(layout) for name, layout in layouts.items()}
            for shard, layouts in index.layouts.items()
        },
        "files": files,
    }


def from_json(value: Any, source: Path) -> Index:
    """The index of `to_json`. Raises WeightError, naming `source`, if it is anything else."""
    try:
        if value["format"] != FORMAT:
            raise WeightError(f"{source}: found format {value['format']!r}, expected {FORMAT!r}")
        layouts = {
            int(shard): {str(name): _layout_from_json(entry) for name, entry in params.items()}
            for shard, params in value["parameters"].items()
        }
        pieces = tuple(
            _piece_from_json(file, entry, layouts)
            for file, entries in value["files"].items()
            for entry in entries
        )
        topology = {str(axis): int(size) for axis, size in value["topology"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightError(f"{source} is not the index of a checkpoint: {error!r}") from error
    return Index(topology=topology, layouts=layouts, pieces=pieces)


def _layout_to_json(layout: Layout) -> dict[str, Any]:
    intervals = [[at.tensor, at.start, at.stop] for at in layout.intervals]
    return {"shape": list(layout.shape), "dim": layout.dim, "intervals": intervals}


def _layout_from_json(entry: Mapping[str, Any]) -> Layout:
    intervals = tuple(
        Interval(None if tensor is None else str(tensor), int(start), int(stop))
        for tensor, start, stop in entry["intervals"]
    )
    shape = tuple(int(size) for size in entry["shape"])
    if min(shape, default=0) < 0 or any(not 0 <= at.start <= at.stop for at in intervals):
        raise ValueError(f"negative sizes in {entry}")
    return Layout(shape=shape, dim=int(entry["dim"]), intervals=intervals)


def _piece_from_json(
    file: str, entry: Mapping[str, Any], layouts: Mapping[int, Mapping[str, Layout]]
) -> Piece:
    start, stop = (int(edge) for edge in entry["elements"])
    piece = Piece(
        file=file,
        kind=entry["kind"],
        shard=int(entry["shard"]),
        param=str(entry["param"]),
        start=start,
        stop=stop,
    )
    size = prod(layouts[piece.shard][piece.param].shape)
    if Path(file).name != file or piece.kind not in KINDS or not 0 <= start <= stop <= size:
        raise ValueError(f"impossible entry {entry} of {file!r}")
    return piece
