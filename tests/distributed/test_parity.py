"""The actor computes what transformers computes, whatever the layout."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from models import reference_logits, save_random_model
from ranks import run_ranks

from osft_mcore.actor.actor import Actor
from osft_mcore.config.model_shape import read_model_shape
from osft_mcore.config.schema import ModelConfig, ParallelConfig, RunConfig
from osft_mcore.model.build import output_weight
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import join_groups
from osft_mcore.parallel.topology import Topology
from osft_mcore.train.start import build_actor

LAYOUTS = {
    "tp1": Topology(tp=1, pp=1, dp=1),
    "tp2": Topology(tp=2, pp=1, dp=1),
    "tp2_sp": Topology(tp=2, pp=1, dp=1),
    "pp2": Topology(tp=1, pp=2, dp=1),
    "pp3": Topology(tp=1, pp=3, dp=1),
    "pp2_vpp2": Topology(tp=1, pp=2, dp=1, vpp=2),
    "tp2_pp2": Topology(tp=2, pp=2, dp=1),
    "tp2_pp2_sp": Topology(tp=2, pp=2, dp=1),
    "tp2_pp2_vpp2_sp": Topology(tp=2, pp=2, dp=1, vpp=2),
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen2_tied": {"kind": "qwen2", "tied": True, "vocab": 67},
    "qwen2_untied": {"kind": "qwen2", "tied": False, "vocab": 301, "layers": 3},
    "qwen3_tied": {"kind": "qwen3", "tied": True, "vocab": 129},
    "qwen3_untied": {"kind": "qwen3", "tied": False, "vocab": 67, "layers": 4},
    "llama_untied": {"kind": "llama", "tied": False, "vocab": 255},
    "llama_tied_kv1": {"kind": "llama", "tied": True, "vocab": 33, "kv_heads": 1, "layers": 5},
    "mistral": {"kind": "mistral", "vocab": 190, "kv_heads": 1},
    "llama3_rope": {
        "kind": "llama",
        "vocab": 128,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
}


def actor_logits(actor: Actor, tokens_BS: torch.Tensor, *, sequence_parallel: bool) -> Any:
    """Whole logits [B, S, vocab] on the last stage, None elsewhere."""

    def forward(_batches: Any, model: Any) -> Any:
        positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS).contiguous()
        return model(tokens_BS, positions_BS, None), lambda hidden, **_: hidden

    with megatron_device(), torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=[iter(()) for _ in actor.wrapped],
            model=actor.wrapped,
            # The same tokens as often as the interleaved schedule asks for.
            num_microbatches=actor.context.topology.pp,
            seq_length=tokens_BS.shape[1],
            micro_batch_size=tokens_BS.shape[0],
            forward_only=True,
            collect_non_loss_data=True,
        )
        if not actor.context.is_last_stage:
            return None
        hidden_SBH = outputs[0].transpose(0, 1)
        if sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH)
        local = hidden_SBH.transpose(0, 1) @ output_weight(actor.chunks[-1]).T
        shards = [torch.empty_like(local) for _ in range(actor.context.topology.tp)]
        dist.all_gather(shards, local.contiguous(), group=actor.context.tp_group)
        return torch.cat(shards, dim=-1)[..., : actor.shape.vocab]


def _largest_difference(rank: int, folders: dict[str, Path], layout: str) -> dict[str, float]:
    topology, sp = LAYOUTS[layout], layout.endswith("_sp")
    context = join_groups(topology, device=torch.device("cpu"))
    differences = {}
    for name, folder in folders.items():
        config = RunConfig(
            model=ModelConfig(path=str(folder), dtype="fp32"),
            parallel=ParallelConfig(
                tp=topology.tp, pp=topology.pp, vpp=topology.vpp, sequence_parallel=sp
            ),
        )
        shape = read_model_shape(folder)
        actor = build_actor(config, context)
        torch.manual_seed(1)
        tokens_BS = torch.randint(0, shape.vocab, (2, 16))
        logits = actor_logits(actor, tokens_BS, sequence_parallel=sp)
        if logits is not None:
            expected = reference_logits(folder, tokens_BS)
            differences[name] = float((logits - expected).abs().max())
    return differences


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_random_model(root / name, **kw) for name, kw in MODELS.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_equal_transformers(folders: dict[str, Path], layout: str) -> None:
    topology = LAYOUTS[layout]
    usable = {
        name: folder
        for name, folder in folders.items()
        if read_model_shape(folder).num_layers >= topology.pp * topology.vpp
    }
    results = run_ranks(_largest_difference, topology.world_size, folders=usable, layout=layout)
    seen = {name: diff for part in results for name, diff in part.items()}
    assert seen.keys() == usable.keys() != set()
    # Not max(): it passes over a NaN that does not come first.
    assert all(difference <= 1e-4 for difference in seen.values()), seen
