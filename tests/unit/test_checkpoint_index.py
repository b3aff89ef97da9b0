"""The index of a checkpoint: what it says is checked, and rows are found by it."""

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assert_equal, materialise, megatron_reference, model, random_checkpoint

from osft_mcore.checkpoint.index import INDEX, Index, Piece, from_json, to_json
from osft_mcore.checkpoint.source import CheckpointSource, read_index
from osft_mcore.errors import WeightError
from osft_mcore.files import json_bytes
from osft_mcore.weights.fill import filled
from osft_mcore.weights.params import megatron_layouts
from osft_mcore.weights.safetensors_stream import TensorSpec, write_safetensors

SHAPE = model(kv_heads=2)
VOCAB_PADDED = 128


def shards(tp: int, pp: int) -> dict[int, Any]:
    return {
        p * tp + t: megatron_layouts(
            SHAPE, tp=tp, tp_rank=t, pp=pp, pp_rank=p, vocab_padded=VOCAB_PADDED,
            transformer_engine=False,
        )
        for p in range(pp)
        for t in range(tp)
    }  # fmt: skip


def index_of(tp: int, pp: int, num_parts: int) -> Index:
    """Every parameter in `num_parts` files, cut anywhere, as data-parallel ranks have it."""
    layouts = shards(tp, pp)
    pieces = []
    for shard, params in layouts.items():
        for name, layout in params.items():
            size = prod(layout.shape)
            cuts = [0, *sorted({size * part // num_parts for part in range(1, num_parts)}), size]
            pieces += [
                Piece(
                    file=f"part_{part}_{shard}.safetensors", kind="weight", shard=shard,
                    param=name, start=start, stop=stop,
                )
                for part, (start, stop) in enumerate(pairwise(cuts))
                if start < stop
            ]  # fmt: skip
    return Index(
        topology={"tp": tp, "pp": pp, "vpp": 1, "dp": num_parts},
        layouts=layouts,
        pieces=tuple(pieces),
    )


def write(folder: Path, index: Index, tensors: dict[str, torch.Tensor]) -> None:
    files: dict[str, list[tuple[TensorSpec, torch.Tensor]]] = {}
    for piece in index.pieces:
        layout = index.layouts[piece.shard][piece.param]
        values = materialise(layout, tensors)
        part = values.reshape(-1)[piece.start : piece.stop]
        if part.numel() == values.numel():
            part = values
        spec = TensorSpec(piece.tensor, part.dtype, tuple(part.shape))
        files.setdefault(piece.file, []).append((spec, part))
    for name, held in files.items():
        write_safetensors(folder / name, [s for s, _ in held], [tensor for _, tensor in held])
    (folder / INDEX).write_bytes(json_bytes(to_json(index)))


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("written", [(1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("read", [(1, 1), (1, 3), (2, 2)])
def test_any_layout_is_read_from_any_other(
    tmp_path: Path, written: tuple[int, int], read: tuple[int, int], num_parts: int
) -> None:
    checkpoint = random_checkpoint(SHAPE)
    write(tmp_path, index_of(*written, num_parts), checkpoint)
    source = CheckpointSource(tmp_path, read_index(tmp_path))
    tp, pp = read
    for shard, layouts in shards(tp, pp).items():
        found = dict(
            filled(layouts, source.layouts, source.rows, dtype=lambda _name: torch.float32)
        )
        expected = megatron_reference(
            SHAPE, checkpoint, tp=tp, tp_rank=shard % tp, pp=pp, pp_rank=shard // tp,
            padded=VOCAB_PADDED,
        )  # fmt: skip
        assert_equal(found, expected)


def test_the_index_comes_back_from_json() -> None:
    index = index_of(2, 2, 3)
    again = from_json(json.loads(json.dumps(to_json(index))), Path("x"))
    assert (again.topology, again.layouts) == (index.topology, index.layouts)
    assert len(again.pieces) == len(index.pieces)
    assert set(again.pieces) == set(index.pieces)


def change(path: tuple[Any, ...], value: Any) -> Callable[[Any], None]:
    def apply(content: Any) -> None:
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = value

    return apply


FILE = "part_0_0.safetensors"
DAMAGES = {
    "another format": (change(("format",), "something 2"), "found format 'something 2'"),
    "no layouts": (change(("parameters",), None), "is not the index of a checkpoint"),
    "a file elsewhere": (
        lambda c: c["files"].update({"../secret": c["files"].pop(FILE)}),
        "impossible entry",
    ),
    "an unknown kind": (change(("files", FILE, 0, "kind"), "code"), "impossible entry"),
    "elements beyond": (change(("files", FILE, 0, "elements"), [0, 10**9]), "impossible entry"),
    "an unknown parameter": (change(("files", FILE, 0, "param"), "x"), "not the index"),
    "negative rows": (
        change(("parameters", "0", "embedding.word_embeddings.weight", "intervals", 0, 1), -5),
        "negative sizes",
    ),
    "rows that do not fill the shape": (
        change(("parameters", "0", "embedding.word_embeddings.weight", "intervals"), []),
        "cannot hold 0 rows",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_index_is_refused(damage: str) -> None:
    content = copy.deepcopy(to_json(index_of(1, 1, 1)))
    apply, expected = DAMAGES[damage]
    apply(content)
    with pytest.raises(WeightError, match=expected):
        from_json(content, Path("index.json"))


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    index = index_of(1, 1, 3)
    gone = next(p for p in index.pieces if p.param == "output_layer.weight" and p.start > 0)
    pieces = tuple(piece for piece in index.pieces if piece != gone)
    with pytest.raises(WeightError, match=r"weight of 'output_layer\.weight' \(shard 0\)"):
        CheckpointSource(
            tmp_path, Index(topology=index.topology, layouts=index.layouts, pieces=pieces)
        )
    with pytest.raises(WeightError, match="holds no tensors of kind 'exp_avg'"):
        CheckpointSource(tmp_path, index, "exp_avg")


def test_a_tensor_that_is_not_in_its_file_is_named(tmp_path: Path) -> None:
    index = index_of(1, 1, 1)
    write(tmp_path, index, random_checkpoint(SHAPE))
    [file] = {piece.file for piece in index.pieces}
    write_safetensors(tmp_path / file, [TensorSpec("a", torch.float32, (1,))], [torch.zeros(1)])
    source = CheckpointSource(tmp_path, index)
    with pytest.raises(WeightError, match="holds no 'weight/0/"):
        dict(filled(index.layouts[0], source.layouts, source.rows, dtype=lambda _: torch.float32))
