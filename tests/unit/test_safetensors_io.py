"""Reading and writing Hugging Face folders, against transformers and the safetensors library."""

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from layouts import Tensors, assert_equal, materialise, model, random_checkpoint
from models import save_random_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from osft_mcore.config.model_shape import ModelShape, read_model_shape
from osft_mcore.errors import WeightError
from osft_mcore.files import FileRecord, record_of
from osft_mcore.weights.fill import random_into
from osft_mcore.weights.hf_writer import save_hf
from osft_mcore.weights.layout import Layout
from osft_mcore.weights.params import hf_layouts, hf_tensors, megatron_layouts, vllm_layouts
from osft_mcore.weights.safetensors_io import INDEX, SINGLE, load_into, read_hf_index
from osft_mcore.weights.safetensors_read import read_header, read_rows


def empty_params(layouts: dict[str, Layout], dtype: torch.dtype = torch.float32) -> Tensors:
    return {name: torch.full(at.shape, torch.nan, dtype=dtype) for name, at in layouts.items()}


def megatron_ranks(shape: ModelShape, tp: int, pp: int) -> Iterator[dict[str, Layout]]:
    for tp_rank, pp_rank in itertools.product(range(tp), range(pp)):
        yield megatron_layouts(
            shape,
            tp=tp,
            tp_rank=tp_rank,
            pp=pp,
            pp_rank=pp_rank,
            vocab_padded=128 * tp,
            transformer_engine=False,
        )


def save(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    shape: ModelShape,
    max_shard_bytes: int = 10**9,
) -> dict[str, FileRecord]:
    return save_hf(
        folder, tensors, shape=shape, dtype=torch.float32, max_shard_bytes=max_shard_bytes
    )


def checkpoint_of(folder: Path) -> Tensors:
    return {
        name: param.detach()
        for name, param in AutoModelForCausalLM.from_pretrained(folder).named_parameters()
    }


@pytest.mark.parametrize(("kind", "tied"), [("qwen2", True), ("qwen3", False), ("llama", False)])
def test_a_folder_written_by_transformers_loads_into_every_layout(
    tmp_path: Path, kind: str, tied: bool
) -> None:
    folder = save_random_model(tmp_path, kind, tied=tied)
    shape = read_model_shape(folder)
    checkpoint = checkpoint_of(folder)
    for tp, pp in ((1, 1), (2, 1), (2, 2), (4, 1)):
        for layouts in megatron_ranks(shape, tp, pp):
            params = empty_params(layouts)
            load_into(params, layouts, folder)
            assert_equal(params, {n: materialise(at, checkpoint) for n, at in layouts.items()})


def test_values_are_cast_to_the_parameters_dtype(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "qwen2", dtype=torch.float32)
    layouts = hf_layouts(read_model_shape(folder))
    params = empty_params(layouts, torch.bfloat16)
    load_into(params, layouts, folder)
    assert_equal(params, {n: t.to(torch.bfloat16) for n, t in checkpoint_of(folder).items()})


@pytest.mark.parametrize("max_shard_bytes", [10**9, 20_000, 1])
def test_a_saved_folder_is_loaded_by_transformers(tmp_path: Path, max_shard_bytes: int) -> None:
    source = save_random_model(tmp_path / "source", "qwen2")
    checkpoint = checkpoint_of(source)
    shape = read_model_shape(source)
    folder = tmp_path / "saved"
    in_order = ((name, checkpoint[name]) for name in hf_tensors(shape))
    records = save(folder, in_order, shape, max_shard_bytes)
    assert records == {path.name: record_of(path) for path in folder.iterdir()}
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    assert_equal(checkpoint_of(folder), checkpoint)
    files = sorted(folder.glob("*.safetensors"))
    sizes = [sum(t.nbytes for t in load_file(path).values()) for path in files]
    largest = max(t.nbytes for t in checkpoint.values())
    assert all(size <= max(max_shard_bytes, largest) for size in sizes)
    assert all(a + b > max_shard_bytes for a, b in itertools.pairwise(sizes)), "no more than needed"
    if max_shard_bytes == 10**9:
        assert [path.name for path in files] == [SINGLE]
    elif max_shard_bytes == 1:
        assert len(files) == len(checkpoint)
        total = json.loads((folder / INDEX).read_text())["metadata"]["total_size"]
        assert total == sum(t.nbytes for t in checkpoint.values())
    assert not list(folder.glob(".*"))
    params = empty_params(hf_layouts(shape))
    load_into(params, hf_layouts(shape), folder)
    assert_equal(params, checkpoint)


def test_a_producer_may_reuse_its_buffer(tmp_path: Path) -> None:
    shape = model("llama")
    checkpoint = random_checkpoint(shape)
    buffer = torch.empty(max(t.numel() for t in checkpoint.values()))

    def through_one_buffer() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in checkpoint.items():
            view = buffer[: tensor.numel()].view(tensor.shape)
            yield name, view.copy_(tensor)

    save(tmp_path, through_one_buffer(), shape)
    assert_equal(load_file(tmp_path / SINGLE), checkpoint)


def test_an_interrupted_save_leaves_the_earlier_weights(tmp_path: Path) -> None:
    shape = model("llama")
    checkpoint = random_checkpoint(shape)
    save(tmp_path, checkpoint.items(), shape)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    names = list(checkpoint)

    def dies() -> Iterator[tuple[str, Tensor]]:
        for name in names[:8]:
            yield name, torch.zeros_like(checkpoint[name])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, dies(), shape, 1)
    incomplete = ((name, checkpoint[name]) for name in names[:-2])
    with pytest.raises(WeightError, match=rf"no tensor came for {names[-2]}, nor for any after"):
        save(tmp_path, incomplete, shape, 1)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_later_save_replaces_all_files_of_an_earlier_one(tmp_path: Path) -> None:
    shape = model("llama")
    checkpoint = random_checkpoint(shape)
    save(tmp_path, checkpoint.items(), shape, 1)
    save(tmp_path, checkpoint.items(), shape)
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


FIRST = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({FIRST: torch.zeros(23, 24)}, r"of shape \(23, 24\), announced as"),
        ({FIRST: torch.zeros(101, 24, dtype=torch.float16)}, r"float16 .* announced as"),
        ({FIRST: None, "other": torch.zeros(1)}, rf"'other' came where '{FIRST}' was due"),
        ({"more": torch.zeros(1)}, "'more' came, which the model does not have"),
    ],
)
def test_a_tensor_that_is_not_of_the_model_is_not_saved(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    shape = model("llama")
    tensors = {FIRST: torch.zeros(1), **random_checkpoint(shape)} | changes
    if "other" in changes:
        tensors = {"other": changes["other"], **tensors}
    given = [(name, tensor) for name, tensor in tensors.items() if tensor is not None]
    with pytest.raises(WeightError, match=message):
        save(tmp_path, given, shape)
    assert list(tmp_path.iterdir()) == []


def rewrite(folder: Path, **changes: Tensor | None) -> None:
    """Change tensors of a single-file folder; None drops one."""
    tensors = load_file(folder / SINGLE)
    for name, tensor in changes.items():
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})


def test_everything_wrong_with_a_folder_is_reported_at_once(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "qwen3")
    changes = {
        "model.norm.weight": None,
        "model.layers.1.mlp.up_proj.weight": torch.zeros(5, 64),
        "model.layers.0.self_attn.k_norm.weight": torch.zeros(32, dtype=torch.int8),
        "model.layers.2.mlp.up_proj.weight": torch.zeros(1),
    }
    rewrite(folder, **changes)
    with pytest.raises(WeightError) as caught:
        read_hf_index(folder)
    lines = [line.removeprefix(f"{folder}: ") for line in str(caught.value).splitlines()]
    assert lines == [
        "model.norm.weight is missing",
        "model.layers.2.mlp.up_proj.weight is unexpected in a model of type qwen3",
        "model.layers.0.self_attn.k_norm.weight is I8; expected one of BF16, F16, F32, F64: "
        "quantised checkpoints cannot be trained",
        "model.layers.1.mlp.up_proj.weight has shape (5, 64), config.json asks for (96, 64)",
    ]


def test_what_nothing_reads_may_be_there(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "llama", tied=True)
    extra = {
        "lm_head.weight": torch.zeros(67, 64),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(16),
    }
    rewrite(folder, **extra)
    assert set(read_hf_index(folder)) == set(hf_tensors(read_model_shape(folder)))
    untied = save_random_model(tmp_path / "untied", "llama", tied=False)
    rewrite(untied, **{"lm_head.weight": None})
    with pytest.raises(WeightError, match=r"lm_head\.weight is missing"):
        read_hf_index(untied)


def test_damaged_folders_are_refused_by_file(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "llama")
    single = folder / SINGLE
    complete = single.read_bytes()
    single.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(WeightError, match=r"model\.safetensors is not a complete safetensors file"):
        read_hf_index(folder)
    single.unlink()
    with pytest.raises(WeightError, match=r"neither .* is there; expected a Hugging Face folder"):
        read_hf_index(folder)
    index = folder / INDEX
    names = hf_tensors(read_model_shape(folder))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "gone.safetensors")}))
    with pytest.raises(WeightError, match=r"names gone\.safetensors, which is not there"):
        read_hf_index(folder)
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../x.safetensors")}))
    with pytest.raises(WeightError, match="must name files of the same folder"):
        read_hf_index(folder)
    elsewhere = save_random_model(tmp_path / "elsewhere", "llama")
    weight_map = dict.fromkeys(names, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    for file in ("a.safetensors", "b.safetensors", SINGLE):
        (elsewhere / file).write_bytes(complete)
    (elsewhere / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightError) as caught:
        read_hf_index(elsewhere)
    assert "both model.safetensors and model.safetensors.index.json are there" in str(caught.value)
    assert "model.norm.weight is in a.safetensors, but" in str(caught.value)
    index.write_text("{")
    with pytest.raises(WeightError, match="not a safetensors index"):
        read_hf_index(folder)


def test_parameters_must_be_those_of_the_layouts(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path, "llama")
    layouts = hf_layouts(read_model_shape(folder))
    params = empty_params(layouts)
    del params["model.norm.weight"]
    params["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3)
    params["extra"] = torch.zeros(3)
    with pytest.raises(WeightError) as caught:
        load_into(params, layouts, folder)
    assert str(caught.value).splitlines() == [
        "target parameter 'model.norm.weight' is missing",
        "target parameter 'model.layers.0.mlp.up_proj.weight' has shape (3,), its layout says "
        "(96, 64)",
        "target parameter 'extra' has no layout: it would be left as it is",
    ]


def test_random_weights_do_not_depend_on_the_layout() -> None:
    shape = model("qwen2", kv_heads=2, tied=True)
    whole = empty_params(hf_layouts(shape))
    random_into(whole, hf_layouts(shape), shape, seed=7)
    ranks = [*megatron_ranks(shape, 4, 2), vllm_layouts(shape, tp=2, tp_rank=1, vocab_padded=128)]
    for layouts in ranks:
        params = empty_params(layouts)
        random_into(params, layouts, shape, seed=7)
        assert_equal(params, {n: materialise(at, whole) for n, at in layouts.items()})


def test_random_weights_are_what_training_starts_from() -> None:
    shape = model("qwen2")
    layouts = hf_layouts(shape)
    first, again, other = (empty_params(layouts) for _ in range(3))
    for params, seed in ((first, 1), (again, 1), (other, 2)):
        random_into(params, layouts, shape, seed=seed)
    assert_equal(again, first)
    drawn = [name for name in first if not name.endswith(("norm.weight", ".bias"))]
    assert all(torch.equal(first[n], torch.ones_like(first[n])) for n in first if "norm" in n)
    assert all(not first[n].any() for n in first if n.endswith(".bias"))
    assert not any(torch.equal(first[n], other[n]) for n in drawn)
    values = torch.cat([first[name].flatten() for name in drawn])
    assert values.mean().abs() < 5 * shape.init_std / values.numel() ** 0.5
    assert abs(values.std() / shape.init_std - 1) < 5 / (2 * values.numel()) ** 0.5
    gate, up = (first[f"model.layers.0.mlp.{n}_proj.weight"] for n in ("gate", "up"))
    assert not torch.equal(gate, up)


def test_a_file_that_shrinks_while_it_is_read_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / SINGLE
    save_file({"a": torch.arange(12.0).view(3, 4), "b": torch.arange(5)}, path)
    header = read_header(path)
    assert torch.equal(read_rows(path, header["a"], 1, 3), torch.arange(4.0, 12.0).view(2, 4))
    with pytest.raises(WeightError, match="'b' is I64, expected one of BF16"):
        read_rows(path, header["b"], 0, 1)
    path.write_bytes(path.read_bytes()[: header["a"].offset + 20])
    with pytest.raises(WeightError, match="ended within 'a'"):
        read_rows(path, header["a"], 0, 3)
    path.unlink()
    with pytest.raises(WeightError, match="cannot be read: No such file"):
        read_rows(path, header["a"], 0, 3)
