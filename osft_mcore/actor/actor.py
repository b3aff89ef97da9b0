"""The trained model on this rank: weights, forward and backward, optimizer updates."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch, micro_batches
from osft_mcore.actor.megatron_layout import actor_layouts
from osft_mcore.actor.optimizer import build_optimizer, set_learning_rate, wrap_data_parallel
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from osft_mcore.loss.vocab_parallel import token_statistics
from osft_mcore.model.build import build_chunks, output_weight, uses_transformer_engine
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.records import Example
from osft_mcore.weights.fill import random_into
from osft_mcore.weights.params import chunk_prefix
from osft_mcore.weights.safetensors_io import load_into


@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateResult:
    """What one optimizer update did, the same on every rank."""

    loss: float
    """Weighted sum that was minimised."""
    nll: float
    """Mean negative log-likelihood of the response tokens at tau_train."""
    entropy: float
    """Mean entropy at tau_train, in nats."""
    grad_norm: float
    """Before clipping."""
    num_tokens: int
    """Response tokens in the loss."""
    agreement: "Agreement | None"
    """Present when the examples carry the rollout engine's log-probabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """|log pi_rollout - log pi_actor| over the same tokens at the same temperature."""

    mean: float
    max_by_replica: tuple[float, ...]

    @property
    def max(self) -> float:
        """Over all replicas."""
        return max(self.max_by_replica)


class Actor:
    """One rank's share of the trained model. Every rank calls every method."""

    def __init__(
        self,
        shape: ModelShape,
        context: ParallelContext,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        train: TrainConfig,
        algorithm: AlgorithmConfig,
        max_response_tokens: int,
        seed: int,
    ) -> None:
        self.shape, self.context = shape, context
        self.model, self.train, self.algorithm = model, train, algorithm
        self.max_response_tokens = max_response_tokens
        self.sequence_parallel = parallel.sequence_parallel
        self.dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
        distributed = parallel.distributed_optimizer
        self.chunks = build_chunks(
            shape,
            context,
            dtype=self.dtype,
            sequence_parallel=parallel.sequence_parallel,
            vocab_multiple=model.vocab_multiple,
        )
        self.layouts = actor_layouts(
            shape,
            context.topology,
            vocab_multiple=model.vocab_multiple,
            transformer_engine=uses_transformer_engine(),
        )
        self._load_weights(seed)
        with megatron_device():
            self.wrapped = [
                wrap_data_parallel(chunk, distributed_optimizer=distributed)
                for chunk in self.chunks
            ]
            self.optimizer = build_optimizer(
                self.wrapped, train, dtype=self.dtype, distributed_optimizer=distributed
            )

    def parameters(self) -> dict[str, Tensor]:
        """This rank's live parameters, by the names of its layouts."""
        return {
            chunk_prefix(number, len(self.chunks)) + name: parameter.data
            for number, chunk in enumerate(self.chunks)
            for name, parameter in chunk.named_parameters()
        }

    def update(self, examples: Sequence[Example], *, tau_sample: float, lr: float) -> UpdateResult:
        """One optimizer update on the whole batch `examples`, which every rank passes alike."""
        set_learning_rate(self.optimizer, lr)
        with megatron_device():
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            parts = self._forward_backward(examples, tau_sample=tau_sample, forward_only=False)
            _success, grad_norm, _num_zeros = self.optimizer.step()
        return self._result(parts, grad_norm=float(grad_norm or 0.0))

    def score(self, examples: Sequence[Example], *, tau_sample: float) -> UpdateResult:
        """The same statistics without training."""
        with megatron_device(), torch.no_grad():
            parts = self._forward_backward(examples, tau_sample=tau_sample, forward_only=True)
        return self._result(parts, grad_norm=0.0)

    def _load_weights(self, seed: int) -> None:
        parameters = self.parameters()
        if self.model.init == "random":
            random_into(parameters, self.layouts[self.context.rank], self.shape, seed)
        else:
            load_into(parameters, self.layouts[self.context.rank], self.model.path)

    def _forward_backward(
        self, examples: Sequence[Example], *, tau_sample: float, forward_only: bool
    ) -> list["_Sums"]:
        topology = self.context.topology
        batches = micro_batches(
            examples,
            dp=topology.dp,
            dp_rank=self.context.coordinates.dp_rank,
            micro_batch_size=self.train.micro_batch_size,
            pad_to_multiple=topology.tp if self.sequence_parallel else 1,
            algorithm=self.algorithm,
            max_response_tokens=self.max_response_tokens,
        )
        parts: list[_Sums] = get_forward_backward_func()(
            forward_step_func=partial(self._forward, tau_sample=tau_sample),
            # Every chunk sees every micro-batch.
            data_iterator=[iter(batches) for _ in self.wrapped],
            model=self.wrapped,
            num_microbatches=len(batches),
            # Shapes travel with the activations between stages, so this is only nominal.
            seq_length=batches[0].tokens_BS.shape[1],
            micro_batch_size=self.train.micro_batch_size,
            forward_only=forward_only,
        )
        return parts

    def _forward(
        self, batches: Iterator[MicroBatch], model: Any, *, tau_sample: float
    ) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.context.device)
        hidden = model(batch.tokens_BS, batch.positions_BS, None)
        return hidden, partial(self._loss, batch, tau_sample)

    def _loss(
        self, batch: MicroBatch, tau_sample: float, hidden_BSH: Tensor
    ) -> tuple[Tensor, Tensor, "_Sums"]:
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(
                hidden_BSH.transpose(0, 1), tensor_parallel_output_grad=False
            )
            hidden_BSH = hidden_SBH.transpose(0, 1)
        statistics = token_statistics(
            hidden_BSH.flatten(0, 1)[batch.predictor_T],
            output_weight(self.chunks[-1]),
            batch.targets_T,
            tau_train=self.algorithm.tau_train,
            tau_sample=tau_sample,
            vocab=self.shape.vocab,
            tp_group=self.context.tp_group,
        )
        loss = -(batch.weights_T * statistics.logprobs_train_T).sum()
        num_tokens = torch.tensor(batch.targets_T.numel(), dtype=torch.int, device=loss.device)
        sums = _Sums.of(batch, statistics, loss, num_replicas=self.context.topology.num_replicas)
        return loss, num_tokens, sums

    def _result(self, parts: list["_Sums"], *, grad_norm: float) -> UpdateResult:
        totals, peaks = self._reduce(parts)
        loss, nll, entropy, num_tokens, diff, num_compared = totals.tolist()
        agreement = None
        if num_compared:
            agreement = Agreement(mean=diff / num_compared, max_by_replica=tuple(peaks.tolist()))
        return UpdateResult(
            loss=loss,
            nll=nll / max(num_tokens, 1),
            entropy=entropy / max(num_tokens, 1),
            grad_norm=grad_norm,
            num_tokens=int(num_tokens),
            agreement=agreement,
        )

    def _reduce(self, parts: list["_Sums"]) -> tuple[Tensor, Tensor]:
        """Sums and maxima over micro-batches and ranks; each token counted once."""
        context = self.context
        totals = torch.zeros(_NUM_TOTALS, dtype=torch.float64, device=context.device)
        peaks = torch.zeros(context.topology.num_replicas, device=context.device)
        if context.is_last_stage and context.coordinates.tp_rank == 0:
            for part in parts:
                totals += part.totals
                peaks = torch.maximum(peaks, part.peaks)
        dist.all_reduce(totals, group=context.world_group)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=context.world_group)
        return totals, peaks


_NUM_TOTALS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """One micro-batch's contribution to the statistics."""

    totals: Tensor
    """loss, nll, entropy, tokens in the loss, |logprob diff|, tokens compared"""
    peaks: Tensor
    """Largest |logprob diff| by rollout replica."""

    @staticmethod
    def of(batch: MicroBatch, statistics: Any, loss: Tensor, *, num_replicas: int) -> "_Sums":
        trained_T = batch.weights_T > 0
        diff_T = (statistics.logprobs_sample_T - batch.rollout_logprobs_T).abs().detach()
        compared_T = ~batch.rollout_logprobs_T.isnan()
        # A NaN on the actor's side must reach the gate, not vanish in a maximum.
        diff_T = torch.where(compared_T, diff_T.nan_to_num(nan=torch.inf), 0.0)
        peaks = torch.zeros(num_replicas, device=loss.device)
        peaks.scatter_reduce_(0, batch.replicas_T, diff_T, reduce="amax")
        totals = torch.stack(
            [
                loss.detach().double(),
                -statistics.logprobs_train_T.detach()[trained_T].double().sum(),
                statistics.entropy_T.detach()[trained_T].double().sum(),
                trained_T.sum().double(),
                diff_T.double().sum(),
                compared_T.sum().double(),
            ]
        )
        return _Sums(totals=totals, peaks=peaks)
