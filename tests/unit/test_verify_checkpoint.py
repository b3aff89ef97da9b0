"""Every kind of damage to a checkpoint is found by the question that is about it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import save_random_model
from safetensors.torch import load_file, save_file

from osft_mcore.checkpoint.convert import Target, hf_to_mcore, mcore_to_hf
from osft_mcore.checkpoint.manifest import read_manifest, write_manifest
from osft_mcore.checkpoint.verify import Check, verify
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.files import record_of
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology

QUIET = Console(enabled=False)
SINGLE = "model.safetensors"
NORM = "weight/1/decoder.final_layernorm.weight"


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("originals")
    hf = save_random_model(root / "hf", "qwen3", tied=False)
    targets: tuple[Target, ...] = ("safetensors", "torch_dist")
    for target in targets:
        hf_to_mcore(
            hf,
            root / target,
            topology=Topology(tp=2, pp=1, dp=1),
            vocab_multiple=64,
            dtype=None,
            target=target,
            console=QUIET,
        )
    mcore_to_hf(
        root / "safetensors",
        root / "export",
        hf_config=None,
        dtype=None,
        max_shard_bytes=2**30,
        hashes=True,
        console=QUIET,
    )
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def copies(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    return {name: shutil.copytree(path, tmp_path / name) for name, path in originals.items()}


def answers(
    folder: Path, hf: Path | None = None, hf_config: Path | None = None
) -> dict[str, Check]:
    return {
        check.name.split(" to ")[0]: check for check in verify(folder, hf_config=hf_config, hf=hf)
    }


def failed(found: dict[str, Check]) -> dict[str, tuple[str, ...]]:
    return {name: check.problems for name, check in found.items() if check.problems}


def change(file: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def sign(folder: Path) -> None:
    """Let the manifest agree with the files, as it does if whoever wrote them was mistaken."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json"]
    write_manifest(folder, {str(path.relative_to(folder)): record_of(path) for path in files}, {})


@pytest.mark.parametrize(
    ("name", "questions"),
    [
        ("hf", ["weights", "equal"]),
        ("export", ["manifest", "weights", "equal"]),
        ("torch_dist", ["manifest", "weights", "equal"]),
        ("safetensors", ["manifest", "files", "layout", "weights", "copies", "equal"]),
    ],
)
def test_what_is_whole_is_ok(originals: dict[str, Path], name: str, questions: list[str]) -> None:
    found = answers(originals[name], hf=originals["hf"])
    assert list(found) == questions
    assert all(check.lines == [f"ok {check.name}: {check.found}"] for check in found.values())


def test_a_step_without_its_state_is_no_checkpoint_to_go_on_from(copies: dict[str, Path]) -> None:
    """Whoever took the moments away took them out of manifest and index as well."""
    folder = copies["safetensors"]
    write_manifest(folder, read_manifest(folder), {"step": 7})
    assert failed(answers(folder)) == {
        "training state": (
            "no tensors of kind exp_avg are there",
            "no tensors of kind exp_avg_sq are there",
            "no state.json is there",
        )
    }


def test_a_flipped_bit_fails_the_manifest_and_the_comparison(copies: dict[str, Path]) -> None:
    for name, file in (("safetensors", "rank_00000.safetensors"), ("export", SINGLE)):
        path = copies[name] / file
        content = bytearray(path.read_bytes())
        content[-2] ^= 64
        path.write_bytes(content)
        problems = failed(answers(copies[name], hf=copies["hf"]))
        assert set(problems) - {"copies"} == {"manifest", "equal"}
        assert f"{file} was changed or damaged" in problems["manifest"][0]
        assert "differs, by" in problems["equal"][0]


def test_negative_zero_is_another_value(copies: dict[str, Path]) -> None:
    change(copies["hf"] / SINGLE, lambda at: at["model.norm.weight"].zero_())
    other = shutil.copytree(copies["hf"], copies["hf"].with_name("negative"))
    assert not failed(answers(other, hf=copies["hf"]))
    change(other / SINGLE, lambda at: at["model.norm.weight"].neg_())
    (problem,) = failed(answers(other, hf=copies["hf"]))["equal"]
    assert problem == "model.norm.weight differs, by 0 at most"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda at: at.pop(NORM), "no 'weight/1/decoder.final_layernorm.weight' is there"),
        (lambda at: at.update({NORM: torch.ones(63)}), "has shape (63,), the index says (64,)"),
        (lambda at: at.update({NORM: torch.ones(64, dtype=torch.int32)}), "is I32, expected one"),
        (lambda at: at.update(extra=torch.ones(2)), "holds 'extra', of which the index knows"),
    ],
)
def test_files_must_hold_what_the_index_says(
    copies: dict[str, Path], edit: Callable[[dict[str, Any]], Any], message: str
) -> None:
    folder = copies["safetensors"]
    change(folder / "rank_00001.safetensors", edit)
    sign(folder)
    (problem,) = failed(answers(folder))["files"]
    assert message in problem


def test_an_unknown_file_of_tensors_is_found(copies: dict[str, Path]) -> None:
    folder = copies["safetensors"]
    shutil.copy(copies["hf"] / SINGLE, folder / "rank_00002.safetensors")
    lines = answers(folder)["files"].lines
    assert len(lines) == 9
    assert lines[0].startswith("FAILED files: rank_00002.safetensors holds ")
    assert lines[-1].endswith(" more")


def test_copies_that_differ_are_found(copies: dict[str, Path]) -> None:
    folder = copies["safetensors"]
    change(folder / "rank_00001.safetensors", lambda at: at[NORM].add_(1))
    sign(folder)
    problems = failed(answers(folder, hf=copies["hf"]))
    assert problems == {
        "copies": ("rows 0:64 of model.norm.weight differ between shards 0, 1",),
    }, "the comparison reads the first copy"


def test_rows_that_nothing_holds_are_named(copies: dict[str, Path]) -> None:
    folder = copies["safetensors"]
    index = json.loads((folder / "index.json").read_text())
    for params in index["parameters"].values():
        del params["decoder.final_layernorm.weight"]
    for entries in index["files"].values():
        entries[:] = [at for at in entries if at["param"] != "decoder.final_layernorm.weight"]
    (folder / "index.json").write_text(json.dumps(index))
    sign(folder)
    problems = failed(answers(folder))
    assert "needs rows 0:64 of 'model.norm.weight', which no source holds" in problems["weights"][0]
    assert "of which the index knows nothing" in problems["files"][0]
    (folder / "index.json").write_text("{")
    problems = failed(answers(folder))
    assert set(problems) == {"manifest", "files", "layout", "weights", "copies"}


def test_folders_of_others_are_looked_through_too(copies: dict[str, Path]) -> None:
    change(copies["hf"] / SINGLE, lambda at: at.pop("model.norm.weight"))
    (problem,) = failed(answers(copies["hf"]))["weights"]
    assert "model.norm.weight is missing" in problem
    folder = copies["torch_dist"]
    path = folder / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-1000])
    assert set(failed(answers(folder))) == {"manifest", "weights"}
    (folder / "manifest.json").unlink()
    shutil.rmtree(folder / "model")
    (problem,) = failed(answers(folder))["weights"]
    assert problem.startswith("--hf-config: no config.json")
    for which in ({"hf": copies["export"]}, {"hf_config": copies["export"]}):
        assert "--hf-config" not in failed(answers(folder, **which))["weights"][0]


def test_a_tied_output_layer_must_be_the_embedding(tmp_path: Path) -> None:
    hf = save_random_model(tmp_path / "hf", "llama", tied=True)
    assert not failed(answers(hf))
    change(hf / SINGLE, lambda at: at.update({"lm_head.weight": torch.zeros(67, 64)}))
    (problem,) = failed(answers(hf))["weights"]
    assert "differs from model.embed_tokens.weight" in problem


def test_a_config_that_says_quantised_speaks_of_other_weights(copies: dict[str, Path]) -> None:
    path = copies["hf"] / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "quantization_config": None}))
    assert not failed(answers(copies["hf"]))
    path.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
    (problem,) = failed(answers(copies["hf"]))["weights"]
    assert f"{path}: quantization_config (fp8)" in problem


def test_another_dtype_or_model_is_not_equal(copies: dict[str, Path], tmp_path: Path) -> None:
    folder, hf = copies["safetensors"], copies["hf"]
    change(hf / SINGLE, lambda at: at.update({k: v.bfloat16() for k, v in at.items()}))
    problems = failed(answers(folder, hf=hf))["equal"]
    assert problems[0].endswith("is torch.float32, there torch.bfloat16")
    assert len(problems) == len(load_file(hf / SINGLE))
    other = save_random_model(tmp_path / "other", "qwen3", layers=3)
    (problem,) = failed(answers(folder, hf=other))["equal"]
    assert "num_layers=3" in problem


def test_no_checkpoint_at_all_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        list(verify(tmp_path, hf_config=None, hf=None))


def unlist(folder: Path, *names: str) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in names or list(manifest["files"]):
        del manifest["files"][name]
    path.write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("safetensors", "index.json"),
        ("safetensors", "rank_00001.safetensors"),
        ("safetensors", "state.json"),
        ("torch_dist", ".metadata"),
        ("torch_dist", "__1_0.distcp"),
        ("export", SINGLE),
    ],
)
def test_a_file_that_the_manifest_does_not_name_is_not_vouched_for(
    copies: dict[str, Path], which: str, name: str
) -> None:
    folder = copies[which]
    if name == "state.json":
        (folder / name).write_text('{"step": 3}')
    else:
        unlist(folder, name)
    expected = f"{folder / name} is part of the checkpoint, but manifest.json does not name it"
    assert failed(answers(folder))["manifest"] == (expected,)


def test_a_manifest_of_nothing_vouches_for_nothing(copies: dict[str, Path]) -> None:
    unlist(copies["safetensors"])
    assert len(failed(answers(copies["safetensors"]))["manifest"]) == 4


def test_a_file_that_lies_elsewhere_is_refused(copies: dict[str, Path], tmp_path: Path) -> None:
    for name, file in (("safetensors", "rank_00000.safetensors"), ("torch_dist", "__0_0.distcp")):
        path = copies[name] / file
        path.rename(tmp_path / file)
        path.symlink_to(tmp_path / file)
        (problem,) = failed(answers(copies[name]))["manifest"]
        assert problem == f"{path} is a link out of the checkpoint; replace it by the file"
    path = copies["export"] / SINGLE
    path.rename(tmp_path / SINGLE)
    path.symlink_to(tmp_path / SINGLE)
    assert not failed(answers(copies["export"])), "as in a hub cache"


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_values_that_are_no_numbers_are_named(copies: dict[str, Path], value: float) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    change(copies["hf"] / SINGLE, lambda at: at[name].view(-1)[-1:].fill_(value))
    (problem,) = failed(answers(copies["hf"]))["weights"]
    assert problem == f"{name} (shard 0) holds values that are NaN or infinite"
    targets: tuple[Target, ...] = ("safetensors", "torch_dist")
    for target in targets:
        out = copies["hf"].with_name(f"out_{target}")
        hf_to_mcore(
            copies["hf"],
            out,
            topology=Topology(tp=2, pp=1, dp=1),
            vocab_multiple=64,
            dtype=None,
            target=target,
            console=QUIET,
        )
        problems = failed(answers(out))
        assert set(problems) == {"weights"}
        (problem,) = problems["weights"]
        assert problem.startswith("decoder.layers.1.mlp.linear_fc2.weight (shard ")


def test_every_byte_of_a_torch_dist_checkpoint_is_read(copies: dict[str, Path]) -> None:
    folder = copies["torch_dist"]
    (folder / "manifest.json").unlink()
    assert "there is no SHA-256" in answers(folder)["weights"].found
    values = load_file(copies["hf"] / SINGLE)["model.layers.1.self_attn.o_proj.weight"]
    # The last column: of the second shard.
    mark = values[3, -8:].numpy().tobytes()
    path = folder / "__1_0.distcp"
    content = bytearray(path.read_bytes())
    assert content.count(mark) == 1
    content[content.index(mark)] ^= 1
    path.write_bytes(content)
    (problem,) = failed(answers(folder))["weights"]
    assert "was changed or damaged: the CRC is another" in problem
    with pytest.raises(WeightError, match="the CRC is another"):
        mcore_to_hf(
            folder,
            folder.with_name("out"),
            hf_config=None,
            dtype=None,
            max_shard_bytes=2**30,
            hashes=True,
            console=QUIET,
        )
    path.write_bytes(bytes(len(content)))
    assert "weights" in failed(answers(folder))


def test_rows_that_the_model_has_no_use_for_are_found(copies: dict[str, Path]) -> None:
    folder = copies["safetensors"]
    config = json.loads((folder / "model" / "config.json").read_text())
    config["vocab_size"] -= 3
    (folder / "model" / "config.json").write_text(json.dumps(config))
    sign(folder)
    vocab = config["vocab_size"]
    assert failed(answers(folder))["weights"] == tuple(
        f"{folder}: {name!r} goes to {vocab + 3} along dim 0, config.json asks for {vocab}"
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    )


DEEP = "[" * 200_000


@pytest.mark.parametrize("content", [DEEP, '{"files": Infinity}', '{"a": 1e999}', "[]"])
@pytest.mark.parametrize(
    ("which", "name"),
    [
        ("safetensors", "manifest.json"),
        ("safetensors", "index.json"),
        ("safetensors", "model/config.json"),
        ("torch_dist", "metadata.json"),
        ("hf", "config.json"),
        ("hf", "model.safetensors.index.json"),
    ],
)
def test_damaged_json_is_a_problem_like_others(
    copies: dict[str, Path], which: str, name: str, content: str
) -> None:
    (copies[which] / name).write_text(content)
    problems = failed(answers(copies[which]))
    assert any(str(copies[which] / name) in line for lines in problems.values() for line in lines)


def test_sizes_beyond_measure_are_a_problem_like_others(copies: dict[str, Path]) -> None:
    for name in ("manifest.json", "index.json"):
        path = copies["safetensors"] / name
        text = path.read_text()
        key = '"size": ' if name == "manifest.json" else '"elements": [\n'
        assert key in text
        path.write_text(text.replace(key, f"{key}1e999, " if "elements" in key else f"{key}1e999"))
        assert "manifest" in failed(answers(copies["safetensors"]))
        path.write_text(text)
