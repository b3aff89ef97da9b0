"""An index that is mistaken about which rows a tensor holds is told from one that is right."""

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from layouts import model
from models import save_random_model

from osft_mcore.checkpoint.assemble import megatron_shards, shard_pieces
from osft_mcore.checkpoint.convert import hf_to_mcore
from osft_mcore.checkpoint.index import Index, from_json, to_json
from osft_mcore.checkpoint.layout_check import check_layout
from osft_mcore.checkpoint.manifest import write_manifest
from osft_mcore.checkpoint.verify import verify
from osft_mcore.config.model_shape import ModelShape, padded_vocab
from osft_mcore.errors import WeightError
from osft_mcore.files import record_of
from osft_mcore.log.console import Console
from osft_mcore.parallel.topology import Topology

QKV = "self_attention.linear_qkv.weight"
FC1 = "mlp.linear_fc1.weight"
NORM = "decoder.final_layernorm.weight"
Edit = Callable[[dict[str, Any]], Any]


def index_of(
    shape: ModelShape, topology: Topology, *, multiple: int = 64, engine: bool = False
) -> Index:
    shards = megatron_shards(shape, topology, vocab_multiple=multiple, transformer_engine=engine)
    pieces = tuple(p for shard, at in shards.items() for p in shard_pieces(shard, "weight", at))
    return Index(topology=topology.actor_sizes(), layouts=shards, pieces=pieces)


@pytest.mark.parametrize("engine", [False, True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("tp", "pp", "vpp"), [(1, 1, 1), (2, 1, 1), (8, 1, 1), (1, 2, 1), (4, 3, 1), (2, 2, 2)]
)
def test_what_the_index_does_not_state_is_found_out(
    tp: int, pp: int, vpp: int, tied: bool, engine: bool
) -> None:
    """Padding and names; and five layers divide by no number of stages."""
    shape = model("qwen3", tied=tied, num_layers=5)
    topology = Topology(tp=tp, pp=pp, vpp=vpp, dp=3)
    for multiple in (1, 64, 128):
        found = check_layout(index_of(shape, topology, multiple=multiple, engine=engine), shape)
        padded = padded_vocab(shape.vocab, multiple=multiple, tp=tp)
        assert found.endswith(f" names, vocabulary padded to {padded}")
        assert ("Transformer Engine" in found) == engine
        assert f"that tp {tp}, pp {pp}, vpp {vpp} ask for" in found


def edited(edit: Edit, *, topology: Topology) -> list[str]:
    """What is said of an index after `edit` of its JSON."""
    shape = model(num_layers=4)
    value = copy.deepcopy(to_json(index_of(shape, topology)))
    edit(value)
    with pytest.raises(WeightError) as caught:
        check_layout(from_json(value, Path("index.json")), shape)
    return str(caught.value).splitlines()


def shard(index: dict[str, Any], number: int) -> dict[str, Any]:
    found: dict[str, Any] = index["parameters"][str(number)]
    return found


def exchange(values: Any, one: Any, other: Any) -> None:
    values[one], values[other] = values[other], values[one]


def rename(index: dict[str, Any], number: int, old: str, new: str) -> None:
    shard(index, number)[new] = shard(index, number).pop(old)
    for entries in index["files"].values():
        for entry in entries:
            if (entry["shard"], entry["param"]) == (number, old):
                entry["param"] = new


def test_every_parameter_that_differs_is_named_with_its_shard() -> None:
    def edit(index: dict[str, Any]) -> None:
        rename(index, 1, f"decoder.layers.0.{FC1}", "decoder.layers.0.mlp.linear_fc3.weight")
        exchange(shard(index, 3)[f"decoder.layers.1.{QKV}"]["intervals"], 1, 2)
        shard(index, 0)["embedding.word_embeddings.weight"]["intervals"][0][1:] = [1, 65]

    layer = "model.layers.3.self_attn"
    assert edited(edit, topology=Topology(tp=2, pp=2, dp=1)) == [
        "'embedding.word_embeddings.weight' (shard 0) holds from row 0 on rows 1:65 of "
        "model.embed_tokens.weight, expected rows 0:64 of model.embed_tokens.weight",
        f"'decoder.layers.0.{FC1}' (shard 1) is missing",
        "'decoder.layers.0.mlp.linear_fc3.weight' (shard 1) is not a parameter of this shard",
        f"'decoder.layers.1.{QKV}' (shard 3) holds from row 72 on rows 24:36 of "
        f"{layer}.v_proj.weight, expected rows 24:36 of {layer}.k_proj.weight",
    ]


def test_padding_is_at_the_end_and_alike_in_all_shards() -> None:
    def edit(index: dict[str, Any]) -> None:
        shard(index, 1)["embedding.word_embeddings.weight"]["intervals"].reverse()
        output = shard(index, 1)["output_layer.weight"]
        output["shape"][0] += 64
        output["intervals"].append([None, 0, 64])

    assert edited(edit, topology=Topology(tp=2, pp=1, dp=1)) == [
        "'embedding.word_embeddings.weight' (shard 1) holds from row 0 on 27 rows of padding, "
        "expected rows 64:101 of model.embed_tokens.weight",
        "'output_layer.weight' (shard 1) has shape (128, 24), cut along dim 0; expected (64, 24), "
        "dim 0",
    ]


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"tp": 1, "pp": 2}, "'output_layer.weight' (shard 0) is not a parameter of this shard"),
        ({"tp": 1}, "index.json holds the shards 0, 1; tp 1, pp 1, vpp 1 ask for 0 to 0"),
        ({"pp": 10**12}, "index.json holds the shards 0, 1; tp 2, pp 1000000000000, vpp 1 ask"),
        ({"vpp": 2}, "'chunks.0.decoder.layers.0.input_layernorm.weight' (shard 0) is missing"),
        ({"vpp": 5}, "parallel.pp * vpp = 1 * 5 = 5 model chunks, but the model has 4 layers"),
        ({"vpp": None}, "index.json states vpp None, expected 1 or more"),
        ({"tp": 0}, "index.json states tp 0, expected 1 or more"),
        ({"cp": 0}, "index.json states cp 0, expected 1 or more"),
    ],
)
def test_shards_are_those_of_the_stated_sizes(stated: dict[str, Any], message: str) -> None:
    def edit(index: dict[str, Any]) -> None:
        index["topology"] |= stated
        index["topology"] = {k: v for k, v in index["topology"].items() if v is not None}

    lines = edited(edit, topology=Topology(tp=2, pp=1, dp=1))
    assert any(line.startswith(message) for line in lines), lines


@pytest.mark.parametrize("cp", [None, 2])
def test_context_parallel_ranks_hold_copies(cp: int | None) -> None:
    """And checkpoints of before there were any do not state their number."""
    shape = model(num_layers=4)
    value = to_json(index_of(shape, Topology(tp=2, pp=1, dp=1, cp=cp or 1)))
    if cp is None:
        del value["topology"]["cp"]
    assert "that tp 2, pp 1, vpp 1 ask for" in check_layout(from_json(value, Path("x")), shape)


def test_a_copy_that_no_file_holds_is_missed() -> None:
    """Its rows are there all the same: another shard has them."""

    def edit(index: dict[str, Any]) -> None:
        entries = index["files"]["rank_00001.safetensors"]
        entries[:] = [entry for entry in entries if entry["param"] != NORM]

    lines = edited(edit, topology=Topology(tp=2, pp=1, dp=1))
    assert lines == [f"'{NORM}' (shard 1) has no tensor of kind weight"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoint")
    hf_to_mcore(
        save_random_model(root / "hf", "qwen3", layers=3),
        root / "mcore",
        topology=Topology(tp=2, pp=1, dp=1),
        vocab_multiple=64,
        dtype=None,
        target="safetensors",
        console=Console(enabled=False),
    )
    return root / "mcore"


LAYER = "decoder.layers.1."


@pytest.mark.parametrize(
    ("edit", "params"),
    [
        (lambda at: exchange(at[LAYER + QKV]["intervals"], 1, 2), [LAYER + QKV]),
        (lambda at: at[LAYER + FC1]["intervals"].reverse(), [LAYER + FC1]),
        (
            lambda at: exchange(at, f"decoder.layers.0.{QKV}", f"decoder.layers.2.{QKV}"),
            [f"decoder.layers.0.{QKV}", f"decoder.layers.2.{QKV}"],
        ),
        (
            lambda at: exchange(at, f"{LAYER}input_layernorm.weight", NORM),
            [f"{LAYER}input_layernorm.weight", NORM],
        ),
    ],
)
def test_no_other_question_finds_rows_that_are_exchanged(
    checkpoint: Path, tmp_path: Path, edit: Edit, params: list[str]
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "mcore")
    index = json.loads((folder / "index.json").read_text())
    for params_of_shard in index["parameters"].values():
        edit(params_of_shard)
    (folder / "index.json").write_text(json.dumps(index))
    files = [at for at in folder.rglob("*") if at.is_file() and at.name != "manifest.json"]
    write_manifest(folder, {str(at.relative_to(folder)): record_of(at) for at in files}, {})
    answers = {check.name: check.problems for check in verify(folder, hf_config=None, hf=None)}
    lines = answers.pop("layout")
    assert len(lines) == 2 * len(params)
    for number in (0, 1):
        for param in params:
            assert any(line.startswith(f"'{param}' (shard {number}) holds from") for line in lines)
    assert set(answers.values()) == {()}
