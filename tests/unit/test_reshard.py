"""A training checkpoint at another layout: weights, moments and all that lies beside them."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Tensors, assert_equal, megatron_reference
from models import save_random_model
from safetensors.torch import load_file, save_file

from osft_mcore.checkpoint.assemble import megatron_shards
from osft_mcore.checkpoint.convert import mcore_to_hf
from osft_mcore.checkpoint.index import INDEX, Index, Kind, Piece, to_json
from osft_mcore.checkpoint.manifest import problems_of, read_details, write_manifest
from osft_mcore.checkpoint.reshard import reshard
from osft_mcore.checkpoint.save import part_name
from osft_mcore.checkpoint.verify import verify
from osft_mcore.config.model_shape import ModelShape, padded_vocab, read_model_shape
from osft_mcore.errors import ConfigError, WeightError
from osft_mcore.files import json_bytes, record_of
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology
from osft_mcore.weights.params import hf_tensors
from osft_mcore.weights.safetensors_stream import TensorSpec, write_safetensors
from osft_mcore.weights.side_files import read_side_files

QUIET = Console(enabled=False)
OPTIMIZER: tuple[Kind, ...] = ("master", "exp_avg", "exp_avg_sq")
STEP = 3


def random_tensors(shape: ModelShape, seed: int, dtype: torch.dtype) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    sizes = hf_tensors(shape).items()
    return {name: torch.randn(size, generator=generator).to(dtype) for name, size in sizes}


def kinds_of(shape: ModelShape) -> dict[Kind, Tensors]:
    found: dict[Kind, Tensors] = {"weight": random_tensors(shape, 0, torch.bfloat16)}
    for seed, kind in enumerate(OPTIMIZER, 1):
        found[kind] = random_tensors(shape, seed, torch.float32)
    found["exp_avg_sq"] = {name: at.square() for name, at in found["exp_avg_sq"].items()}
    found["weight"] = {name: at.bfloat16() for name, at in found["master"].items()}
    return found


def shard_of(shape: ModelShape, tensors: Tensors, topology: Topology, shard: int) -> Tensors:
    """The parameters of one shard, fused and cut the obvious way."""
    dtype = tensors["model.norm.weight"].dtype
    found = megatron_reference(
        shape,
        tensors,
        tp=topology.tp,
        tp_rank=shard % topology.tp,
        pp=topology.pp,
        pp_rank=shard // topology.tp,
        vpp=topology.vpp,
        padded=padded_vocab(shape.vocab, multiple=64, tp=topology.tp),
    )
    return {name: tensor.to(dtype) for name, tensor in found.items()}


def save_step(run: Path, hf: Path, topology: Topology) -> Path:
    """A checkpoint as training with two data-parallel ranks leaves it: each has half of the
    optimizer's state, cut anywhere, and the first has the weights."""
    shape = read_model_shape(hf)
    folder = run / "checkpoints" / f"step_{STEP}"
    (folder / "model").mkdir(parents=True)
    held: list[list[tuple[Piece, torch.Tensor]]] = []
    for shard in range(topology.tp * topology.pp):
        files: list[list[tuple[Piece, torch.Tensor]]] = [[], []]
        for kind, tensors in kinds_of(shape).items():
            for param, tensor in shard_of(shape, tensors, topology, shard).items():
                total = tensor.numel()
                edges = (0, total) if kind == "weight" else (0, total // 3 + 1, total)
                for rank, (start, stop) in enumerate(pairwise(edges)):
                    file = part_name(2 * shard + rank)
                    part = tensor if kind == "weight" else tensor.flatten()[start:stop]
                    piece = Piece(
                        file=file, kind=kind, shard=shard, param=param, start=start, stop=stop
                    )
                    files[rank].append((piece, part))
        held += files
    records = {}
    for entries in held:
        path = folder / entries[0][0].file
        specs = [TensorSpec(p.tensor, t.dtype, tuple(t.shape)) for p, t in entries]
        records[path.name] = write_safetensors(path, specs, [t for _, t in entries])
    layouts = megatron_shards(shape, topology, vocab_multiple=64, transformer_engine=False)
    sizes = {"tp": topology.tp, "pp": topology.pp, "vpp": topology.vpp, "dp": 2}
    pieces = tuple(piece for entries in held for piece, _ in entries)
    index = Index(topology=sizes, layouts=layouts, pieces=pieces)
    contents = {
        INDEX: json_bytes(to_json(index)),
        "state.json": json_bytes({"step": STEP, "anything": [1, 2.5]}),
        **{f"model/{name}": content for name, content in read_side_files(hf).items()},
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
        records[name] = record_of(folder / name)
    write_manifest(folder, records, {"step": STEP})
    return folder


def to_layout(source: Path, out: Path, topology: Topology) -> Path:
    reshard(source, out, topology=topology, vocab_multiple=64, hashes=True, console=QUIET)
    return out


def assert_is(folder: Path, shape: ModelShape, topology: Topology) -> None:
    """Every kind of tensor is there, at this layout, bit by bit."""
    for shard in range(topology.tp * topology.pp):
        expected = {
            f"{kind}/{shard}/{param}": tensor
            for kind, tensors in kinds_of(shape).items()
            for param, tensor in shard_of(shape, tensors, topology, shard).items()
        }
        found = load_file(folder / part_name(shard))
        assert_equal(found, expected)
        assert all(found[name].dtype == tensor.dtype for name, tensor in expected.items())


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def hf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "hf"
    save_random_model(folder, "qwen2", tied=request.param, vocab=97, layers=4)
    (folder / "README.md").write_text("theirs")
    return folder


TP2 = Topology(tp=2, pp=1, dp=1)
PP2 = Topology(tp=1, pp=2, dp=1)


def test_there_and_back_changes_no_bit_of_any_kind(hf: Path, tmp_path: Path) -> None:
    shape = read_model_shape(hf)
    step = save_step(tmp_path / "run", hf, TP2)
    pp2 = to_layout(step, tmp_path / "pp2", PP2)
    assert_is(pp2, shape, PP2)
    vpp = Topology(tp=2, pp=2, vpp=2, dp=1)
    assert_is(to_layout(pp2, tmp_path / "vpp", vpp), shape, vpp)
    back = to_layout(tmp_path / "vpp", tmp_path / "back", TP2)
    assert_is(back, shape, TP2)
    for folder in (pp2, back):
        assert problems_of(folder, hashes=True) == []
        assert read_details(folder)["step"] == STEP
        assert (folder / "state.json").read_bytes() == (step / "state.json").read_bytes()
        assert (folder / "model" / "README.md").read_text() == "theirs"
        checks = list(verify(folder, hf_config=None, hf=None))
        assert {"weights", "master", "exp_avg", "exp_avg_sq"} < {check.name for check in checks}
        assert [problem for check in checks for problem in check.problems] == []
    assert json.loads((pp2 / INDEX).read_text())["topology"] == {
        "tp": 1, "cp": 1, "pp": 2, "vpp": 1, "dp": 1,
    }  # fmt: skip


def test_a_step_becomes_a_hugging_face_folder_with_a_card(hf: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    step = save_step(run, hf, TP2)
    (run / "config.yaml").write_text(f"model:\n  path: {hf}\nseed: 5\n")
    out = tmp_path / "my-model"
    mcore_to_hf(
        step, out, hf_config=None, dtype=None, max_shard_bytes=2**30, hashes=True, console=QUIET
    )
    assert_equal(load_file(out / "model.safetensors"), kinds_of(read_model_shape(hf))["weight"])
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    card = (out / "README.md").read_text()
    assert "# my-model" in card
    assert f"| step | {STEP} |" in card
    assert f"| base model | `{hf}` |" in card
    assert "| seed | 5 |" in card
    assert (out / "BASE_MODEL_README.md").read_text() == "theirs"
    elsewhere = to_layout(step, tmp_path / "elsewhere", PP2)
    mcore_to_hf(
        elsewhere,
        tmp_path / "other",
        hf_config=None,
        dtype=None,
        max_shard_bytes=2**30,
        hashes=True,
        console=QUIET,
    )
    card = (tmp_path / "other" / "README.md").read_text()
    assert f"| step | {STEP} |" in card
    assert "| seed | not recorded |" in card


def test_what_is_not_there_cannot_be_resharded(hf: Path, tmp_path: Path) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    index = json.loads((step / INDEX).read_text())
    for entries in index["files"].values():
        entries[:] = [
            entry
            for entry in entries
            if not (
                entry["kind"] == "exp_avg" and entry["param"] == "decoder.final_layernorm.weight"
            )
        ]
    rewrite(step, index)
    with pytest.raises(WeightError, match=r"exp_avg: .*model\.norm\.weight.* no source holds"):
        to_layout(step, tmp_path / "out", PP2)
    entries = next(iter(index["files"].values()))
    del entries[next(i for i, entry in enumerate(entries) if entry["kind"] == "master")]
    rewrite(step, index)
    with pytest.raises(WeightError, match=r"master of .* elements .* are there"):
        to_layout(step, tmp_path / "out", PP2)
    with pytest.raises(ConfigError, match="--pp: pp"):
        to_layout(step, tmp_path / "out", Topology(tp=1, pp=5, dp=1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_link_out_of_the_checkpoint_is_not_followed(hf: Path, tmp_path: Path) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    (tmp_path / "secret").write_text("password")
    (step / "model" / "notes").symlink_to(tmp_path / "secret")
    rewrite(step, json.loads((step / INDEX).read_text()))
    with pytest.raises(WeightError, match="model/notes is a link out of the checkpoint"):
        to_layout(step, tmp_path / "out", PP2)
    (step / "model" / "notes").unlink()
    (step / part_name(1)).rename(tmp_path / "shard")
    (step / part_name(1)).symlink_to(tmp_path / "shard")
    rewrite(step, json.loads((step / INDEX).read_text()))
    with pytest.raises(WeightError, match=f"{part_name(1)} is a link out of the checkpoint"):
        to_layout(step, tmp_path / "out", PP2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "secret", "shard"]


@pytest.mark.parametrize(
    ("kind", "value", "fault"),
    [
        ("exp_avg_sq", float("inf"), "NaN or infinite"),
        ("exp_avg_sq", -1e-30, "below 0, which no mean of squares is"),
        ("exp_avg_sq", -0.0, ""),
        ("exp_avg", -1e-30, ""),
    ],
)
def test_moments_that_cannot_be_are_named(
    hf: Path, tmp_path: Path, kind: str, value: float, fault: str
) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    path = step / part_name(1)
    tensors = load_file(path)
    name = next(name for name in tensors if name.startswith(f"{kind}/"))
    tensors[name].view(-1)[-1] = value
    save_file(tensors, path)
    rewrite(step, json.loads((step / INDEX).read_text()))
    problems = {at.name: at.problems for at in verify(step, hf_config=None, hf=None) if at.problems}
    lines = (f"{name.split('/')[2]} (shard 0) holds values that are {fault}",) if fault else ()
    assert problems.pop(kind, ()) == lines
    assert set(problems) <= {f"copies of {kind}"}


def failed(step: Path) -> dict[str, tuple[str, ...]]:
    """What verify has to say once manifest and files agree."""
    rewrite(step, json.loads((step / INDEX).read_text()))
    return {at.name: at.problems for at in verify(step, hf_config=None, hf=None) if at.problems}


def test_fp32_copies_must_be_the_weights(hf: Path, tmp_path: Path) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    tensors = load_file(step / part_name(1))
    name = "master/0/decoder.layers.0.mlp.linear_fc2.weight"
    tensors[name][0] *= 1.5
    save_file(tensors, step / part_name(1))
    assert failed(step) == {
        "master": (f"{name.split('/')[2]} (shard 0) is not the weight of that name, rounded",)
    }


def test_the_optimizers_tensors_must_be_exact(hf: Path, tmp_path: Path) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    for path in step.glob("*.safetensors"):
        at = load_file(path)
        save_file({n: t.bfloat16() if n.startswith("exp_avg/") else t for n, t in at.items()}, path)
    line = "stored as torch.bfloat16; training keeps them in torch.float32"
    assert failed(step) == {"exp_avg": (line,)}


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ({"step": STEP + 1}, f"state.json is of step {STEP + 1}, manifest.json of step {STEP}"),
        ({"step": True}, "state.json is damaged: it does not say the step"),
        ({}, "state.json is damaged: it does not say the step"),
    ],
)
def test_the_state_must_be_of_the_step(
    hf: Path, tmp_path: Path, state: dict[str, Any], fault: str
) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    (step / "state.json").write_bytes(json_bytes(state))
    ((name, (line,)),) = failed(step).items()
    assert name == "training state"
    assert line.endswith(fault)


def test_rows_of_one_tensor_have_one_dtype(hf: Path, tmp_path: Path) -> None:
    """A converter would refuse them."""
    step = save_step(tmp_path / "run", hf, TP2)
    at = load_file(step / part_name(0))
    name = "weight/0/embedding.word_embeddings.weight"
    save_file({**at, name: at[name].float()}, step / part_name(0))
    assert "holds rows of model.embed_tokens.weight as" in failed(step)["weights"][0]


def test_values_that_are_no_numbers_go_along_with_a_warning(
    hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = save_step(tmp_path / "run", hf, TP2)
    at = load_file(step / part_name(1))
    name = "exp_avg/0/decoder.layers.0.mlp.linear_fc2.weight"
    at[name][0] = float("nan")
    save_file(at, step / part_name(1))
    rewrite(step, json.loads((step / INDEX).read_text()))
    out = tmp_path / "out"
    reshard(step, out, topology=PP2, vocab_multiple=64, hashes=True, console=Console(enabled=True))
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("WARNING: written with values that are NaN or infinite: exp_avg ")


def rewrite(step: Path, index: Any) -> None:
    (step / INDEX).write_bytes(json_bytes(index))
    records = {
        str(path.relative_to(step)): record_of(path)
        for path in step.rglob("*")
        if path.is_file() and path.name != "manifest.json"
    }
    write_manifest(step, records, {"step": STEP})
