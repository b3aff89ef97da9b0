"""Is a checkpoint what it should be? Every question is asked, whatever the answers before it."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch

from osft_mcore.checkpoint.dtypes import stored_dtypes
from osft_mcore.checkpoint.folder import STATE
from osft_mcore.checkpoint.formats import (
    check_manifest,
    check_rows,
    config_folder,
    format_of,
    open_source,
    training_state,
)
from osft_mcore.checkpoint.index import KINDS, MOMENTS, Index, Kind, Piece
from osft_mcore.checkpoint.layout_check import check_layout
from osft_mcore.checkpoint.manifest import MANIFEST, read_details, read_manifest
from osft_mcore.checkpoint.save import readable
from osft_mcore.checkpoint.source import CheckpointSource, read_index, shape_of
from osft_mcore.errors import ConfigError, OsftError, WeightError
from osft_mcore.weights.fill import filled
from osft_mcore.weights.layout import Interval, Layout
from osft_mcore.weights.params import hf_layouts, hf_tensors
from osft_mcore.weights.plan import Copy
from osft_mcore.weights.safetensors_io import HfSource, check_tied_head
from osft_mcore.weights.safetensors_read import FLOATS, StoredTensor, read_header
from osft_mcore.weights.safetensors_stream import bytes_of
from osft_mcore.weights.source import WeightSource

NUM_SHOWN = 8
"""Problems of one kind that are printed; the rest is counted."""
AT_ONCE: Final = 1 << 22
"""Elements that are looked at together: what comes of them is in memory too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One question and its answer."""

    name: str
    found: str
    """What is good about it, if there are no `problems`."""
    problems: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """As printed."""
        if not self.problems:
            return [f"ok {self.name}: {self.found}"]
        lines = [f"FAILED {self.name}: {problem}" for problem in self.problems[:NUM_SHOWN]]
        more = len(self.problems) - NUM_SHOWN
        return [*lines, f"FAILED {self.name}: and {more} more"] if more > 0 else lines


def verify(folder: Path, *, hf_config: Path | None, hf: Path | None) -> Iterator[Check]:
    """Ask all that can be asked of a checkpoint or a Hugging Face folder without computing with it.

    `hf_config`: folder with config.json, where the checkpoint has no model/. `hf`: compare every
    tensor with this folder's, bit by bit. Raises ConfigError if `folder` holds no checkpoint.
    """
    found = format_of(folder)
    hf_config = config_folder(folder, hf_config=hf_config, hf=hf)
    if found == "safetensors" or (folder / MANIFEST).is_file():
        yield answer("manifest", partial(_manifest, folder))
    if found == "safetensors":
        yield answer("files", lambda: _files(folder, read_index(folder)))
        yield answer("layout", partial(_layout, folder, hf_config))
    yield answer("weights", partial(_weights, folder, hf_config))
    if found == "safetensors":
        yield answer("copies", partial(_copies, folder, "weight"))
        yield from _training_state(folder)
        for kind in KINDS[1:]:
            yield from _optimizer(folder, kind, hf_config)
    if hf is not None:
        yield answer(f"equal to {hf}", partial(_equal, folder, hf_config, hf))


def answer(name: str, ask: Callable[[], str]) -> Check:
    """Ask: what `ask` returns is good, an error that it raises is not."""
    try:
        return Check(name=name, found=ask())
    except OsftError as error:
        lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
        return Check(name=name, found="", problems=tuple(lines))


def _manifest(folder: Path) -> str:
    check_manifest(folder, hashes=True)
    records = read_manifest(folder)
    total = readable(sum(record.size for record in records.values()))
    return f"{len(records)} files, {total}, every SHA-256 as it was written"


def _files(folder: Path, index: Index) -> str:
    """Hold the headers of the tensor files against the index."""
    pieces: dict[str, dict[str, Piece]] = defaultdict(dict)
    for piece in index.pieces:
        pieces[piece.file][piece.tensor] = piece
    problems = []
    for name in sorted({*pieces, *(path.name for path in folder.glob("*.safetensors"))}):
        present = read_header(folder / name)
        problems += [
            f"{name} holds {tensor!r}, of which the index knows nothing"
            for tensor in present
            if tensor not in pieces[name]
        ]
        problems += [
            f"{name}: {problem}"
            for tensor, piece in pieces[name].items()
            if (problem := _misfit(present.get(tensor), piece, index))
        ]
    if problems:
        raise WeightError("\n".join(problems))
    return f"{len(pieces)} files hold the {len(index.pieces)} tensors that the index names"


def _misfit(stored: StoredTensor | None, piece: Piece, index: Index) -> str:
    if stored is None:
        return f"no {piece.tensor!r} is there, which the index names"
    expected = shape_of(piece, index.layouts[piece.shard])
    if stored.shape != expected:
        return f"{piece.tensor!r} has shape {stored.shape}, the index says {expected}"
    if stored.dtype not in FLOATS:
        return f"{piece.tensor!r} is {stored.dtype}, expected one of {', '.join(FLOATS)}"
    return ""


def _layout(folder: Path, hf_config: Path | None) -> str:
    _, shape, _ = open_source(folder, hf_config=hf_config)
    return check_layout(read_index(folder), shape)


def _weights(folder: Path, hf_config: Path | None) -> str:
    source, shape, model = open_source(folder, hf_config=hf_config)
    check_rows(source, shape, str(folder))
    stored_dtypes(source)
    if format_of(folder) == "hf":
        check_tied_head(model)
    _check_values(source)
    found = (
        f"every row of the {len(hf_tensors(shape))} tensors of a {shape.model_type} model with "
        f"{shape.num_parameters / 1e6:.2f}M parameters, in {len(source.layouts)} shards"
    )
    if format_of(folder) == "torch_dist" and not (folder / MANIFEST).is_file():
        return f"{found}; without {MANIFEST} there is no SHA-256 to hold the files against"
    return found


def _check_values(source: WeightSource, *, signed: bool = True) -> None:
    """Read all there is, tensor by tensor.

    Raises WeightError if a value is NaN or infinite, or below 0 and not `signed`.
    """
    problems = [
        f"{param} (shard {shard}) holds values that are {fault}"
        for shard, layouts in source.layouts.items()
        for param, layout in layouts.items()
        if (
            fault := _fault(
                source.rows(_copy(shard, param, layout, 0, layout.shape[layout.dim])), signed=signed
            )
        )
    ]
    if problems:
        raise WeightError("\n".join(problems))


def _fault(tensor: torch.Tensor, *, signed: bool) -> str:
    flat = tensor.reshape(-1)
    for part in (flat[at : at + AT_ONCE] for at in range(0, len(flat), AT_ONCE)):
        if not part.isfinite().all():
            return "NaN or infinite"
        if not signed and (part < 0).any():
            return "below 0, which no mean of squares is"
    return ""


def _training_state(folder: Path) -> Iterator[Check]:
    """A checkpoint of a step must have all that a run goes on from."""
    try:
        index, details = read_index(folder), read_details(folder)
    except (OsftError, OSError, ValueError):
        return  # Said before.
    kinds = {piece.kind for piece in index.pieces}
    if "step" in details or (folder / STATE).is_file() or kinds != {"weight"}:
        yield answer("training state", partial(_all_kinds, folder, index))


def _all_kinds(folder: Path, index: Index) -> str:
    there = {piece.kind for piece in index.pieces}
    source = CheckpointSource(folder, index)
    dtypes = {source.dtype(shard, name) for shard, at in source.layouts.items() for name in at}
    needed = [*MOMENTS, *(["master"] if dtypes != {torch.float32} else [])]
    problems = [f"no tensors of kind {kind} are there" for kind in needed if kind not in there]
    if not (folder / STATE).is_file():
        problems.append(f"no {STATE} is there")
    elif (step := training_state(folder)["step"]) != (named := read_details(folder).get("step")):
        problems.append(f"{STATE} is of step {step}, {MANIFEST} of step {named}")
    if problems:
        raise WeightError("\n".join(problems))
    return f"{STATE}, {', '.join(kind for kind in KINDS if kind in there)}"


def _optimizer(folder: Path, kind: Kind, hf_config: Path | None) -> Iterator[Check]:
    """What a training checkpoint holds beside the weights."""
    try:
        index = read_index(folder)
    except OsftError:
        return  # Said before.
    if any(piece.kind == kind for piece in index.pieces):
        yield answer(kind, partial(_rows_of_kind, folder, index, kind, hf_config))
        yield answer(f"copies of {kind}", partial(_copies, folder, kind))


def _rows_of_kind(folder: Path, index: Index, kind: Kind, hf_config: Path | None) -> str:
    _, shape, _ = open_source(folder, hf_config=hf_config)
    source = CheckpointSource(folder, index, kind)
    check_rows(source, shape, str(folder))
    _check_values(source, signed=kind != "exp_avg_sq")
    dtypes = set(stored_dtypes(source).values())
    if dtypes != {torch.float32}:
        names = ", ".join(sorted(str(dtype) for dtype in dtypes))
        raise WeightError(f"stored as {names}; training keeps them in torch.float32")
    if kind == "master":
        _check_master(source, CheckpointSource(folder, index))
        return "every row of every tensor; rounded, they are the weights"
    return "every row of every tensor"


def _check_master(master: WeightSource, weights: WeightSource) -> None:
    """A run goes on from the one in its first forward pass, from the other in its first update."""
    problems = []
    for shard, layouts in weights.layouts.items():
        for param, layout in layouts.items():
            copy = _copy(shard, param, layout, 0, layout.shape[layout.dim])
            stored = weights.rows(copy)
            if not torch.equal(master.rows(copy).to(stored.dtype), stored):
                problems.append(f"{param} (shard {shard}) is not the weight of that name, rounded")
    if problems:
        raise WeightError("\n".join(problems))


def _copies(folder: Path, kind: Kind) -> str:
    """Rows that several shards hold must be the same in all of them."""
    source = CheckpointSource(folder, read_index(folder), kind)
    holders: dict[Interval, list[Copy]] = defaultdict(list)
    for shard, layouts in source.layouts.items():
        for param, layout in layouts.items():
            for start, interval in layout.located():
                if interval.tensor is not None and interval.length:
                    holders[interval].append(_copy(shard, param, layout, start, interval.length))
    several = {interval: copies for interval, copies in holders.items() if len(copies) > 1}
    problems = [
        f"rows {interval.start}:{interval.stop} of {interval.tensor} differ between shards "
        f"{', '.join(str(copy.src_rank) for copy in copies)}"
        for interval, copies in several.items()
        if len({_digest(source, copy) for copy in copies}) > 1
    ]
    if problems:
        raise WeightError("\n".join(problems))
    return f"{len(several)} runs of rows that several shards hold are the same in all of them"


def _copy(shard: int, param: str, layout: Layout, start: int, length: int) -> Copy:
    return Copy(
        src_rank=shard,
        src_param=param,
        src_start=start,
        dst_rank=0,
        dst_param="",
        dst_start=0,
        length=length,
        dim=layout.dim,
        row_elements=layout.row_elements,
    )


def _digest(source: WeightSource, copy: Copy) -> bytes:
    return hashlib.sha256(bytes_of(source.rows(copy))).digest()


def _equal(folder: Path, hf_config: Path | None, hf: Path) -> str:
    """Compare all tensors with those of a Hugging Face folder."""
    source, shape, _ = open_source(folder, hf_config=hf_config)
    other = HfSource(hf)
    if other.shape != shape:
        raise WeightError(f"its config.json says {other.shape}, this one {shape}")
    layouts = hf_layouts(shape)
    dtypes = {name: other.dtype(0, name) for name in layouts}
    stored = stored_dtypes(source)
    problems = [
        f"{name} is {stored[name]}, there {dtypes[name]}"
        for name in layouts
        if stored[name] != dtypes[name]
    ]
    ours = filled(layouts, source.layouts, source.rows, dtype=stored.__getitem__)
    theirs = filled(layouts, other.layouts, other.rows, dtype=dtypes.__getitem__)
    for (name, mine), (_, expected) in zip(ours, theirs, strict=True):
        if mine.dtype == expected.dtype and not _same_bits(mine, expected):
            largest = (mine.double() - expected.double()).abs().max()
            problems.append(f"{name} differs, by {largest:.3g} at most")
    if problems:
        raise WeightError("\n".join(problems))
    return f"all {len(layouts)} tensors, bit by bit"


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
