"""The frozen model that the KL penalty measures from, in the actor's layout."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch
from osft_mcore.actor.forward_only import token_figures
from osft_mcore.actor.megatron_layout import actor_layouts, named_parameters
from osft_mcore.actor.start_weights import load_start_weights
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import ModelConfig, ParallelConfig
from osft_mcore.errors import WeightError
from osft_mcore.model.build import build_chunks
from osft_mcore.model.kernels import uses_transformer_engine
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.weights.finite import non_finite


class Reference:
    """One rank's share of the reference model: weights alone, in host memory between uses.

    It never comes from a training checkpoint, so that it is the same when a run goes on.
    """

    def __init__(
        self,
        shape: ModelShape,
        context: ParallelContext,
        *,
        source: ModelConfig,
        parallel: ParallelConfig,
        seed: int,
    ) -> None:
        """The weights that `source` and `seed` name. Every rank must call.

        Raises WeightError if a folder's are not those of `shape`, or one of them is not finite.
        """
        self._shape, self._context = shape, context
        self._sequence_parallel = parallel.sequence_parallel
        self._chunks = build_chunks(
            shape,
            context,
            dtype=torch.bfloat16 if source.dtype == "bf16" else torch.float32,
            sequence_parallel=parallel.sequence_parallel,
            vocab_multiple=source.vocab_multiple,
        )
        layouts = actor_layouts(
            shape,
            context.topology,
            vocab_multiple=source.vocab_multiple,
            transformer_engine=uses_transformer_engine(),
        )
        self._params = named_parameters(self._chunks)
        weights = {name: param.data for name, param in self._params.items()}
        load_start_weights(weights, layouts[context.rank], shape, source, seed=seed)
        if problems := non_finite(weights, whose="the reference model's"):
            # No KL to it would ever be finite.
            raise WeightError(f"algorithm.reference: {source.path}: {problems[0]}")
        self._host = {name: _in_host_memory(weight) for name, weight in weights.items()}
        for name, param in self._params.items():
            param.requires_grad_(False)
            param.data = self._host[name]

    def score(self, batches: Sequence[MicroBatch], *, tau: float) -> list[MicroBatch]:
        """The same micro-batches, with the reference's log-probabilities at temperature `tau`.

        Every rank must call, alike. Those of ranks outside of the last pipeline stage, which
        compute no loss, stay as they are.
        """
        with self._on_device():
            found = token_figures(
                self._chunks,
                batches,
                self._context,
                tau=tau,
                vocab=self._shape.vocab,
                sequence_parallel=self._sequence_parallel,
            )
        if not found:
            return list(batches)
        return [
            replace(batch, reference_logprobs_T=figures.logprobs_train_T)
            for batch, figures in zip(batches, found, strict=True)
        ]

    @contextmanager
    def _on_device(self) -> Iterator[None]:
        """The weights where the actor's are; on CPU they are there already.

        They never change, so the way back is to let go of the copies.
        """
        for name, param in self._params.items():
            param.data = self._host[name].to(self._context.device, non_blocking=True)
        try:
            yield
        finally:
            for name, param in self._params.items():
                param.data = self._host[name]


def _in_host_memory(weight: Tensor) -> Tensor:
    """Pinned, where a device has to fetch it from there."""
    return weight.cpu().pin_memory() if weight.is_cuda else weight
