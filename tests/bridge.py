"""A bridge between tensors in dicts: an actor without Megatron-Core, an engine without vLLM."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from layouts import materialise, model, random_checkpoint, vllm_reference

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import RolloutConfig, SyncConfig, TrainConfig
from osft_mcore.errors import WeightError
from osft_mcore.train.weight_plan import alias_forbidden
from osft_mcore.weights.layout import Layout, Layouts
from osft_mcore.weights.params import hf_layouts, megatron_layouts, vllm_layouts
from osft_mcore.weights.sync import WeightSync
from osft_mcore.weights.ways import Ends

SHAPE = model("qwen2", kv_heads=2)
CPU = torch.device("cpu")
VOCAB_PADDED = 128
"""On both sides, so that embeddings may coincide."""


def actor_side(shape: ModelShape, *, tp: int, pp: int = 1, world: int = 2) -> Layouts:
    return {
        rank: megatron_layouts(
            shape,
            tp=tp,
            tp_rank=rank % tp,
            pp=pp,
            pp_rank=rank // tp % pp,
            vocab_padded=VOCAB_PADDED,
            transformer_engine=False,
        )
        for rank in range(world)
    }


def engine_side(shape: ModelShape, *, tp: int, world: int = 2) -> Layouts:
    return {
        rank: vllm_layouts(shape, tp=tp, tp_rank=rank % tp, vocab_padded=VOCAB_PADDED)
        for rank in range(world)
    }


class DictEngine:
    """Parameters in a dict, and a diary of what was asked of it."""

    def __init__(self, shape: ModelShape, layouts: Mapping[str, Layout], tp: int, rank: int):
        self.shape, self.tp, self.tp_rank = shape, tp, rank % tp
        self.params = {name: torch.full(at.shape, torch.nan) for name, at in layouts.items()}
        self.diary: list[str] = []

    def begin_update(self) -> dict[str, torch.Tensor]:
        if self.diary[-1:] != ["closed"]:
            self.diary.append("closed")
        return dict(self.params)

    def share(self, memory: Mapping[str, torch.Tensor]) -> None:
        self.params.update(memory)

    def reload(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.params = vllm_reference(
            self.shape, dict(tensors), tp=self.tp, tp_rank=self.tp_rank, padded=VOCAB_PADDED
        )

    def finish_update(self, version: int) -> None:
        self.diary.append(f"open at {version}")

    def refuse(self, reason: str) -> None:
        self.diary.append(f"refuses: {reason}")


class Bridge:
    """Actor, engine and sync of one rank; `train` changes the actor's weights in place."""

    def __init__(
        self,
        rank: int,
        *,
        shape: ModelShape = SHAPE,
        tp: int = 2,
        pp: int = 1,
        engine_tp: int = 1,
        world: int = 2,
        sources: Layouts | None = None,
        targets: Layouts | None = None,
        group: Any = None,
        **options: Any,
    ) -> None:
        self.rank = rank
        self.sources = sources or actor_side(shape, tp=tp, pp=pp, world=world)
        self.targets = targets or engine_side(shape, tp=engine_tp, world=world)
        self.checkpoint = random_checkpoint(shape)
        self.weights = self.shard(self.sources)
        self.engine = DictEngine(shape, self.targets[rank], engine_tp, rank)
        ends = Ends(
            rank=rank,
            source_params=lambda: self.weights,
            target=self.engine,
            dtype=torch.float32,
            group=group or dist.group.WORLD,
            device=CPU,
        )
        config = SyncConfig(**{"mode": "copy", "bucket_mib": 1, **options})
        self.sync = WeightSync(
            self.sources,
            self.targets,
            hf_layouts(shape),
            ends,
            config,
            alias_forbidden=alias_forbidden(config, RolloutConfig(), TrainConfig()),
        )

    def shard(self, layouts: Layouts) -> dict[str, torch.Tensor]:
        return {name: materialise(at, self.checkpoint) for name, at in layouts[self.rank].items()}

    def train(self, scale: float) -> None:
        for tensor in self.checkpoint.values():
            tensor *= scale
        for tensor in self.weights.values():
            tensor *= scale

    def expected(self) -> dict[str, torch.Tensor]:
        return self.shard(self.targets)

    def failed_push(self) -> str:
        try:
            self.sync.push()
        except WeightError as error:
            return str(error)
        return "no error"
