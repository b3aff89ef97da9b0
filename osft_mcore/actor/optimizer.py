"""Megatron-Core's distributed data parallel wrapper and optimizer, set up for this project."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from torch import Tensor, nn

from osft_mcore.config.schema import TrainConfig
from osft_mcore.weights.finite import all_finite


def wrap_data_parallel(
    chunks: Sequence[nn.Module],
    *,
    distributed_optimizer: bool,
    overlap_grad_reduce: bool,
    bucket_size: int | None = None,
) -> list[Any]:
    """Gradient buckets in fp32, summed (never averaged) over data-parallel ranks.

    Token weights are global, so the sum over ranks is already the gradient of the batch loss.
    `overlap_grad_reduce`: a bucket (of at least `bucket_size` elements, None: Megatron-Core's
    choice) is reduced while the last micro-batch's backward pass goes on.
    """
    config: Any = chunks[0].config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed_optimizer,
        overlap_grad_reduce=overlap_grad_reduce,
        bucket_size=bucket_size,
        # That check raises on one rank alone. `gradient_norm` sees the same, and all agree.
        check_for_nan_in_grad=False,
    )
    wrapped = [_DataParallel(config, ddp_config, chunk) for chunk in chunks]
    config.finalize_model_grads_func = _finalize_without_rescaling
    if overlap_grad_reduce:
        # Entered by the schedule for all micro-batches but the last.
        no_sync = [chunk.no_sync for chunk in wrapped]
        config.no_sync_func = no_sync if len(wrapped) > 1 else no_sync[0]
    return wrapped


class _DataParallel(DistributedDataParallel):  # type: ignore[misc]
    """Knows of weights whose gradient is in the buffer already."""

    def _make_backward_post_hook(self, param: nn.Parameter) -> Callable[..., None]:
        """What runs once all that a backward pass has for `param` has come.

        The loss adds to the output weight's main_grad by itself and hands autograd nothing (a tied
        embedding adds its part here, as usual). Megatron-Core's hook takes that for a mistake when
        it overlaps; a dummy gradient, which is its own way out, would take as much memory.
        """
        hook: Callable[..., None] = super()._make_backward_post_hook(param)
        if not self.ddp_config.overlap_grad_reduce:
            return hook

        def ready(*unused: Any) -> None:
            if param.grad is not None:
                hook(*unused)
            else:
                group = self.param_to_bucket_group[param]
                group.register_grad_ready(param, self.force_all_reduce)

        return ready


def build_optimizer(
    wrapped: Sequence[Any], train: TrainConfig, *, dtype: torch.dtype, distributed_optimizer: bool
) -> Any:
    """AdamW with fp32 copies of the weights that all `wrapped` hold now. Every rank must call.

    Weight decay is for matrices alone: biases and norms (every 1-D parameter) have none.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_eps=train.eps,
        # 0 turns clipping off, but the norm is reported all the same.
        clip_grad=train.clip_grad or math.inf,
        bf16=dtype == torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=distributed_optimizer,
    )
    optimizer = get_megatron_optimizer(config, list(wrapped))
    assert isinstance(optimizer, ChainedOptimizer), "dense models are trained by a chain of one"
    for group in optimizer.param_groups:
        # Megatron-Core leaves this to its scheduler, which is not used here.
        group["weight_decay"] = train.weight_decay * group["wd_mult"]
        if "fused" in group:
            # torch's own Adam: one pass over the state instead of a dozen, 3 times as fast on CPU.
            group["fused"] = True
    return optimizer


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Use `lr` from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


@torch.no_grad()
def gradient_norm(optimizer: Any) -> float:
    """Norm of the reduced gradients over the ranks that share a copy of the model.

    Collective over them. NaN or infinity if one of their gradients is not finite, on this rank at
    least: ranks that hold other copies need not know.
    """
    optimizer.prepare_grads()
    norm = float(optimizer.get_grad_norm())
    # What several ranks hold is in the norm once; a fault may be in another rank's copy.
    if math.isfinite(norm) and not all_finite(_left_out_of_norm(optimizer)):
        return math.nan
    return norm


@torch.no_grad()
def take_step(optimizer: Any, *, grad_norm: float) -> None:
    """Clip by the norm that `gradient_norm` returned, and update the weights.

    Together the two are what the optimizer's own `step` does, which asks nobody in between.
    Collective over all ranks.
    """
    for part in optimizer.chained_optimizers:
        if parameters := part.get_parameters():
            clip_grad_by_total_norm_fp32(
                parameters, max_norm=part.config.clip_grad, total_norm=grad_norm
            )
    succeeded = optimizer.step_with_ready_grads()
    assert succeeded, "only a loss scale, which is not used here, can make a step fail"


def _left_out_of_norm(optimizer: Any) -> Iterator[Tensor]:
    for part in optimizer.chained_optimizers:
        counted = {id(gradient) for gradient in part.get_main_grads_for_grad_norm()}
        for parameter in part.get_parameters():
            if parameter.grad is not None and id(parameter.grad) not in counted:
                yield parameter.grad


def _finalize_without_rescaling(model: Any, _num_tokens: Any = None, **kwargs: Any) -> None:
    """Reduce gradients; skip the division by a token count, which the token weights contain."""
    finalize_model_grads(model, None, **kwargs)
