"""Plain Megatron-Core loads what we write in its own format, and we read what it saves."""

import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import assert_equal, megatron_reference
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.validation import StrictHandling
from models import save_random_model
from ranks import run_ranks
from safetensors.torch import load_file

from osft_mcore.actor.optimizer import set_learning_rate
from osft_mcore.checkpoint.torch_dist_reader import TorchDistSource
from osft_mcore.checkpoint.torch_dist_writer import write_torch_dist
from osft_mcore.config.model_shape import padded_vocab, read_model_shape
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig
from osft_mcore.model.build import build_chunks
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext, join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.start import build_actor
from osft_mcore.weights.fill import filled
from osft_mcore.weights.params import chunk_prefix, hf_layouts
from osft_mcore.weights.safetensors_io import HfSource

MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"kind": "qwen2", "tied": True, "vocab": 67, "layers": 5},
    "qwen3_untied": {"kind": "qwen3", "tied": False, "vocab": 129, "layers": 4},
    "llama_untied": {"kind": "llama", "tied": False, "vocab": 255, "kv_heads": 1, "layers": 4},
    "llama_tied": {"kind": "llama", "tied": True, "vocab": 190, "layers": 4},
}
WRITTEN = [(1, 1), (2, 1), (1, 2), (2, 2)]
FOR_ENGINE = (2, 2)
WRITTEN_MULTIPLE, LOADED_MULTIPLE = 8, 64
"""So that most vocabularies are padded to another size in the checkpoint than in the model."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_random_model(root / name, **kw) for name, kw in MODELS.items()}


@pytest.fixture(scope="module")
def written(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, int], Path]:
    """Every model, in one checkpoint for each layout."""
    root = tmp_path_factory.mktemp("written")
    found = {}
    for name, folder in folders.items():
        for tp, pp in WRITTEN:
            out = found[name, tp, pp] = root / f"{name}_{tp}_{pp}"
            out.mkdir()
            write_torch_dist(
                out,
                HfSource(folder),
                read_model_shape(folder),
                tp=tp,
                pp=pp,
                vocab_multiple=WRITTEN_MULTIPLE,
                dtype=None,
                transformer_engine=(tp, pp) == FOR_ENGINE,
                note=lambda _key, _num_bytes: None,
            )
    return found


def keyed(chunks: list[Any]) -> Iterator[tuple[str, str, Any]]:
    """Our prefix, Megatron-LM's key, and each model chunk."""
    for number, chunk in enumerate(chunks):
        prefix = chunk_prefix(number, len(chunks))
        yield prefix, f"model{number}" if prefix else "model", chunk


def load(
    _rank: int,
    folders: dict[str, Path],
    written: dict[tuple[str, int, int], Path],
    topology: Topology,
) -> list[str]:
    """Load every checkpoint into models full of NaN and compare all parameters."""
    context = join_groups(topology, device=torch.device("cpu"))
    done = []
    for (name, tp, pp), path in written.items():
        chunks = model_chunks(folders[name], context)
        for chunk in chunks:
            for param in chunk.parameters():
                param.data.fill_(torch.nan)
        # Transformer Engine asks for more than the local spec, which by default may be there.
        for_engine = (tp, pp) == FOR_ENGINE
        strict = StrictHandling.ASSUME_OK_UNEXPECTED if for_engine else StrictHandling.RAISE_ALL
        # As Megatron-LM does; others leave it to the defaults.
        content = dist_checkpointing.load_content_metadata(str(path)) if for_engine else None
        assert (content is not None) == for_engine
        with megatron_device():
            state = {
                key: chunk.sharded_state_dict(metadata=content) for _, key, chunk in keyed(chunks)
            }
            loaded = dist_checkpointing.load(state, str(path), strict=strict)
        found = {}
        for prefix, key, chunk in keyed(chunks):
            chunk.load_state_dict(loaded[key])
            found |= {prefix + param: value.data for param, value in chunk.named_parameters()}
        assert_equal(found, expected_params(folders[name], context))
        done.append(path.name)
    return done


def model_chunks(folder: Path, context: ParallelContext) -> list[Any]:
    return build_chunks(
        read_model_shape(folder),
        context,
        dtype=torch.float32,
        sequence_parallel=False,
        vocab_multiple=LOADED_MULTIPLE,
    )


def expected_params(folder: Path, context: ParallelContext) -> dict[str, torch.Tensor]:
    shape, topology, place = read_model_shape(folder), context.topology, context.coordinates
    return megatron_reference(
        shape,
        load_file(folder / "model.safetensors"),
        tp=topology.tp,
        tp_rank=place.tp_rank,
        pp=topology.pp,
        pp_rank=place.pp_rank,
        vpp=topology.vpp,
        padded=padded_vocab(shape.vocab, multiple=LOADED_MULTIPLE, tp=topology.tp),
    )


@pytest.mark.parametrize(
    "topology",
    [
        Topology(tp=1, pp=1, dp=1),
        Topology(tp=2, pp=1, dp=1),
        Topology(tp=1, pp=2, dp=1, vpp=2),
        Topology(tp=2, pp=2, dp=1),
    ],
    ids=["tp1", "tp2", "pp2_vpp2", "tp2_pp2"],
)
def test_megatron_core_loads_what_we_write(
    folders: dict[str, Path], written: dict[tuple[str, int, int], Path], topology: Topology
) -> None:
    results = run_ranks(
        load, topology.world_size, folders=folders, written=written, topology=topology
    )
    assert results == [[path.name for path in written.values()]] * topology.world_size


SAVED = {
    "stacked": None,
    "layers_apart": {"non_homogeneous_layers": True},
    "halves_apart": {"singleton_local_shards": True},
}
"""What Megatron-LM calls the metadata of a checkpoint's content."""


def save(
    rank: int, folders: dict[str, Path], out: Path, topology: Topology, kind: str, optimizer: bool
) -> None:
    """Load each model into an actor and save that, as Megatron-LM does."""
    # Otherwise Megatron-Core starts a process here to hold a queue.
    filesystem_async._results_queue = queue.Queue()
    context = join_groups(topology, device=torch.device("cpu"))
    for name, folder in folders.items():
        actor = build_actor(
            RunConfig(
                model=ModelConfig(path=str(folder), dtype="fp32"),
                parallel=ParallelConfig(tp=topology.tp, pp=topology.pp, vpp=topology.vpp),
            ),
            context,
        )
        path = out / name
        if rank == 0:
            path.mkdir()
        torch.distributed.barrier()
        with megatron_device():
            state: dict[str, Any] = {
                key: chunk.sharded_state_dict(metadata=SAVED[kind])
                for _, key, chunk in keyed(actor.chunks)
            }
            if optimizer:
                # A step that moves nothing: only then is there a state.
                set_learning_rate(actor.optimizer, 0.0)
                actor.optimizer.step()
                state["optimizer"] = actor.optimizer.sharded_state_dict(
                    state, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
                )
            dist_checkpointing.save(state, str(path))


@pytest.mark.parametrize(
    ("topology", "kind", "optimizer"),
    [
        (Topology(tp=1, pp=1, dp=2), "stacked", True),
        (Topology(tp=2, pp=1, dp=1), "halves_apart", False),
        (Topology(tp=1, pp=2, dp=1, vpp=2), "layers_apart", False),
        (Topology(tp=2, pp=2, dp=1), "stacked", False),
    ],
    ids=["dp2_optimizer", "tp2_halves_apart", "pp2_vpp2_layers_apart", "tp2_pp2"],
)
def test_we_read_what_megatron_core_saves(
    folders: dict[str, Path], tmp_path: Path, topology: Topology, kind: str, optimizer: bool
) -> None:
    run_ranks(
        save,
        topology.world_size,
        folders=folders,
        out=tmp_path,
        topology=topology,
        kind=kind,
        optimizer=optimizer,
    )
    for name, folder in folders.items():
        shape = read_model_shape(folder)
        source = TorchDistSource(tmp_path / name, shape)
        assert ("optimizer" in (tmp_path / name / ".metadata").read_text("latin1")) == optimizer
        tensors = filled(
            hf_layouts(shape), source.layouts, source.rows, dtype=lambda _name: torch.float32
        )
        assert_equal(dict(tensors), load_file(folder / "model.safetensors"))
