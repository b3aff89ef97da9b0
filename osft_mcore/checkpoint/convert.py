"""Conversions between Hugging Face folders and Megatron layouts, one tensor at a time."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import torch

from osft_mcore import __version__
from osft_mcore.checkpoint.assemble import (
    Watched,
    layout_problems,
    megatron_shards,
    shard_pieces,
    shard_specs,
    values,
    write_as_torch_dist,
    write_contents,
    write_parts,
)
from osft_mcore.checkpoint.dtypes import stored_dtypes, target_dtypes, uniform
from osft_mcore.checkpoint.formats import MODEL, Opened, open_checkpoint, training_state
from osft_mcore.checkpoint.index import INDEX, Index, to_json
from osft_mcore.checkpoint.manifest import MANIFEST
from osft_mcore.checkpoint.model_card import model_card, read_provenance
from osft_mcore.checkpoint.save import Part, part_name
from osft_mcore.checkpoint.staging import fingerprint, staging, target_problems
from osft_mcore.checkpoint.torch_dist_writer import planned
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.errors import ConfigError, OsftError
from osft_mcore.files import json_bytes, record_of
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.hf_writer import HfFile, hf_files, hf_index
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import hf_layouts
from osft_mcore.weights.safetensors_io import INDEX as HF_INDEX
from osft_mcore.weights.safetensors_io import HfSource, check_tied_head
from osft_mcore.weights.side_files import CARD, CONFIG, read_side_files, side_files
from osft_mcore.weights.source import WeightSource

Target = Literal["safetensors", "torch_dist"]
"""This package's own format, or Megatron-Core's."""
CHECKPOINTS: Final = "checkpoints"
"""Of a run: the folder with its checkpoints."""
NUM_NAMED: Final = 8
"""Tensors that a warning names; the rest is counted."""


def hf_to_mcore(
    hf: Path,
    out: Path,
    *,
    topology: Topology,
    vocab_multiple: int,
    dtype: torch.dtype | None,
    target: Target,
    console: Console,
) -> None:
    """Write the Hugging Face folder `hf` as a checkpoint at `topology` (dp 1).

    Raises OsftError with all that is wrong; nothing is written then, or what is complete stays in
    OUT.tmp for the same call to go on from (torch_dist: to start anew).
    """
    problems = target_problems(out)
    if target == "torch_dist" and topology.vpp > 1:
        problems.append("--vpp: a torch_dist checkpoint has no model chunks; leave it out")
    try:
        problems += layout_problems(read_model_shape(hf), topology, vocab_multiple)
        source = HfSource(hf)
        check_tied_head(hf)
        shards: dict[int, Mapping[str, Layout]] = {}
        if not problems:
            shards = megatron_shards(
                source.shape, topology, vocab_multiple=vocab_multiple, transformer_engine=False
            )
        dtypes = target_dtypes(shards, stored_dtypes(source), dtype)
        if target == "torch_dist" and not problems:
            _check_torch_dist(source, topology, vocab_multiple, dtype)
    except OsftError as error:
        raise joined(problems, error, option="--hf") from None
    if problems:
        raise ConfigError(problems)
    job = {
        "conversion": f"hf to {target}",
        **_options(dtype, source=fingerprint(_files_of(hf, source))),
        **topology.actor_sizes(),
        "vocab_multiple": vocab_multiple,
    }
    watched = Watched(source, source.shape, dtype)
    with staging(out, job) as opened:
        say_found(opened.found, console)
        if target == "torch_dist":
            write_as_torch_dist(
                opened, watched, topology, vocab_multiple=vocab_multiple, console=console
            )
        else:
            write_parts(opened, _shard_parts(shards, dtypes, watched), console)
            write_contents(opened, {INDEX: json_bytes(to_json(_index(shards, topology)))})
        contents = read_side_files(hf, dtype=dtype)
        write_contents(opened, {f"{MODEL}/{name}": text for name, text in contents.items()})
        opened.publish({"converted_from": str(hf.resolve())})
    say_carried(hf, contents, console)
    say_broken(watched.broken, opened.found, console)


def mcore_to_hf(
    mcore: Path,
    out: Path,
    *,
    hf_config: Path | None,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    hashes: bool,
    console: Console,
) -> None:
    """Write the weights of the checkpoint `mcore` as a Hugging Face folder.

    `hashes`: hold every file against the manifest first. Errors as in `hf_to_mcore`.
    """
    problems = target_problems(out)
    if max_shard_bytes < 1:
        problems.append("--max-shard-gib: expected more than 0")
    try:
        found = open_checkpoint(mcore, hf_config=hf_config, hashes=hashes)
        targets = {0: hf_layouts(found.shape)}
        dtypes = target_dtypes(targets, stored_dtypes(found.source), dtype)[0]
    except OsftError as error:
        raise joined(problems, error, option="--hf-config") from None
    if problems:
        raise ConfigError(problems)
    files = hf_files(found.shape, dtypes, max_shard_bytes=max_shard_bytes)
    job = {
        "conversion": "mcore to hf",
        **_options(dtype, source=checkpoint_fingerprint(mcore)),
        "model": fingerprint(side_files(found.model).carried.values()),
        "max_shard_bytes": max_shard_bytes,
    }
    watched = Watched(found.source, found.shape, dtype)
    with staging(out, job) as opened:
        say_found(opened.found, console)
        write_parts(opened, [_hf_part(at, targets[0], dtypes, watched) for at in files], console)
        contents = _hf_contents(found, uniform(dtypes), name=out.name)
        write_contents(opened, contents)
        if len(files) > 1:
            write_contents(opened, {HF_INDEX: json_bytes(hf_index(files))})
        opened.publish({"converted_from": str(mcore.resolve())})
    say_carried(found.model, contents, console)
    say_broken(watched.broken, opened.found, console)


def shard_bytes(gib: float) -> int:
    """What --max-shard-gib is in bytes. Raises ConfigError if it is no number above 0."""
    size = gib * 2**30
    if not math.isfinite(size) or size < 1:
        raise ConfigError(f"--max-shard-gib: found {gib}, expected a number above 0")
    return int(size)


def joined(problems: Sequence[str], error: OsftError, *, option: str) -> OsftError:
    """`error`, with the problems that were found before it; `option` names the model folder."""
    lines = error.problems if isinstance(error, ConfigError) else str(error).splitlines()
    lines = tuple(line.replace("model.path: ", f"{option}: ") for line in lines)
    if problems or isinstance(error, ConfigError):
        return ConfigError([*problems, *lines])
    return type(error)("\n".join(lines))


def checkpoint_fingerprint(folder: Path) -> str:
    """Changes when the checkpoint does; its manifest knows all files by their hashes."""
    if (folder / MANIFEST).is_file():
        return record_of(folder / MANIFEST).sha256
    return fingerprint(path for path in folder.rglob("*") if path.is_file())


def say_found(names: Sequence[str], console: Console) -> None:
    """What an interrupted conversion had completed."""
    if names:
        console.say(f"going on with {len(names)} complete files of an interrupted conversion")


def say_carried(folder: Path, contents: Mapping[str, bytes], console: Console) -> None:
    """Which files went along beside the weights, and which did not."""
    console.say(f"carried along: {', '.join(sorted(contents))}")
    for name, reason in side_files(folder).left_out.items():
        console.say(f"left out: {name} ({reason})")


def say_broken(tensors: Sequence[str], found: Sequence[str], console: Console) -> None:
    """Which tensors were written with NaN or infinity; `found` as in `say_found`."""
    if found:
        console.say(
            "not looked at for NaN and infinity: the files that were complete before; "
            "tools/verify_checkpoint.py looks at them"
        )
    if tensors:
        named = ", ".join(tensors[:NUM_NAMED])
        more = f" and {len(tensors) - NUM_NAMED} more" if len(tensors) > NUM_NAMED else ""
        console.say(f"WARNING: written with values that are NaN or infinite: {named}{more}")


def _check_torch_dist(
    source: HfSource, topology: Topology, vocab_multiple: int, dtype: torch.dtype | None
) -> None:
    """Raise WeightError if that format cannot hold the model so."""
    planned(
        source,
        source.shape,
        tp=topology.tp,
        pp=topology.pp,
        vocab_multiple=vocab_multiple,
        dtype=dtype,
    )


def _index(shards: Mapping[int, Mapping[str, Layout]], topology: Topology) -> Index:
    pieces = [p for shard, at in shards.items() for p in shard_pieces(shard, "weight", at)]
    return Index(topology=topology.actor_sizes(), layouts=shards, pieces=tuple(pieces))


def _options(dtype: torch.dtype | None, *, source: str) -> dict[str, Any]:
    return {
        "source": source,
        "dtype": "as stored" if dtype is None else str(dtype),
        "version": __version__,
    }


def _files_of(hf: Path, source: HfSource) -> list[Path]:
    others = [path for path in (hf / CONFIG, hf / HF_INDEX) if path.is_file()]
    return [*source.files, *others, *side_files(hf).carried.values()]


def _shard_parts(
    shards: Mapping[int, Mapping[str, Layout]],
    dtypes: Mapping[int, Mapping[str, torch.dtype]],
    source: WeightSource,
) -> list[Part]:
    return [
        Part(
            file=part_name(shard),
            specs=shard_specs(shard, "weight", layouts, dtypes[shard]),
            tensors=partial(values, layouts, dtypes[shard], source),
        )
        for shard, layouts in shards.items()
    ]


def _hf_part(
    file: HfFile,
    layouts: Mapping[str, Layout],
    dtypes: Mapping[str, torch.dtype],
    source: WeightSource,
) -> Part:
    here = {spec.name: layouts[spec.name] for spec in file.specs}
    return Part(file=file.name, specs=file.specs, tensors=partial(values, here, dtypes, source))


def _hf_contents(found: Opened, dtype: torch.dtype | None, *, name: str) -> dict[str, bytes]:
    """The side files; with a card of its own if the model was trained by a run."""
    state = training_state(found.folder)
    contents = read_side_files(found.model, dtype=dtype, derived=bool(state))
    if state:
        root = found.folder.resolve().parent
        run = root.parent if root.name == CHECKPOINTS else None
        provenance = read_provenance(run, step=int(state["step"]), checkpoint=found.folder)
        contents[CARD] = model_card(provenance, name=name).encode()
    return contents
