"""The trained model on this rank: weights, forward and backward, optimizer updates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from osft_mcore.actor.batching import MicroBatch, micro_batches
from osft_mcore.actor.forward_only import token_figures
from osft_mcore.actor.megatron_layout import actor_layouts, named_parameters
from osft_mcore.actor.offload import ActorMemory
from osft_mcore.actor.optimizer import (
    build_optimizer,
    gradient_norm,
    set_learning_rate,
    take_step,
    wrap_data_parallel,
)
from osft_mcore.actor.probe import Probe, filled_up, probe_of
from osft_mcore.actor.reference import Reference
from osft_mcore.actor.response_loss import response_loss
from osft_mcore.actor.restore import restore
from osft_mcore.actor.result import Sums, UpdateResult, update_result
from osft_mcore.actor.splitting import (
    Split,
    budget_split,
    fixed_split,
    padding_share,
    rows_of,
)
from osft_mcore.actor.start_weights import load_start_weights
from osft_mcore.actor.training_state import StateTensor, adam_step, set_adam_step, training_state
from osft_mcore.config.model_shape import ModelShape
from osft_mcore.config.schema import AlgorithmConfig, ModelConfig, ParallelConfig, TrainConfig
from osft_mcore.loss.objectives import token_objective
from osft_mcore.model.build import build_chunks, output_weight
from osft_mcore.model.kernels import uses_transformer_engine
from osft_mcore.parallel.cpu import megatron_device
from osft_mcore.parallel.groups import ParallelContext
from osft_mcore.records import Example


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
        self.rows = rows_of(parallel, packed=train.max_tokens_per_micro_batch is not None)
        self._before_step: Callable[[], None] | None = None
        self.dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
        self.chunks = build_chunks(
            shape,
            context,
            dtype=self.dtype,
            sequence_parallel=parallel.sequence_parallel,
            vocab_multiple=model.vocab_multiple,
            recompute=train.recompute,
        )
        self.layouts = actor_layouts(
            shape,
            context.topology,
            vocab_multiple=model.vocab_multiple,
            transformer_engine=uses_transformer_engine(),
        )
        if checkpoint is None:
            layout = self.layouts[context.rank]
            load_start_weights(self._live_parameters(), layout, shape, model, seed=seed)
        self.wrapped, self.optimizer = self._optimized(parallel)
        if checkpoint is not None:
            restore(self._live_state(), self.layouts[context.rank], self.shard, checkpoint)
        self._memory = ActorMemory(
            train.offload,
            [] if train.offload == "none" else self._live_state(),
            [buffer.grad_data for chunk in self.wrapped for buffer in chunk.buffers],
        )

    def _optimized(self, parallel: ParallelConfig) -> tuple[list[Any], Any]:
        """The chunks with their gradient buffers, and the optimizer of both."""
        many = self.context.topology.copies > 1
        # Alone it would share with nobody, and copy all gradients and weights each update.
        distributed = parallel.distributed_optimizer and many
        with megatron_device():
            wrapped = wrap_data_parallel(
                self.chunks,
                distributed_optimizer=distributed,
                # Where a GPU can reduce and compute at once.
                overlap_grad_reduce=many and self.context.device.type == "cuda",
            )
            optimizer = build_optimizer(
                wrapped, self.train, dtype=self.dtype, distributed_optimizer=distributed
            )
        return wrapped, optimizer

    @property
    def shard(self) -> int:
        """Which of the model's tp * pp shards this rank holds."""
        place = self.context.coordinates
        return place.pp_rank * self.context.topology.tp + place.tp_rank

    def parameters(self) -> dict[str, Tensor]:
        """This rank's live parameters, by the names of its layouts, on its device until `rest`."""
        self._memory.fetch_weights()
        return self._live_parameters()

    def _live_parameters(self) -> dict[str, Tensor]:
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
        split = self._split(examples)
        with megatron_device(), self._memory.update():
            for chunk in self.wrapped:
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            taus = self._taus(tau_train, tau_sample)
            parts = self._forward_backward(examples, split, taus, forward_only=False)
            grad_norm = gradient_norm(self.optimizer)
            result = self._result(parts, examples, split, grad_norm=grad_norm)
            if not result.skipped:
                self._let_readers_finish()
                with self._memory.step():
                    take_step(self.optimizer, grad_norm=grad_norm)
        return result

    def rest(self) -> None:
        """Nobody needs the weights until they are asked for: with train.offload=all they leave."""
        if self._memory.holds_weights:
            # Who still reads an earlier copy has it overwritten.
            self._let_readers_finish()
            self._memory.put_weights_away()

    def call_before_step(self, call: Callable[[], None]) -> None:
        """Somebody reads the training state: call this once, before it changes."""
        self._before_step = call

    def _let_readers_finish(self) -> None:
        call, self._before_step = self._before_step, None
        if call is not None:
            call()

    def score(
        self, examples: Sequence[Example], *, tau_sample: float, tau_train: float | None = None
    ) -> UpdateResult:
        """The same statistics without training."""
        self._memory.fetch_weights()
        split = self._split(examples)
        with megatron_device(), torch.no_grad():
            taus = self._taus(tau_train, tau_sample)
            parts = self._forward_backward(examples, split, taus, forward_only=True)
        return self._result(parts, examples, split, grad_norm=0.0)

    def probe(self, examples: Sequence[Example], *, tau: float) -> Probe:
        """How sure the model is of any number of answers, at temperature `tau`; trains nothing."""
        topology, train = self.context.topology, self.train
        unit = topology.dp * topology.micro_batch_group
        if train.max_tokens_per_micro_batch is None:
            unit *= train.micro_batch_size
        filled = filled_up(examples, unit)
        self._memory.fetch_weights()
        batches = self._micro_batches(filled, self._split(filled))
        parts = token_figures(
            self.chunks,
            batches,
            self.context,
            tau=tau,
            vocab=self.shape.vocab,
            sequence_parallel=self.sequence_parallel,
        )
        return probe_of(parts, [batch.weights_T > 0 for batch in batches], self.context)

    def _taus(self, tau_train: float | None, tau_sample: float) -> "_Temperatures":
        if tau_train is None:
            assert not self.algorithm.follow_tau_sample, "the step's tau_sample is not known here"
            tau_train = self.algorithm.tau_train
        return _Temperatures(train=tau_train, sample=tau_sample)

    def training_state(self) -> list[StateTensor]:
        """Weights and optimizer state that this rank holds, to be read where they are then.

        Good until they change; `call_before_step` tells. What may leave the device leaves before.
        """
        self.rest()
        return self._memory.readable(self._live_state())

    def _live_state(self) -> list[StateTensor]:
        named, copies = named_parameters(self.chunks), self.context.topology.copies
        copy = self.context.coordinates.copy
        return training_state(self.optimizer, named, copies=copies, copy=copy)

    @property
    def num_updates(self) -> int:
        """Updates that Adam has made; its bias correction depends on it."""
        return adam_step(self.optimizer)

    @num_updates.setter
    def num_updates(self, value: int) -> None:
        set_adam_step(self.optimizer, value)

    def _split(self, examples: Sequence[Example]) -> Split:
        train, topology = self.train, self.context.topology
        if train.max_tokens_per_micro_batch is None:
            return fixed_split(
                len(examples), dp=topology.dp, micro_batch_size=train.micro_batch_size
            )
        return budget_split(
            [example.num_tokens for example in examples],
            dp=topology.dp,
            max_tokens=train.max_tokens_per_micro_batch,
            rows=self.rows,
            group=topology.micro_batch_group,
        )

    def _result(
        self, parts: list[Sums], examples: Sequence[Example], split: Split, *, grad_norm: float
    ) -> UpdateResult:
        lengths = [example.num_tokens for example in examples]
        return update_result(
            parts,
            self.context,
            grad_norm=grad_norm,
            padding=padding_share(lengths, split, self.rows),
            with_kl=self.reference is not None,
        )

    def _micro_batches(self, examples: Sequence[Example], split: Split) -> list[MicroBatch]:
        """What this rank computes of them."""
        topology, place = self.context.topology, self.context.coordinates
        whole = micro_batches(
            examples,
            split,
            dp_rank=place.dp_rank,
            rows=self.rows,
            algorithm=self.algorithm,
            max_response_tokens=self.max_response_tokens,
        )
        return [batch.share(cp=topology.cp, cp_rank=place.cp_rank) for batch in whole]

    def _forward_backward(
        self,
        examples: Sequence[Example],
        split: Split,
        taus: "_Temperatures",
        *,
        forward_only: bool,
    ) -> list[Sums]:
        batches = self._micro_batches(examples, split)
        if self.reference is not None:
            batches = self.reference.score(batches, tau=taus.train)
        parts: list[Sums] = get_forward_backward_func()(
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
        return batch.forward(model), partial(self._loss, batch, taus)

    def _loss(
        self, batch: MicroBatch, taus: "_Temperatures", hidden_BSH: Tensor
    ) -> tuple[Tensor, Tensor, Sums]:
        found = response_loss(
            hidden_BSH,
            output_weight(self.chunks[-1]),
            batch,
            token_objective(batch.weights_T, self.algorithm, batch.reference_logprobs_T),
            tau_train=taus.train,
            tau_sample=taus.sample,
            vocab=self.shape.vocab,
            tp_group=self.context.tp_group,
            recompute=self.train.recompute_loss,
            sequence_parallel=self.sequence_parallel,
        )
        num_tokens = torch.tensor(
            batch.targets_T.numel(), dtype=torch.int, device=self.context.device
        )
        num_replicas = self.context.topology.num_replicas
        sums = Sums.of(batch, found, self.algorithm, num_replicas=num_replicas)
        return found.loss, num_tokens, sums


@dataclass(frozen=True, slots=True, kw_only=True)
class _Temperatures:
    """Of one optimizer batch."""

    train: float
    """Of the loss."""
    sample: float
    """Of the log-probabilities that are held against the rollout engine's."""
