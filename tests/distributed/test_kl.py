"""The loss with a KL penalty against autograd on whole logits in float64.

Errors are relative to the largest value of the reference.
"""

from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_linear_loss import NUM_RANKS, Case, groups_of, inputs, relative_error
from torch import Tensor

from osft_mcore.config.schema import AlgorithmConfig
from osft_mcore.loss import linear
from osft_mcore.loss.linear import token_loss
from osft_mcore.loss.objectives import KlKind, token_objective

KINDS: tuple[KlKind, ...] = get_args(KlKind)
TAU, COEF = 0.8, 0.7
# d of token i is ABOVE[i % len]: small, and beyond every clamp of k3. Not 0, where |d| has a kink.
ABOVE = (0.01, 0.05, -0.1, 1.3, -2.2, -3.0, 10.0, 12.0, -19.0, 25.0, -40.0)


def whole_logprobs(case: Case, hidden_TH: Tensor, weight_VH: Tensor, targets_T: Tensor) -> Tensor:
    log_p_TV = torch.log_softmax(hidden_TH @ weight_VH[: case.vocab].T / TAU, dim=-1)
    return log_p_TV.gather(1, targets_T[:, None])[:, 0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Penalised:
    """Tokens with weights, and what the reference says of them in float64."""

    weights_T: Tensor
    reference_T: Tensor


def penalised(case: Case) -> Penalised:
    x = inputs(case)
    logprobs_T = whole_logprobs(case, x.hidden_TH.double(), x.weight_VH.double(), x.targets_T)
    num = logprobs_T.numel()
    above_T = torch.tensor([ABOVE[i % len(ABOVE)] for i in range(num)], dtype=torch.float64)
    # The largest d has a small weight: k2 of it would hide the others in relative errors.
    weights_T = x.grad_logprob_T.abs() / (1 + above_T.square())
    return Penalised(weights_T=weights_T, reference_T=logprobs_T - above_T)


def plain_kl(d_T: Tensor, kind: KlKind) -> Tensor:
    """The formulas once more, as one would write them down; where k3 is cut off it is a number."""
    if kind == "k3":
        kl_T = torch.exp(-d_T) + d_T - 1
        return torch.where((kl_T.detach() < 10) & (d_T.detach().abs() < 20), kl_T, 10.0)
    return {"k1": d_T, "abs": torch.where(d_T < 0, -d_T, d_T), "k2": 0.5 * d_T * d_T}[kind]


def reference_gradients(case: Case, kind: KlKind) -> tuple[Tensor, Tensor, Tensor]:
    x, p = inputs(case), penalised(case)
    hidden_TH = x.hidden_TH.double().requires_grad_()
    weight_VH = x.weight_VH[: case.vocab].double().requires_grad_()
    logprobs_T = whole_logprobs(case, hidden_TH, weight_VH, x.targets_T)
    kl_T = plain_kl(logprobs_T - p.reference_T, kind)
    loss = (p.weights_T * (-logprobs_T + COEF * kl_T)).sum()
    return (loss.detach(), *torch.autograd.grad(loss, (hidden_TH, weight_VH)))


def sharded(
    case: Case, kind: KlKind, group: dist.ProcessGroup, *, recompute: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x, p, tp = inputs(case), penalised(case), group.size()
    hidden_TH = x.hidden_TH.clone().requires_grad_()
    shard_VH = x.weight_VH.chunk(tp)[group.rank()].clone().requires_grad_()
    algorithm = AlgorithmConfig(kl_coef=COEF, kl_kind=kind)
    # As the actor keeps them, whatever the model's dtype is.
    dtype = torch.promote_types(case.dtype, torch.float32)
    found = token_loss(
        hidden_TH,
        shard_VH,
        x.targets_T,
        token_objective(p.weights_T.to(dtype), algorithm, p.reference_T.to(dtype)),
        tau_train=TAU,
        tau_sample=1.0,
        vocab=case.vocab,
        tp_group=group,
        recompute=recompute,
    )
    grad_hidden_TH, grad_shard_VH = torch.autograd.grad(found.loss, (hidden_TH, shard_VH))
    shards = [torch.empty_like(grad_shard_VH) for _ in range(tp)]
    dist.all_gather(shards, grad_shard_VH.contiguous(), group=group)
    return found.loss.detach(), grad_hidden_TH, torch.cat(shards)[: case.vocab]


CASES = {
    "float32": Case(vocab=67, chunk=7),
    "float64": Case(vocab=67, chunk=7, dtype=torch.float64),
    "bfloat16": Case(vocab=67, chunk=7, dtype=torch.bfloat16),
    # The shard of tp 4's last rank has no real row.
    "one row on the second shard": Case(vocab=33, dtype=torch.float64),
}
TOLERANCES = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2}


def _all_sharded(rank: int) -> dict[tuple[Any, ...], tuple[Tensor, ...]]:
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 0)
    found = {}
    for name, case in CASES.items():
        monkeypatch.setattr(linear, "LEAST_CHUNK", case.chunk)
        for tp, group in groups_of(rank).items():
            for kind in KINDS:
                for recompute in (False, True):
                    key = (name, tp, kind, recompute)
                    found[key] = sharded(case, kind, group, recompute=recompute)
    return found


@pytest.fixture(scope="module")
def by_rank() -> list[dict[tuple[Any, ...], tuple[Tensor, ...]]]:
    return run_ranks(_all_sharded, NUM_RANKS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradients_equal_autograd_in_float64(
    by_rank: Any, name: str, kind: KlKind
) -> None:
    """At tp 1, 2 and 4, on every rank, one pass or recomputed."""
    expected = reference_gradients(CASES[name], kind)
    tolerance = TOLERANCES[CASES[name].dtype]
    for found in by_rank:
        parts = {key: value for key, value in found.items() if (key[0], key[2]) == (name, kind)}
        assert {key[1] for key in parts} == {1, 2, 4}
        for key, results in parts.items():
            for ours, theirs in zip(results, expected, strict=True):
                assert relative_error(ours, theirs) <= tolerance, key
