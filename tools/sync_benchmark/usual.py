"""The usual way to push weights: gather every parameter whole on every rank, let vLLM cut it.

As verl, mbridge and Megatron-Bridge do it, parameter by parameter in the order of the layers: the
owning pipeline stage broadcasts its shard, tensor parallel ranks all-gather it, the result is
turned into Hugging Face tensors, and one call of vLLM's load_weights consumes the stream.
Written to be fast: names and shapes are known beforehand (no objects travel), shards are gathered
into one buffer, and tensors are copied only where Hugging Face's order of rows asks for it.
It shares no code with osft_mcore.weights, so that each way also checks the other.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from osft_mcore.config.model_shape import ModelShape
from osft_mcore.parallel.groups import ParallelContext, all_gather_json
from osft_mcore.rollout.vllm_engine import VllmEngine

NamedTensors = Iterator[tuple[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """One parameter of the actor: where it lives, and what becomes of it."""

    pp_rank: int
    name: str
    """On its stage."""
    shape: tuple[int, ...]
    """Of this rank's tensor parallel shard."""
    layer: int | None
    """Over all stages; None outside the layers."""
    suffix: str
    """The name without the layer."""

    @property
    def replicated(self) -> bool:
        """True for the norms: every tensor parallel rank has all of it."""
        return self.suffix.endswith(("norm.weight", "norm_weight"))


class UsualPush:
    """The actor's parameters to the engine's. Every rank calls every method."""

    def __init__(
        self,
        engine: VllmEngine,
        context: ParallelContext,
        shape: ModelShape,
        parameters: Callable[[], Mapping[str, Tensor]],
        *,
        dtype: torch.dtype,
    ) -> None:
        self._engine, self._context, self._shape = engine, context, shape
        self._parameters, self._dtype = parameters, dtype
        self._stages = dist.get_process_group_ranks(context.pp_group)
        self._shards = [
            shard
            for shard in _all_shards(context, parameters())
            if not (shape.tied and shard.suffix == "output_layer.weight")
        ]
        mine = dtype.itemsize * sum(map(self._elements_received, self._shards))
        self._bytes_received = sum(all_gather_json(mine, context))

    @torch.no_grad()
    def push(self, version: int) -> int:
        """Deliver the actor's weights as `version`; returns the bytes that all ranks received.

        Collective over the world.
        """
        self._engine.begin_update()
        vllm_model(self._engine).load_weights(self._hf_tensors())
        self._engine.finish_update(version)
        return self._bytes_received

    def _hf_tensors(self) -> NamedTensors:
        """All of the checkpoint, one whole parameter at a time."""
        mine = self._parameters()
        for shard in self._shards:
            yield from hf_tensors(shard, self._gathered(shard, mine), self._shape)

    def _gathered(self, shard: Shard, mine: Mapping[str, Tensor]) -> Tensor:
        """[tp, *shard.shape]; [1, *shard.shape] if replicated."""
        context = self._context
        if shard.pp_rank == context.coordinates.pp_rank:
            local = mine[shard.name]
        else:
            local = self._empty(shard.shape)
        if context.topology.pp > 1:
            dist.broadcast(local, self._stages[shard.pp_rank], group=context.pp_group)
        if shard.replicated or context.topology.tp == 1:
            return local[None]
        whole = self._empty((context.topology.tp, *shard.shape))
        dist.all_gather(list(whole.unbind()), local, group=context.tp_group)
        return whole

    def _elements_received(self, shard: Shard) -> int:
        """By this rank: a broadcast, unless it owns the shard, and the other ranks' parts."""
        broadcast = shard.pp_rank != self._context.coordinates.pp_rank
        gathered = 0 if shard.replicated else self._context.topology.tp - 1
        return prod(shard.shape) * (broadcast + gathered)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        return torch.empty(shape, dtype=self._dtype, device=self._context.device)


def vllm_model(engine: VllmEngine) -> Any:
    """The model of this rank's engine, whose load_weights writes into the live parameters."""
    return engine.llm.llm_engine.model_executor.driver_worker.worker.get_model()


def hf_tensors(shard: Shard, parts_P: Tensor, shape: ModelShape) -> NamedTensors:
    """The Hugging Face tensors that the shards of all tensor parallel ranks hold together.

    parts_P: [tensor parallel ranks, *shard.shape].
    """
    at = "" if shard.layer is None else f"model.layers.{shard.layer}."
    joined = parts_P.flatten(0, 1)
    match shard.suffix:
        case "embedding.word_embeddings.weight" | "output_layer.weight":
            yield _NAMES[shard.suffix], joined[: shape.vocab]
        case "self_attention.linear_qkv.weight" | "self_attention.linear_qkv.bias":
            # Megatron-Core puts each group's query heads, key and value together.
            groups = joined.unflatten(0, (shape.num_kv_heads, -1, shape.head_dim))
            kind = shard.suffix.split(".")[-1]
            for name, heads in zip("qkv", (slice(-2), slice(-2, -1), slice(-1, None)), strict=True):
                yield f"{at}self_attn.{name}_proj.{kind}", groups[:, heads].flatten(0, 2)
        case "mlp.linear_fc1.weight":
            # Each rank holds its rows of gate, then its rows of up.
            halves = parts_P.unflatten(1, (2, -1))
            for half, name in enumerate(("gate", "up")):
                yield f"{at}mlp.{name}_proj.weight", halves[:, half].flatten(0, 1)
        case "self_attention.linear_proj.weight" | "mlp.linear_fc2.weight":
            yield f"{at}{_NAMES[shard.suffix]}", parts_P.movedim(0, 1).flatten(1, 2)
        case _:
            yield f"{at}{_NAMES[shard.suffix]}", joined


_NAMES: Final = MappingProxyType(
    {
        "embedding.word_embeddings.weight": "model.embed_tokens.weight",
        "decoder.final_layernorm.weight": "model.norm.weight",
        "output_layer.weight": "lm_head.weight",
        "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
        "mlp.linear_fc2.weight": "mlp.down_proj.weight",
        "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
        "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
        "input_layernorm.weight": "input_layernorm.weight",
        "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
        # Transformer Engine fuses the norm into the linear that follows.
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    }
)
"""Hugging Face's name of what is one tensor there as well, by the shard's suffix."""


def _all_shards(context: ParallelContext, mine: Mapping[str, Tensor]) -> Iterator[Shard]:
    """Every parameter of every stage, told from this rank's own. Collective over the world."""
    own = [(name, tuple(tensor.shape)) for name, tensor in mine.items()]
    everyone = all_gather_json(own, context)
    stages = [everyone[rank] for rank in dist.get_process_group_ranks(context.pp_group)]
    layers_before = 0
    for pp_rank, parameters in enumerate(stages):
        layers_here = 0
        for name, size in parameters:
            layer, suffix = None, name
            if name.startswith("decoder.layers."):
                number, suffix = name.removeprefix("decoder.layers.").split(".", 1)
                layer = layers_before + int(number)
                layers_here = int(number) + 1
            shape = tuple(size)
            yield Shard(pp_rank=pp_rank, name=name, shape=shape, layer=layer, suffix=suffix)
        layers_before += layers_here
