"""An exported folder is the base model's folder with this actor's weights in it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from models import reference_logits, save_random_model
from ranks import run_ranks
from safetensors.torch import load_file

from osft_mcore.actor.export import export_hf
from osft_mcore.checkpoint.manifest import problems_of, read_manifest
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig
from osft_mcore.data.arithmetic import character_tokenizer
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.start import build_actor

INDEX = "model.safetensors.index.json"
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"kind": "qwen2", "tied": True, "vocab": 301},
    "qwen2_untied": {"kind": "qwen2", "tied": False, "vocab": 259},
    "qwen3_tied": {"kind": "qwen3", "tied": True, "vocab": 259},
    "qwen3_untied": {"kind": "qwen3", "tied": False, "vocab": 263},
    "llama_tied": {"kind": "llama", "tied": True, "vocab": 277},
    "llama_untied": {"kind": "llama", "tied": False, "vocab": 256},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD = 40_000
"""Bytes: less than any of the models, more than some of their tensors, less than others."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    tokenizer = character_tokenizer(256)
    found = {}
    for name, kw in MODELS.items():
        for dtype, torch_dtype in DTYPES.items():
            folder = save_random_model(root / f"{name}_{dtype}", dtype=torch_dtype, **kw)
            tokenizer.save_pretrained(str(folder))
            found[f"{name}_{dtype}"] = folder
    return found


def export(
    _rank: int,
    folders: dict[str, Path],
    out: Path,
    topology: Topology,
    max_shard_bytes: int = SHARD,
    shift: float = 0.0,
    card: str | None = None,
) -> None:
    """Load and export every folder; `shift` is added to all weights in between."""
    context = join_groups(topology, device=torch.device("cpu"))
    for name, folder in folders.items():
        config = RunConfig(
            model=ModelConfig(path=str(folder), dtype="bf16" if "bf16" in name else "fp32"),
            parallel=ParallelConfig(tp=topology.tp, pp=topology.pp),
        )
        actor = build_actor(config, context)
        for parameter in actor.parameters().values():
            parameter.add_(shift)
        export_hf(actor, out / name, max_shard_bytes=max_shard_bytes, bucket_bytes=8192, card=card)
    # Rank 0 writes: nobody looks before it is done.
    dist.barrier()


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        part = load_file(file)
        assert not part.keys() & tensors.keys(), "a tensor in two files"
        tensors |= part
    return tensors


def assert_equal_bits(found: Path, expected: Path) -> None:
    ours, theirs = read_weights(found), read_weights(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name], tensor), name


def assert_sharded(folder: Path) -> None:
    """Several files, none over the limit unless it holds one tensor; the index tells where."""
    files = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    assert len(files) > 1
    sizes = {name: [t.nbytes for t in part.values()] for name, part in files.items()}
    assert all(len(held) == 1 or sum(held) <= SHARD for held in sizes.values())
    assert index["metadata"]["total_size"] == sum(map(sum, sizes.values()))
    assert index["weight_map"] == {name: file for file, part in files.items() for name in part}


def other_files(folder: Path) -> dict[str, str]:
    weights = ("config.json", "manifest.json", INDEX)
    return {
        path.name: path.read_text(encoding="utf-8")
        for path in folder.iterdir()
        if path.suffix != ".safetensors" and path.name not in weights
    }


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("pp", [1, 2])
def test_untrained_weights_come_back_bit_for_bit(
    folders: dict[str, Path], tmp_path: Path, tp: int, pp: int
) -> None:
    topology = Topology(tp=tp, pp=pp, dp=1)
    run_ranks(export, tp * pp, folders=folders, out=tmp_path, topology=topology)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(folders), "nothing.tmp"
    for name, folder in folders.items():
        assert_equal_bits(tmp_path / name, folder)
        assert_sharded(tmp_path / name)
        assert problems_of(tmp_path / name, hashes=True) == []
        side_files = other_files(tmp_path / name)
        assert side_files == other_files(folder)
        assert {"generation_config.json", "tokenizer.json"} <= side_files.keys()


def test_transformers_loads_what_was_exported(folders: dict[str, Path], tmp_path: Path) -> None:
    topology = Topology(tp=2, pp=1, dp=1)
    run_ranks(export, 2, folders=folders, out=tmp_path, topology=topology, shift=0.125)
    tokens_BS = torch.arange(24).view(2, 12)
    for name, folder in folders.items():
        _, report = transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / name, output_loading_info=True
        )
        assert not any(report.values()), (name, report)
        # The same change made by transformers itself: what was exported are the actor's weights.
        changed = transformers.AutoModelForCausalLM.from_pretrained(folder)
        for parameter in changed.parameters():
            parameter.data.add_(0.125)
        changed.save_pretrained(tmp_path / "expected")
        expected = reference_logits(tmp_path / "expected", tokens_BS)
        assert torch.equal(reference_logits(tmp_path / name, tokens_BS), expected), name
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / name)
        assert tokenizer.decode(tokenizer.encode("12+7=19")) == "12+7=19"


@pytest.mark.parametrize("dtype", DTYPES)
def test_config_says_the_dtype_of_the_weights(
    folders: dict[str, Path], tmp_path: Path, dtype: str
) -> None:
    """A base model of another dtype must not leave its own in config.json."""
    base = folders["qwen2_tied_bf16" if dtype == "fp32" else "qwen2_tied_fp32"]
    topology = Topology(tp=1, pp=1, dp=1)
    run_ranks(export, 1, folders={dtype: base}, out=tmp_path, topology=topology)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / dtype)
    assert loaded.dtype == DTYPES[dtype]
    assert {t.dtype for t in read_weights(tmp_path / dtype).values()} == {DTYPES[dtype]}


def test_the_card_is_ours_and_the_base_models_is_kept_beside_it(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    base = shutil.copytree(folders["qwen2_tied_fp32"], tmp_path / "base")
    (base / "README.md").write_text("theirs", encoding="utf-8")
    (base / "LICENSE").write_text("their licence", encoding="utf-8")
    one = {"fp32": base}
    topology = Topology(tp=1, pp=1, dp=1)
    for number, card in enumerate(("ours", None)):
        out = tmp_path / str(number)
        run_ranks(export, 1, folders=one, out=out, topology=topology, card=card)
        files = other_files(out / "fp32")
        assert files.get("README.md") == card
        assert files["BASE_MODEL_README.md"] == "theirs"
        assert files["BASE_MODEL_LICENSE"] == "their licence"
        assert "LICENSE" not in files
        found = {path.name for path in (out / "fp32").iterdir()}
        assert read_manifest(out / "fp32").keys() == found - {"manifest.json"}


def test_an_existing_folder_is_replaced_as_a_whole(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    """Many shards and a stranger's file before, one file after; an interrupted export is swept."""
    name = "qwen3_untied_fp32"
    one = {name: folders[name]}
    topology = Topology(tp=1, pp=1, dp=1)
    run_ranks(export, 1, folders=one, out=tmp_path, topology=topology, shift=1.0)
    assert_sharded(tmp_path / name)
    (tmp_path / name / "notes.txt").write_text("old", encoding="utf-8")
    shutil.copytree(tmp_path / name, tmp_path / f"{name}.tmp")
    run_ranks(export, 1, folders=one, out=tmp_path, topology=topology, max_shard_bytes=2**30)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert [path.name for path in (tmp_path / name).glob("*.safetensors")] == ["model.safetensors"]
    assert not (tmp_path / name / INDEX).exists()
    assert not (tmp_path / name / "notes.txt").exists()
    assert_equal_bits(tmp_path / name, folders[name])
