"""The trained model on this rank: weights, forward and backward, optimizer updates."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch, micro_batches
from osft_mcore.actor.megatron_layout import actor_layouts, named_parameters
from osft_mcore.actor.optimizer import (
    build_optimizer,
    gradient_norm,
    set_learning_rate,
    take_step,
    wrap_data_parallel,
)
from osft_mcore.actor.reference import Reference
from osft_mcore.actor.response_loss import response_loss
from osft_mcore.actor.restore import restore
from osft_mcore.actor.start_weights import load_start_weights
from osft_mcore.actor.training_state import StateTensor, adam_step, set_adam_step, training_state
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from osft_mcore.loss.linear import TokenLoss
from osft_mcore.loss.objectives import kl_estimate, token_objective
from osft_mcore.model.build import build_chunks, output_weight, uses_transformer_engine
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.records import Example


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
    kl: float | None = None
    """Mean algorithm.kl_kind of the response tokens; None without a reference model."""
    not_finite: str = ""
    """What was NaN or infinite, on any rank; empty if nothing was."""

    @property
    def skipped(self) -> bool:
        """True if weights and optimizer were therefore left as they are."""
        return bool(self.not_finite)


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
        checkpoint: Path | None = None,
        reference: Reference | None = None,
    ) -> None:
        """`checkpoint`: take weights and optimizer from there instead of from the model.

        `reference`: what algorithm.kl_coef > 0 measures from.
        """
        assert (reference is None) == (algorithm.kl_coef == 0), "one needs the other"
        self.shape, self.context, self.reference = shape, context, reference
        self.model, self.train, self.algorithm = model, train, algorithm
        self.max_response_tokens = max_response_tokens
        self.sequence_parallel = parallel.sequence_parallel
        self._before_step: Callable[[], None] | None = None
        self.dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
        # Alone it would share with nobody, and copy all gradients and weights each update.
        distributed = parallel.distributed_optimizer and context.topology.dp > 1
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
        layout = self.layouts[context.rank]
        if checkpoint is None:
            load_start_weights(self.parameters(), layout, shape, model, seed=seed)
        with megatron_device():
            self.wrapped = [
                wrap_data_parallel(chunk, distributed_optimizer=distributed)
                for chunk in self.chunks
            ]
            self.optimizer = build_optimizer(
                self.wrapped, train, dtype=self.dtype, distributed_optimizer=distributed
            )
        if checkpoint is not None:
            restore(self.training_state(), layout, self.shard, checkpoint)

    @property
    def shard(self) -> int:
        """Which of the model's tp * pp shards this rank holds."""
        place = self.context.coordinates
        return place.pp_rank * self.context.topology.tp + place.tp_rank

    def parameters(self) -> dict[str, Tensor]:
        """This rank's live parameters, by the names of its layouts."""
        return {name: parameter.data for name, parameter in named_parameters(self.chunks).items()}

    def update(
        self,
        examples: Sequence[Example],
        *,
        tau_sample: float,
        lr: float,
        tau_train: float | None = None,
    ) -> UpdateResult:
        """One optimizer update on the whole batch `examples`, which every rank passes alike.

        `tau_sample`: of the examples' log-probabilities. `tau_train` None: algorithm.tau_train.
        No rank takes the step if the loss or a gradient is not finite on one of them.
        """
        set_learning_rate(self.optimizer, lr)
        with megatron_device():
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            taus = self._taus(tau_train, tau_sample)
            parts = self._forward_backward(examples, taus, forward_only=False)
            grad_norm = gradient_norm(self.optimizer)
            result = self._result(parts, grad_norm=grad_norm)
            if not result.skipped:
                self._let_readers_finish()
                take_step(self.optimizer, grad_norm=grad_norm)
        return result

    def call_before_step(self, call: Callable[[], None]) -> None:
        """Somebody reads the training state: call this once, before the next optimizer step."""
        self._before_step = call

    def _let_readers_finish(self) -> None:
        call, self._before_step = self._before_step, None
        if call is not None:
            call()

    def score(
        self, examples: Sequence[Example], *, tau_sample: float, tau_train: float | None = None
    ) -> UpdateResult:
        """The same statistics without training."""
        with megatron_device(), torch.no_grad():
            taus = self._taus(tau_train, tau_sample)
            parts = self._forward_backward(examples, taus, forward_only=True)
        return self._result(parts, grad_norm=0.0)

    def _taus(self, tau_train: float | None, tau_sample: float) -> "_Temperatures":
        if tau_train is None:
            assert not self.algorithm.follow_tau_sample, "the step's tau_sample is not known here"
            tau_train = self.algorithm.tau_train
        return _Temperatures(train=tau_train, sample=tau_sample)

    def training_state(self) -> list[StateTensor]:
        """The live tensors of weights and optimizer that this rank holds."""
        named, dp = named_parameters(self.chunks), self.context.topology.dp
        dp_rank = self.context.coordinates.dp_rank
        return training_state(self.optimizer, named, dp=dp, dp_rank=dp_rank)

    @property
    def num_updates(self) -> int:
        """Updates that Adam has made; its bias correction depends on it."""
        return adam_step(self.optimizer)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        set_adam_step(self.optimizer, value)

    def _forward_backward(
        self, examples: Sequence[Example], taus: "_Temperatures", *, forward_only: bool
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
        if self.reference is not None:
            batches = self.reference.score(batches, tau=taus.train)
        parts: list[_Sums] = get_forward_backward_func()(
            forward_step_func=partial(self._forward, taus=taus),
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
        self, batches: Iterator[MicroBatch], model: Any, *, taus: "_Temperatures"
    ) -> tuple[Tensor, Any]:
        batch = next(batches).to(self.context.device)
        hidden = model(batch.tokens_BS, batch.positions_BS, None)
        return hidden, partial(self._loss, batch, taus)

    def _loss(
        self, batch: MicroBatch, taus: "_Temperatures", hidden_BSH: Tensor
    ) -> tuple[Tensor, Tensor, "_Sums"]:
        found = response_loss(
            hidden_BSH,
            output_weight(self.chunks[-1]),
            batch,
            token_objective(batch.weights_T, self.algorithm, batch.reference_logprobs_T),
            tau_train=taus.train,
            tau_sample=taus.sample,
            vocab=self.shape.vocab,
            tp_group=self.context.tp_group,
            sequence_parallel=self.sequence_parallel,
        )
        num_tokens = torch.tensor(
            batch.targets_T.numel(), dtype=torch.int, device=self.context.device
        )
        num_replicas = self.context.topology.num_replicas
        sums = _Sums.of(batch, found, self.algorithm, num_replicas=num_replicas)
        return found.loss, num_tokens, sums

    def _result(self, parts: list["_Sums"], *, grad_norm: float) -> UpdateResult:
        totals, peaks = self._reduce(parts, grad_norm=grad_norm)
        loss, nll, entropy, kl, num_tokens, diff, num_compared, broken_norm = totals.tolist()
        if broken_norm:
            # Perhaps another rank's: copies of the model are reduced alike, but may break alone.
            grad_norm = broken_norm
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
            kl=None if self.reference is None else kl / max(num_tokens, 1),
            not_finite=_not_finite({"loss": loss, "gradient norm": grad_norm}),
        )

    def _reduce(self, parts: list["_Sums"], *, grad_norm: float) -> tuple[Tensor, Tensor]:
        """Sums and maxima over micro-batches and ranks; each token counted once.

        One more total is 0 if `grad_norm` is finite on all ranks, else NaN or infinity.
        """
        context = self.context
        totals = torch.zeros(_NUM_TOTALS + 1, dtype=torch.float64, device=context.device)
        peaks = torch.zeros(context.topology.num_replicas, device=context.device)
        if context.is_last_stage and context.coordinates.tp_rank == 0:
            for part in parts:
                totals[:_NUM_TOTALS] += part.totals
                peaks = torch.maximum(peaks, part.peaks)
        totals[_NUM_TOTALS] = 0.0 if math.isfinite(grad_norm) else grad_norm
        dist.all_reduce(totals, group=context.world_group)
        dist.all_reduce(peaks, op=dist.ReduceOp.MAX, group=context.world_group)
        return totals, peaks


_NUM_TOTALS = 7


def _not_finite(figures: Mapping[str, float]) -> str:
    broken = [(name, value) for name, value in figures.items() if not math.isfinite(value)]
    return ", ".join(f"{name} is {value}" for name, value in broken)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Temperatures:
    """Of one optimizer batch."""

    train: float
    """Of the loss."""
    sample: float
    """Of the log-probabilities that are held against the rollout engine's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sums:
    """One micro-batch's contribution to the statistics."""

    totals: Tensor
    """loss, nll, entropy, KL estimate, tokens in the loss, |logprob diff|, tokens compared"""
    peaks: Tensor
    """Largest |logprob diff| by rollout replica."""

    @staticmethod
    def of(
        batch: MicroBatch, found: TokenLoss, algorithm: AlgorithmConfig, *, num_replicas: int
    ) -> "_Sums":
        trained_T = batch.weights_T > 0
        kl_T = torch.zeros_like(found.logprobs_train_T)
        if algorithm.kl_coef > 0:
            kl_T = kl_estimate(
                found.logprobs_train_T, batch.reference_logprobs_T, algorithm.kl_kind
            )
        diff_T = (found.logprobs_sample_T - batch.rollout_logprobs_T).abs()
        compared_T = ~batch.rollout_logprobs_T.isnan()
        # A NaN on the actor's side must reach the gate, not vanish in a maximum.
        diff_T = torch.where(compared_T, diff_T.nan_to_num(nan=torch.inf), 0.0)
        peaks = torch.zeros(num_replicas, device=found.loss.device)
        peaks.scatter_reduce_(0, batch.replicas_T, diff_T, reduce="amax")
        totals = torch.stack(
            [
                found.loss.detach().double(),
                -found.logprobs_train_T[trained_T].double().sum(),
                found.entropy_T[trained_T].double().sum(),
                kl_T[trained_T].double().sum(),
                trained_T.sum().double(),
                diff_T.double().sum(),
                compared_T.sum().double(),
            ]
        )
        return _Sums(totals=totals, peaks=peaks)
