"""What is measured: two models, the layouts, and the configuration of each run."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

from osft_mcore.config.schema import (
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
)
from osft_mcore.parallel.topology import Topology

Dtype = Literal["bf16", "fp32"]

TOKENS: Final = 128
"""Longest prompt and longest answer; nothing is sampled, so the engine only has to start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """Dimensions of a random Qwen3-like model; embedding and output layer are two weights."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    bucket_mib: int
    """sync.bucket_mib; less than one rank's share of the model, so that the cap means something."""
    rounds: int
    head_dim: int = 64


# fmt: off
MODELS: Final[Mapping[str, Model]] = MappingProxyType({
    "200M": Model(layers=12, hidden=1024, heads=16, kv_heads=8, ffn=3072, vocab=24000,
                  bucket_mib=64, rounds=5),
    "20M": Model(layers=8, hidden=384, heads=8, kv_heads=4, ffn=1024, vocab=8000,
                 bucket_mib=4, rounds=7),
})
# fmt: on

DEFAULT_LAYOUTS: Final = ("tp4-tp4", "tp2pp2-tp4", "tp4-tp2x2", "tp2dp2-tp4", "tp2-tp2")
"""Not tp2-tp1x2: every engine holds the whole model, so both ways move the same bytes."""
LAYOUTS: Final[Mapping[str, Topology]] = MappingProxyType(
    {
        "tp4-tp4": Topology(tp=4, pp=1, dp=1, rollout_tp=4),
        "tp2pp2-tp4": Topology(tp=2, pp=2, dp=1, rollout_tp=4),
        "tp4-tp2x2": Topology(tp=4, pp=1, dp=1, rollout_tp=2),
        "tp2dp2-tp4": Topology(tp=2, pp=1, dp=2, rollout_tp=4),
        "tp2-tp2": Topology(tp=2, pp=1, dp=1, rollout_tp=2),
        "tp2-tp1x2": Topology(tp=2, pp=1, dp=1, rollout_tp=1),
    }
)
"""The actor's, then the rollout's; x2 are two replicas."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What one row of the table measures."""

    model: Model
    layout: str
    """The actor's and the rollout's, as in LAYOUTS."""
    topology: Topology
    dtype: Dtype
    sync: SyncConfig
    rounds: int
    """Timed pushes of each way."""

    @property
    def actor(self) -> str:
        """The actor's layout in words."""
        return self.layout.split("-")[0]

    @property
    def rollout(self) -> str:
        """The rollout's layout in words."""
        return self.layout.split("-")[1]


def make_cases(
    models: Sequence[str],
    layouts: Sequence[str],
    *,
    mode: Literal["copy", "auto"],
    verify: Literal["off", "sample", "full"],
    dtype: Dtype,
    bucket_mib: int | None,
    rounds: int | None,
) -> list[Case]:
    """Every layout of every model; None is the model's own value."""
    return [
        Case(
            model=MODELS[model],
            layout=layout,
            topology=LAYOUTS[layout],
            dtype=dtype,
            sync=SyncConfig(
                mode=mode, verify=verify, bucket_mib=bucket_mib or MODELS[model].bucket_mib
            ),
            rounds=rounds or MODELS[model].rounds,
        )
        for model in models
        for layout in layouts
    ]


def write_model(folder: Path, model: Model) -> None:
    """Write the config.json from which actor and engine build the model."""
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.ffn,
        "vocab_size": model.vocab,
        "hidden_act": "silu",
        "max_position_embeddings": 2 * TOKENS,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def run_config(case: Case, folder: Path) -> RunConfig:
    """A run of this case on the model in `folder`, weights drawn from the seed."""
    topology = case.topology
    return RunConfig(
        model=ModelConfig(path=str(folder), init="random", dtype=case.dtype),
        parallel=ParallelConfig(tp=topology.tp, pp=topology.pp, dp=topology.dp),
        rollout=RolloutConfig(
            tp=topology.rollout_tp,
            max_prompt_tokens=TOKENS,
            max_response_tokens=TOKENS,
            max_num_seqs=4,
            kv_cache_gib=0.05,
        ),
        data=DataConfig(train="never read"),
        sync=case.sync,
    )
