"""Hugging Face folders to Megatron layouts and back: every bit, every file, or a clear refusal."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Tensors, assert_equal, megatron_reference
from models import save_random_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from osft_mcore.checkpoint.convert import hf_to_mcore, mcore_to_hf, shard_bytes
from osft_mcore.checkpoint.formats import format_of, training_state
from osft_mcore.checkpoint.manifest import problems_of
from osft_mcore.checkpoint.verify import verify
from osft_mcore.config.model_shape import padded_vocab, read_model_shape
from osft_mcore.errors import ConfigError, OsftError, WeightError
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.params import hf_tensors

QUIET = Console(enabled=False)
SINGLE = "model.safetensors"
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied_shards": {"kind": "qwen2", "tied": True, "vocab": 301},
    "qwen2_untied_bf16": {"kind": "qwen2", "tied": False, "vocab": 67, "dtype": torch.bfloat16},
    "qwen3_tied": {"kind": "qwen3", "tied": True, "vocab": 129, "layers": 3},
    "qwen3_untied": {"kind": "qwen3", "tied": False, "vocab": 255},
    "llama_tied_kv1": {"kind": "llama", "tied": True, "vocab": 33, "kv_heads": 1},
    "llama_untied_shards": {"kind": "llama", "tied": False, "vocab": 190, "layers": 4},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    found = {name: save_random_model(root / name, **kw) for name, kw in MODELS.items()}
    for name, folder in found.items():
        if "shards" in name:
            model = AutoModelForCausalLM.from_pretrained(folder)
            (folder / SINGLE).unlink()
            model.save_pretrained(folder, max_shard_size="60KB")
            assert len(list(folder.glob("model-*"))) > 1
    return found


def to_mcore(hf: Path, out: Path, *, tp: int = 1, pp: int = 1, **changes: Any) -> Path:
    options: dict[str, Any] = {"vocab_multiple": 64, "dtype": None, "target": "safetensors"}
    options["console"] = QUIET
    topology = Topology(tp=tp, pp=pp, dp=1, vpp=changes.pop("vpp", 1))
    hf_to_mcore(hf, out, topology=topology, **options | changes)
    return out


def to_hf(mcore: Path, out: Path, **changes: Any) -> Path:
    options: dict[str, Any] = {
        "hf_config": None,
        "dtype": None,
        "max_shard_bytes": 2**30,
        "hashes": True,
        "console": QUIET,
    }
    mcore_to_hf(mcore, out, **options | changes)
    return out


def read_weights(folder: Path) -> Tensors:
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def assert_same_bits(found: Path, expected: Path) -> None:
    ours, theirs = read_weights(found), read_weights(expected)
    assert_equal(ours, theirs)
    assert all(ours[name].dtype == tensor.dtype for name, tensor in theirs.items())


@pytest.mark.parametrize(
    ("target", "tp", "pp"),
    [
        *(("safetensors", tp, pp) for tp in (1, 2, 4) for pp in (1, 2)),
        *(("torch_dist", tp, pp) for tp, pp in ((1, 1), (2, 2), (4, 1))),
    ],
)
def test_there_and_back_changes_no_bit(
    folders: dict[str, Path], tmp_path: Path, target: str, tp: int, pp: int
) -> None:
    for name, folder in folders.items():
        mcore = to_mcore(folder, tmp_path / "mcore" / name, tp=tp, pp=pp, target=target)
        assert format_of(mcore) == target
        back = to_hf(mcore, tmp_path / "hf" / name, max_shard_bytes=50_000)
        assert_same_bits(back, folder)
        assert (back / "config.json").read_bytes() == (folder / "config.json").read_bytes()
        assert problems_of(mcore, hashes=True) == problems_of(back, hashes=True) == []
        checks = list(verify(mcore, hf_config=None, hf=folder))
        assert len(checks) > 2
        assert [problem for check in checks for problem in check.problems] == []


@pytest.mark.parametrize(("tp", "pp", "vpp"), [(1, 1, 1), (2, 2, 1), (4, 1, 1), (2, 2, 2)])
def test_shards_hold_what_megatron_computes_with(
    folders: dict[str, Path], tmp_path: Path, tp: int, pp: int, vpp: int
) -> None:
    """Against whole tensors, fused and cut the obvious way."""
    for name, folder in folders.items():
        shape = read_model_shape(folder)
        if shape.num_layers < pp * vpp:
            continue
        mcore = to_mcore(folder, tmp_path / name, tp=tp, pp=pp, vpp=vpp)
        for shard in range(tp * pp):
            expected = megatron_reference(
                shape,
                read_weights(folder),
                tp=tp,
                tp_rank=shard % tp,
                pp=pp,
                pp_rank=shard // tp,
                vpp=vpp,
                padded=padded_vocab(shape.vocab, multiple=64, tp=tp),
            )
            found = load_file(mcore / f"rank_{shard:05d}.safetensors")
            assert_equal(found, {f"weight/{shard}/{k}": v for k, v in expected.items()})


def rewrite(folder: Path, **changes: torch.Tensor | None) -> Path:
    """Change tensors of a single-file folder; None drops one."""
    tensors: dict[str, Any] = {**load_file(folder / SINGLE), **changes}
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, folder / SINGLE, metadata={"format": "pt"})
    return folder


def config_dtype(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["dtype"])


def test_dtypes_stay_unless_another_is_asked_for(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "qwen3", tied=True)
    tensors = load_file(folder / SINGLE)
    # As some checkpoints are: norms in fp32, the rest in bf16.
    mixed = {name: t if "norm" in name else t.bfloat16() for name, t in tensors.items()}
    rewrite(folder, **mixed)
    for target in ("safetensors", "torch_dist"):
        mcore = to_mcore(folder, tmp_path / target, tp=2, target=target)
        back = to_hf(mcore, tmp_path / f"{target}_back")
        assert_same_bits(back, folder)
        assert config_dtype(back) == config_dtype(folder), "no one dtype to say"
        wide = to_hf(mcore, tmp_path / f"{target}_wide", dtype=torch.float32)
        assert_equal(read_weights(wide), {name: t.float() for name, t in mixed.items()})
        assert config_dtype(wide) == "float32"
        narrow = to_mcore(folder, tmp_path / f"{target}_16", target=target, dtype=torch.bfloat16)
        assert config_dtype(narrow / "model") == "bfloat16"
        assert config_dtype(to_hf(mcore, tmp_path / f"{target}_b", dtype=torch.bfloat16)) == (
            "bfloat16"
        )
        narrow = to_hf(narrow, tmp_path / f"{target}_narrow")
        assert_equal(read_weights(narrow), {name: t.bfloat16() for name, t in mixed.items()})
        assert config_dtype(narrow) == "bfloat16"


def refused(error: type[OsftError], call: Any, *arguments: Any, **options: Any) -> list[str]:
    with pytest.raises(error) as caught:
        call(*arguments, **options)
    found = caught.value
    return list(found.problems) if isinstance(found, ConfigError) else str(found).splitlines()


def test_dtypes_that_would_be_fused_are_refused_with_advice(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "qwen2")
    keys = [f"model.layers.{layer}.self_attn.k_proj.weight" for layer in (0, 1)]
    rewrite(folder, **{key: load_file(folder / SINGLE)[key].bfloat16() for key in keys})
    lines = refused(WeightError, to_mcore, folder, tmp_path / "out", tp=2)
    assert len(lines) == 3, "one for each parameter, then the advice"
    assert all(f"{key} (torch.bfloat16)" in line for key, line in zip(keys, lines, strict=False))
    assert lines[-1].startswith("--dtype: give one of bf16, fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    to_mcore(folder, tmp_path / "out", tp=2, dtype=torch.float32)


def test_all_mistakes_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "qwen2")
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").write_text("precious")
    lines = refused(ConfigError, to_mcore, folder, taken, tp=3, pp=5)
    assert [line.split(":")[0] for line in lines] == ["--out", "--tp", "--tp", "--pp"]
    assert "is not empty" in lines[0]
    rewrite(folder, **{"model.norm.weight": None, "extra": torch.zeros(2)})
    lines = refused(ConfigError, to_mcore, folder, taken, tp=0, vocab_multiple=0)
    assert [line.split(":")[0] for line in lines[:3]] == ["--out", "--tp", "--vocab-multiple"]
    assert "model.norm.weight is missing" in lines[3]
    assert "extra is unexpected" in lines[4]
    (line,) = refused(ConfigError, to_mcore, tmp_path / "none", tmp_path / "out")
    assert line.startswith("--hf: no config.json")
    lines = refused(ConfigError, to_mcore, tmp_path / "hf", tmp_path / "hf" / SINGLE, vpp=2)
    assert "is there and is not a folder" in lines[0]
    assert "more than one stage" in lines[1]
    assert (taken / "mine").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "taken"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.norm.weight": None}, "model.norm.weight is missing"),
        ({"model.layers.7.mlp.up_proj.weight": torch.zeros(96, 64)}, "is unexpected"),
        ({"model.norm.weight": torch.zeros(63)}, "has shape (63,), config.json asks for (64,)"),
        ({"model.norm.weight": torch.zeros(64, dtype=torch.int8)}, "quantised"),
    ],
)
def test_a_folder_that_is_not_the_model_is_refused(
    tmp_path: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    folder = rewrite(save_random_model(tmp_path / "hf", "llama"), **change)
    (line,) = refused(WeightError, to_mcore, folder, tmp_path / "out")
    assert message in line
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_what_config_json_calls_quantised_is_refused(tmp_path: Path) -> None:
    """Even with plain weights: who reads the result would take them for quantised."""
    folder = save_random_model(tmp_path / "hf", "llama")
    mcore = to_mcore(folder, tmp_path / "mcore")
    config = json.loads((folder / "config.json").read_text())
    quantised = {**config, "quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(quantised))
    message = f": {folder / 'config.json'}: quantization_config (fp8) is not supported"
    for target in ("safetensors", "torch_dist"):
        (line,) = refused(ConfigError, to_mcore, folder, tmp_path / "out", target=target)
        assert line.startswith(f"--hf{message}")
    (line,) = refused(ConfigError, to_hf, mcore, tmp_path / "out", hf_config=folder)
    assert line.startswith(f"--hf-config{message}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "mcore"]
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    to_mcore(folder, tmp_path / "out")


def test_an_output_layer_that_is_tied_must_be_the_embedding(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "llama", tied=True)
    embedding = load_file(folder / SINGLE)["model.embed_tokens.weight"]
    rewrite(folder, **{"lm_head.weight": embedding.clone()})
    back = to_hf(to_mcore(folder, tmp_path / "mcore", pp=2), tmp_path / "back")
    assert read_weights(back).keys() == hf_tensors(read_model_shape(folder)).keys()
    head = embedding.clone()
    head[-1, -1] += 1
    rewrite(folder, **{"lm_head.weight": head})
    (line,) = refused(WeightError, to_mcore, folder, tmp_path / "out")
    assert "lm_head.weight is there and differs from model.embed_tokens.weight" in line


def test_what_is_no_checkpoint_is_refused_with_advice(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "llama")
    out = tmp_path / "out"
    (line,) = refused(ConfigError, to_hf, folder, out)
    assert "is a Hugging Face folder" in line
    (line,) = refused(ConfigError, to_hf, tmp_path / "nowhere", out)
    assert "nowhere is not a folder" in line
    (line,) = refused(ConfigError, to_hf, tmp_path, out)
    assert "found neither index.json nor .metadata nor config.json" in line
    step = tmp_path / "run" / "checkpoints" / "step_12"
    step.mkdir(parents=True)
    for place in (tmp_path / "run", step.parent):
        (line,) = refused(ConfigError, to_hf, place, out)
        assert f"a checkpoint of the run is {step}" in line
    mcore = to_mcore(folder, tmp_path / "mcore")
    (line,) = refused(ConfigError, to_hf, mcore, out, max_shard_bytes=0)
    assert line == "--max-shard-gib: expected more than 0"
    shutil.rmtree(mcore / "model")
    assert f"{mcore / 'model' / 'config.json'} is missing" in refused(
        WeightError, to_hf, mcore, out
    )
    assert not out.exists()


def test_damage_is_found_before_anything_is_written(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "llama")
    mcore = to_mcore(folder, tmp_path / "mcore", tp=2)
    file = mcore / "rank_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    (line,) = refused(WeightError, to_hf, mcore, tmp_path / "out")
    assert "rank_00001.safetensors was changed or damaged" in line
    file.write_bytes(content[:-1])
    (line,) = refused(WeightError, to_hf, mcore, tmp_path / "out", hashes=False)
    assert "the manifest says" in line
    assert not (tmp_path / "out").exists()


def test_a_torch_dist_checkpoint_of_others_needs_a_config(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "qwen2", vocab=67)
    mcore = to_mcore(folder, tmp_path / "mcore", tp=2, target="torch_dist")
    shutil.rmtree(mcore / "model")
    (mcore / "manifest.json").unlink()
    (line,) = refused(ConfigError, to_hf, mcore, tmp_path / "out")
    assert line.startswith("--hf-config: no config.json in")
    assert_same_bits(to_hf(mcore, tmp_path / "out", hf_config=folder), folder)
    other = save_random_model(tmp_path / "other", "qwen2", vocab=67, layers=3)
    refused(WeightError, to_hf, mcore, tmp_path / "wrong", hf_config=other)
    lines = refused(ConfigError, to_mcore, folder, tmp_path / "no", vpp=2, target="torch_dist")
    assert "has no model chunks" in lines[0]


def test_a_checkpoint_must_be_of_this_model(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "llama", layers=3)
    mcore = to_mcore(folder, tmp_path / "mcore", tp=2)
    other = save_random_model(tmp_path / "other", "llama", layers=2)
    lines = refused(WeightError, to_hf, mcore, tmp_path / "out", hf_config=other)
    assert len(lines) == 9, "one for each tensor of the third layer"
    assert all("model.layers.2." in line and "is not a tensor of a model" in line for line in lines)
    assert not (tmp_path / "out").exists()


def test_a_state_may_have_infinite_numbers_but_no_abyss(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text('{"step": 3, "best": -Infinity}')
    assert training_state(tmp_path)["step"] == 3
    path.write_text("[" * 200_000)
    assert "state.json is damaged" in refused(WeightError, training_state, tmp_path)[0]


def test_layers_of_several_dtypes_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = save_random_model(tmp_path / "hf", "llama")
    key = "model.layers.1.self_attn.o_proj.weight"
    rewrite(folder, **{key: load_file(folder / SINGLE)[key].bfloat16()})
    lines = refused(WeightError, to_mcore, folder, tmp_path / "out", target="torch_dist")
    assert lines[-1] == "give one dtype for all parameters (--dtype)"
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    to_mcore(folder, tmp_path / "out", target="torch_dist", dtype=torch.float32)


@pytest.mark.parametrize("gib", [float("nan"), float("inf"), 1e308, -1.0, 0.0, 1e-12])
def test_the_size_of_a_shard_is_a_number_above_zero(gib: float) -> None:
    (line,) = refused(ConfigError, shard_bytes, gib)
    assert line == f"--max-shard-gib: found {gib}, expected a number above 0"


def test_a_shard_may_have_part_of_a_gib() -> None:
    assert shard_bytes(0.5) == 2**29
