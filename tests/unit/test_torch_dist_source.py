"""What is written in Megatron-Core's format is read again, and says what is wrong with it."""

import gc
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assert_equal, megatron_reference, model, random_checkpoint
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex
from torch_dist_files import SHAPE, DictSource, change, read, written

from osft_mcore.checkpoint.torch_dist_reader import TorchDistSource, torch_dist_folder
from osft_mcore.checkpoint.torch_dist_writer import write_torch_dist
from osft_mcore.errors import WeightError
from osft_mcore.weights.fill import filled
from osft_mcore.weights.params import hf_layouts, megatron_layouts
from osft_mcore.weights.plan import Copy

CASES = [
    (model("qwen2", kv_heads=2), 2, 1),
    (model("qwen3", kv_heads=2, tied=True), 1, 3),
    (model("llama", kv_heads=1), 2, 2),
    (model("qwen2", kv_heads=4, tied=True), 4, 1),
]


@pytest.mark.parametrize(("shape", "tp", "pp"), CASES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_was_written_is_read(
    tmp_path: Path, shape: Any, tp: int, pp: int, dtype: torch.dtype | None
) -> None:
    notes: list[tuple[str, int]] = []
    names = written(
        tmp_path / "out",
        shape,
        tp=tp,
        pp=pp,
        dtype=dtype,
        note=lambda key, num_bytes: notes.append((key, num_bytes)),
    )
    tensors = random_checkpoint(shape)
    expected = {name: tensor.to(dtype or tensor.dtype) for name, tensor in tensors.items()}
    assert_equal(read(tmp_path / "out", shape), expected)
    shards = [f"__{shard}_0.distcp" for shard in range(tp * pp)]
    assert names == sorted([".metadata", *shards, "common.pt", "metadata.json"])
    assert names == sorted(path.name for path in (tmp_path / "out").iterdir())
    padding = -len(tensors["model.embed_tokens.weight"]) % 8 * shape.hidden
    num_elements = sum(tensor.numel() for tensor in tensors.values())
    num_elements += padding * (1 if shape.tied else 2)
    assert sum(count for _, count in notes) == num_elements * (2 if dtype else 4)


@pytest.mark.parametrize(("shape", "tp", "pp"), CASES)
def test_a_rank_of_another_layout_can_be_filled(
    tmp_path: Path, shape: Any, tp: int, pp: int
) -> None:
    written(tmp_path / "out", shape, tp=tp, pp=pp)
    source = TorchDistSource(tmp_path / "out", shape)
    for tp_rank in range(2):
        layouts = megatron_layouts(
            shape,
            tp=2,
            tp_rank=tp_rank,
            pp=3,
            pp_rank=2,
            vocab_padded=128,
            transformer_engine=False,
        )
        params = filled(layouts, source.layouts, source.rows, dtype=lambda _: torch.float32)
        expected = megatron_reference(
            shape, random_checkpoint(shape), tp=2, tp_rank=tp_rank, pp=3, pp_rank=2, padded=128
        )
        assert_equal(dict(params), expected)


def test_equal_weights_give_equal_files(tmp_path: Path) -> None:
    names = written(tmp_path / "one", tp=2)
    assert written(tmp_path / "other", tp=2) == names
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def bytes_in_tensors() -> int:
    tensors = (value for value in gc.get_objects() if type(value) is torch.Tensor)
    storages = (t.untyped_storage() for t in tensors if t.layout == torch.strided and t.is_cpu)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@pytest.fixture
def few_objects() -> Iterator[None]:
    """gc.get_objects() knows of what comes from now on: else most of it is imported modules."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("few_objects")
def test_one_parameter_is_in_memory_at_a_time(tmp_path: Path) -> None:
    tensors = random_checkpoint(SHAPE)
    before = bytes_in_tensors()
    assert before >= sum(tensor.nbytes for tensor in tensors.values())
    extra: list[int] = []
    written(
        tmp_path / "out",
        tensors=tensors,
        tp=2,
        note=lambda _key, _num_bytes: extra.append(bytes_in_tensors() - before),
    )
    largest = max(tensor.nbytes for tensor in tensors.values())
    assert 0 < max(extra) <= largest

    class Counting(TorchDistSource):
        def rows(self, copy: Copy) -> torch.Tensor:
            rows = super().rows(copy)
            extra.append(bytes_in_tensors() - before)
            return rows

    extra.clear()
    source = Counting(tmp_path / "out", SHAPE)
    layouts = hf_layouts(SHAPE)
    for _name, _tensor in filled(
        layouts, source.layouts, source.rows, dtype=lambda _: torch.float32
    ):
        pass
    # The one to fill, the rows for it, a chunk of the checkpoint, the one before.
    assert 0 < max(extra) <= 4 * largest


def test_only_engines_ask_for_the_states_of_all_modules(tmp_path: Path) -> None:
    shape = model("qwen3", kv_heads=2, num_layers=2)
    modules = {}
    for engine in (False, True):
        written(tmp_path / str(engine), shape, transformer_engine=engine)
        metadata = pickle.loads((tmp_path / str(engine) / ".metadata").read_bytes())
        states = [key.split("/") for key in metadata.state_dict_metadata if "/" in key]
        for name in {name for name, _ in states if ".layers." in name}:
            assert [place for key, place in states if key == name] == ["shard_0_2", "shard_1_2"]
        modules[engine] = {name.removesuffix("._extra_state") for name, _ in states}
    attention, mlp = "decoder.layers.self_attention.", "decoder.layers.mlp."
    linears = {f"{attention}linear_qkv", f"{attention}linear_proj"}
    linears |= {f"{mlp}linear_fc1", f"{mlp}linear_fc2"}
    norms = {f"{attention}q_layernorm", f"{attention}k_layernorm", "decoder.final_layernorm"}
    assert modules == {False: linears, True: linears | norms | {f"{attention}core_attention"}}


@pytest.mark.parametrize("sums", [True, False])
def test_archives_without_sums_are_read(tmp_path: Path, sums: bool) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(sums)
    try:
        written(tmp_path / "out")
    finally:
        torch.serialization.set_crc32_options(before)
    assert_equal(read(tmp_path / "out"), random_checkpoint(SHAPE))
    shard = tmp_path / "out" / "__0_0.distcp"
    mark = random_checkpoint(SHAPE)["model.norm.weight"].numpy().tobytes()
    content = bytearray(shard.read_bytes())
    content[content.index(mark)] ^= 1
    shard.write_bytes(content)
    if sums:
        with pytest.raises(WeightError, match="the CRC is another"):
            read(tmp_path / "out")
    else:
        read(tmp_path / "out")


def test_tensors_of_several_dtypes_need_a_choice(tmp_path: Path) -> None:
    tensors = random_checkpoint(SHAPE)
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].bfloat16()
    with pytest.raises(WeightError, match=r"(?s)mlp\.linear_fc2\.weight .*bfloat16.*--dtype"):
        written(tmp_path / "mixed", tensors=tensors)
    written(tmp_path / "chosen", tensors=tensors, dtype=torch.float32)
    assert_equal(read(tmp_path / "chosen"), {key: t.float() for key, t in tensors.items()})


def test_more_stages_than_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="pp is 4, but the model has 3 layers"):
        written(tmp_path / "out", pp=4)


def rename(metadata: Any, names: dict[str, str]) -> None:
    """Give tensors other keys; unlike a real checkpoint's, they keep their order."""
    entries = metadata.state_dict_metadata
    metadata.state_dict_metadata = {names.get(key, key): entry for key, entry in entries.items()}
    metadata.storage_data = {
        MetadataIndex(names.get(index.fqn, index.fqn), index.offset): place
        for index, place in metadata.storage_data.items()
    }


@pytest.mark.parametrize("prefix", ["module.", "model."])
def test_keys_may_have_the_name_of_a_wrapper(tmp_path: Path, prefix: str) -> None:
    folder = tmp_path / "out"
    written(folder)
    change(folder, lambda m: rename(m, {key: prefix + key for key in m.state_dict_metadata}))
    assert_equal(read(folder), random_checkpoint(SHAPE))


def test_keys_may_be_those_of_the_local_spec(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written(folder)
    layer = "decoder.layers."
    names = {
        f"{layer}self_attention.linear_qkv.layer_norm_weight": f"{layer}input_layernorm.weight",
        f"{layer}mlp.linear_fc1.layer_norm_weight": f"{layer}pre_mlp_layernorm.weight",
    }
    change(folder, lambda m: rename(m, names))
    assert b"layer_norm_weight" not in (folder / ".metadata").read_bytes()
    assert_equal(read(folder), random_checkpoint(SHAPE))


def test_what_is_not_the_model_is_passed_over(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written(folder)

    def edit(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        for key in ("optimizer.state.exp_avg.x", "chained_0.optimizer.state.fp32_param.x"):
            entries[key] = entries["decoder.final_layernorm.weight"]
        for key in ("rng_state/shard_0.0_1.1", "optimizer.param_groups/shard_0_1"):
            entries[key] = BytesStorageMetadata()

    change(folder, edit)
    assert_equal(read(folder), random_checkpoint(SHAPE))


def test_all_that_does_not_fit_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written(folder)

    def edit(metadata: Any) -> None:
        entries = metadata.state_dict_metadata
        del entries["decoder.layers.mlp.linear_fc2.weight"]
        entries["decoder.layers.mlp.router.weight"] = entries["decoder.final_layernorm.weight"]
        metadata.storage_data[MetadataIndex("decoder.layers.mlp.router.weight", [0])] = (
            metadata.storage_data[MetadataIndex("decoder.final_layernorm.weight", [0])]
        )
        entries["decoder.layers.mlp.experts/shard_0_1"] = BytesStorageMetadata()

    change(folder, edit)
    with pytest.raises(WeightError) as raised:
        TorchDistSource(folder, model("qwen3", kv_heads=2))
    found = {line.removeprefix(f"{folder}: ") for line in str(raised.value).splitlines()}
    kind = "is unexpected in a model of type qwen3"
    assert found == {
        "decoder.layers.mlp.linear_fc2.weight is missing",
        "decoder.layers.self_attention.q_layernorm.weight is missing",
        "decoder.layers.self_attention.k_layernorm.weight is missing",
        f"'decoder.layers.mlp.experts/shard_0_1' {kind}",
        f"'decoder.layers.mlp.router.weight' {kind}",
        f"'decoder.layers.self_attention.linear_qkv.bias' {kind}",
    }


def test_another_shape_is_reported(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written(folder)
    with pytest.raises(WeightError) as raised:
        TorchDistSource(folder, model("qwen2", kv_heads=2, num_layers=2))
    assert "linear_proj.weight has shape (3, 24, 288), expected (2, 24, 288)" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 7


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_must_be_as_the_config_says(tmp_path: Path, tied: bool) -> None:
    folder = tmp_path / "out"
    written(folder, model("qwen2", kv_heads=2, tied=tied))
    problem = "output_layer.weight is missing" if tied else "'output_layer.weight' is unexpected"
    with pytest.raises(WeightError, match=problem):
        TorchDistSource(folder, model("qwen2", kv_heads=2, tied=not tied))


def test_a_vocabulary_may_be_padded_to_any_size_but_not_cut(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    written(folder, vocab_multiple=1000)
    assert_equal(read(folder), random_checkpoint(SHAPE))
    small = tmp_path / "small"
    written(small, vocab_multiple=1)

    def edit(metadata: Any) -> None:
        for key in ("embedding.word_embeddings.weight", "output_layer.weight"):
            entry = metadata.state_dict_metadata[key]
            entry.size = entry.chunks[0].sizes = torch.Size([100, 24])

    change(small, edit)
    with pytest.raises(WeightError, match=r"has shape \(100, 24\), expected \(101, 24\)"):
        TorchDistSource(small, SHAPE)


@pytest.mark.parametrize(
    ("latest", "name"), [("120", "iter_0000120"), ("release\n", "release"), (None, ".")]
)
def test_the_tracker_file_names_the_latest(tmp_path: Path, latest: str | None, name: str) -> None:
    root = tmp_path / "root"
    if latest is not None:
        root.mkdir()
        (root / "latest_checkpointed_iteration.txt").write_text(latest)
    written(root / name)
    assert torch_dist_folder(root) == root / name
    assert_equal(read(root), random_checkpoint(SHAPE))


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=r"no \.metadata is there"):
        TorchDistSource(tmp_path, SHAPE)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(WeightError, match=r"found '\.\./\.\./etc', expected a number or"):
        TorchDistSource(tmp_path, SHAPE)
    written(tmp_path / "out")
    (tmp_path / "out" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    with pytest.raises(WeightError, match="found format 'zarr', expected 'torch_dist'"):
        TorchDistSource(tmp_path / "out", SHAPE)


def test_nothing_is_written_for_a_source_that_lacks_rows(tmp_path: Path) -> None:
    tensors = random_checkpoint(SHAPE)
    source = DictSource(SHAPE, tensors)
    source.layouts = {
        0: {name: at for name, at in source.layouts[0].items() if "o_proj" not in name}
    }
    with pytest.raises(WeightError, match="o_proj"):
        write_torch_dist(
            tmp_path,
            source,
            SHAPE,
            tp=1,
            pp=1,
            vocab_multiple=1,
            dtype=None,
            transformer_engine=True,
            note=lambda _key, _num_bytes: None,
        )
    assert list(tmp_path.iterdir()) == []
