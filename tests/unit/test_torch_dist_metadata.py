"""No file of a torch_dist checkpoint can run anything, crash the reader, or make it leave."""

import functools
import io
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch_dist_files import SHAPE, change, read, written

from osft_mcore.checkpoint.torch_dist_reader import TorchDistSource
from osft_mcore.errors import WeightError

KEY = "decoder.layers.self_attention.linear_proj.weight"
SHARD = "__0_0.distcp"


@pytest.fixture
def folder(tmp_path: Path, checkpoint: Path) -> Path:
    """A checkpoint to spoil."""
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("torch_dist") / "checkpoint"
    written(path)
    return path


class Call:
    """An object that is pickled as the call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def hostile_calls(mark: Path, file: Path) -> dict[str, tuple[Call, str]]:
    """Calls that would leave `mark` behind, and what each wants to import."""
    touch = f"import pathlib; pathlib.Path({str(mark)!r}).touch()"
    torch.save(Call(exec, touch), file)
    load_all = functools.partial(torch.load, weights_only=False)
    return {
        "os.system": (Call(os.system, f"touch {mark}"), "posix.system"),
        "eval": (Call(eval, f"exec({touch!r})"), "builtins.eval"),
        "exec": (Call(exec, touch), "builtins.exec"),
        "torch.load": (Call(load_all, str(file)), "functools.partial"),
        "getattr": (Call(mark.touch), "builtins.getattr"),
        "torch.save": (Call(torch.save, 0, str(mark)), "torch.serialization.save"),
    }


@pytest.mark.parametrize(
    "call", ["os.system", "eval", "exec", "torch.load", "getattr", "torch.save"]
)
@pytest.mark.parametrize("place", ["whole", "planner_data", "storage_data", "tensor"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_metadata_runs_nothing(
    folder: Path, tmp_path: Path, call: str, place: str, protocol: int
) -> None:
    mark = tmp_path / "mark"
    hostile, wanted = hostile_calls(mark, tmp_path / "pickle")[call]
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    if place == "tensor":
        metadata.state_dict_metadata[KEY].size = hostile
    elif place == "storage_data":
        metadata.storage_data[MetadataIndex(KEY)] = {"nested": [(hostile,)]}
    elif place == "planner_data":
        metadata.planner_data = hostile
    else:
        metadata = hostile
    content = pickle.dumps(metadata, protocol)
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(WeightError) as raised:
        TorchDistSource(folder, SHAPE)
    assert not mark.exists()
    message = str(raised.value)
    module = "__builtin__." + wanted.removeprefix("builtins.")
    assert wanted in message or (protocol == 2 and module in message)
    assert str(folder / ".metadata") in message
    assert "Nothing that it names was imported or run" in message
    pickle.loads(content)
    assert mark.exists(), "not hostile at all"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x04",
        b"\x80\x04.",
        b"\x80\x04N.",
        b"not a pickle",
        b"\x80\x04K\x01K\x02K\x03\x85.",
        b"cposix\nsystem\n(S'true'\ntR.",
        b"(S'true'\niposix\nsystem\n.",
        b"\x80\x02c__builtin__\neval\nU\x011\x85R.",
        b"\x80\x04\x8c\x04evil\x8c\x04name\x93.",
        b"\x80\x04N\x93.",
        b"Pname\n.",
        b"\x80\x04\x82\x01.",
        b"\x80\x04}" + b")" + b"\x85" * 200_000 + b"Ns.",
        b"\x80\x04Nr\xff\xff\xff\xf0.",
        b"\x80\x04\x8e" + b"\xff" * 8 + b".",
        b"\x80\x05\x96" + b"\xff" * 7 + b"\x7f.",
        b"\x80\x04" + b"(" * 100_000 + b"t" * 100_000 + b".",
        b"\x80\x04]\x94h\x00a.",
        b"\x80\x04ctorch\nSize\n]\x86R.",
        b"\x80\x04ctorch\nSize\nK\x01R.",
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81}b.",
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n}b.",
    ],
)
def test_no_pickle_crashes_the_reader(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    with pytest.raises(WeightError, match="is not the metadata of a torch_dist checkpoint"):
        TorchDistSource(folder, SHAPE)


def test_damaged_metadata_is_refused_or_read(folder: Path) -> None:
    """Cut off or changed anywhere, it raises nothing but WeightError."""
    content = (folder / ".metadata").read_bytes()
    draw = random.Random(0)
    spoilt = [content[: draw.randrange(len(content))] for _ in range(30)]
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(draw.choice([1, 1, 4, 30])):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        spoilt.append(bytes(changed))
    refused = 0
    for damaged in spoilt:
        (folder / ".metadata").write_bytes(damaged)
        try:
            read(folder)
        except WeightError:
            refused += 1
    assert 30 < refused < len(spoilt)


def tensor(metadata: Any) -> Any:
    return metadata.state_dict_metadata[KEY]


def place(metadata: Any) -> Any:
    chunk = tensor(metadata).chunks[0]
    return metadata.storage_data[MetadataIndex(KEY, chunk.offsets)]


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda m: vars(place(m)).update(relative_path="../secret.distcp"), "not a .distcp file"),
        (lambda m: vars(place(m)).update(relative_path="/etc/passwd"), "not a .distcp file"),
        (lambda m: vars(place(m)).update(relative_path=".."), "not a .distcp file"),
        (lambda m: vars(place(m)).update(relative_path="a\0.distcp"), "not a .distcp file"),
        (lambda m: vars(place(m)).update(relative_path=7), "not a .distcp file"),
        (lambda m: vars(place(m)).update(relative_path="other.distcp"), "which is not there"),
        (lambda m: vars(place(m)).update(offset=-1), "impossible place"),
        (lambda m: vars(place(m)).update(offset=1 << 70), "impossible place"),
        (lambda m: vars(place(m)).update(offset=1 << 40), "cut short"),
        (lambda m: vars(place(m)).update(length=1 << 40), "cut short"),
        (lambda m: vars(place(m)).update(length=10), "in 10 bytes"),
        (lambda m: vars(place(m)).update(length="all"), "impossible place"),
        (lambda m: vars(place(m)).update(transform_descriptors=["zstd"]), "compressed"),
        (lambda m: m.storage_data.clear(), "no place in a file"),
        (lambda m: vars(m).update(storage_data=[1]), "no storage_data"),
        (lambda m: vars(m).update(state_dict_metadata=None), "no state_dict_metadata"),
        (lambda m: vars(tensor(m)).update(size=torch.Size([3, 24, 1 << 50])), "do not cover"),
        (lambda m: vars(tensor(m)).update(size=torch.Size([2, 24, 288])), "at (2, 0, 0) of"),
        (lambda m: vars(tensor(m)).update(size=(3, 24, 288)), "not a torch.Size"),
        (lambda m: vars(tensor(m)).update(size=torch.Size([1] * 9)), "not a torch.Size"),
        (lambda m: vars(tensor(m)).update(chunks=None), "no list of"),
        (lambda m: vars(tensor(m)).update(chunks=[None] * 3), "other than a ChunkStorageMetadata"),
        (lambda m: vars(tensor(m)).update(properties=None), "without a dtype"),
        (lambda m: tensor(m).chunks.append(tensor(m).chunks[0]), "do not cover"),
        (lambda m: tensor(m).chunks.__setitem__(1, tensor(m).chunks[0]), "that overlap"),
        (lambda m: vars(tensor(m).properties).update(dtype=torch.int64), "is int64"),
        (
            lambda m: m.state_dict_metadata.update({KEY: BytesStorageMetadata()}),
            f"{KEY} is missing",
        ),
        (lambda m: m.state_dict_metadata.update({KEY: 5}), "other than a TensorStorageMetadata"),
    ],
)
def test_impossible_values_are_refused(
    folder: Path, edit: Callable[[Any], None], expected: str
) -> None:
    change(folder, edit)
    with pytest.raises(WeightError) as raised:
        TorchDistSource(folder, SHAPE)
    assert expected in str(raised.value)
    assert str(folder) in str(raised.value)


def replace_slice(folder: Path, content: bytes) -> None:
    """Put other bytes where the first chunk of a tensor is said to be."""
    end = (folder / SHARD).stat().st_size
    with (folder / SHARD).open("ab") as file:
        file.write(content)
    change(folder, lambda m: vars(place(m)).update(offset=end, length=len(content)))


def saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_a_slice_runs_nothing(folder: Path, tmp_path: Path, zipped: bool) -> None:
    mark = tmp_path / "mark"
    hostile = Call(os.system, f"touch {mark}")
    room = torch.zeros(24 * 288)
    content = saved([hostile, room]) if zipped else pickle.dumps([hostile, room])
    replace_slice(folder, content)
    with pytest.raises(WeightError) as raised:
        read(folder)
    assert not mark.exists()
    assert "cannot be read as a tensor" in str(raised.value)
    assert f"a chunk of {KEY}" in str(raised.value)
    assert str(folder / SHARD) in str(raised.value)


def large_meta_tensor() -> torch.Tensor:
    """Without values, but as many bytes in a file as one that has them."""
    value = torch.zeros(1, 24, 288, device="meta")
    value.ballast = torch.zeros(24 * 288)  # type: ignore[attr-defined]
    return value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (torch.zeros(1, 24, 289), "are not a tensor of shape"),
        (torch.zeros(1, 24, 288, dtype=torch.float64), "are not a tensor of shape"),
        (torch.zeros(288, 24), "are not a tensor of shape"),
        ([torch.zeros(1, 24, 288)], "are not a tensor of shape"),
        (torch.nn.Parameter(torch.zeros(1, 24, 288)), "are not a tensor of shape"),
        (torch.ones(1, 24, 288).to_sparse(), "are not a plain tensor"),
        (large_meta_tensor(), "are not a plain tensor"),
    ],
)
def test_a_slice_that_is_another_tensor_is_refused(folder: Path, value: Any, expected: str) -> None:
    replace_slice(folder, saved(value))
    with pytest.raises(WeightError, match=f"a chunk of {KEY}, {expected}"):
        read(folder)


def test_a_short_file_is_refused_before_anything_is_read(folder: Path) -> None:
    size = (folder / SHARD).stat().st_size
    os.truncate(folder / SHARD, size - 1)
    with pytest.raises(WeightError, match=f"{SHARD} has {size - 1} bytes.*cut short"):
        TorchDistSource(folder, SHAPE)


def test_a_changed_slice_is_refused(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[:] = bytes(len(content))
    (folder / SHARD).write_bytes(content)
    with pytest.raises(WeightError, match="cannot be read as a tensor"):
        read(folder)


def test_common_is_not_read(folder: Path) -> None:
    (folder / "common.pt").write_bytes(b"hostile")
    read(folder)


def test_a_huge_metadata_is_not_read(folder: Path) -> None:
    with (folder / ".metadata").open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(WeightError, match="expected at most"):
        TorchDistSource(folder, SHAPE)
