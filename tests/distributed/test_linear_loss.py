"""`token_loss` against log_softmax and autograd on whole logits in float64.

Errors are relative to the largest value of the reference: fp32 <= 1e-6, fp64 <= 1e-12. bf16 inputs
are widened exactly, so values keep fp32's tolerance and gradients are rounded once, by 2^-8.
Every case is computed both ways: gradients formed in the forward pass, and recomputed.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from osft_mcore.loss import linear
from osft_mcore.loss.linear import token_loss

NUM_RANKS, PADDED, HIDDEN = 4, 128, 16
FP32, FP64, BF16_GRADIENT = 1e-6, 1e-12, 2.0**-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A loss sum(grad_logprob * lp + grad_entropy * H) over random hidden states."""

    vocab: int
    taus: tuple[float, float] = (1.0, 0.6)
    dtype: torch.dtype = torch.float32
    chunk: int = 1024
    """Tokens."""
    logits_std: float = 2.0
    logprob: bool = True
    entropy: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """Whole tensors, the same on every rank; rows of `weight_VH` from `vocab` on are padding."""

    hidden_TH: Tensor
    weight_VH: Tensor
    targets_T: Tensor
    grad_logprob_T: Tensor
    grad_entropy_T: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """Values, and gradients of the whole weight."""

    loss: Tensor
    logprobs_train_T: Tensor
    entropy_T: Tensor
    logprobs_sample_T: Tensor
    grad_hidden_TH: Tensor
    grad_weight_VH: Tensor


# Shards of tp 4 have 32 rows, of tp 2 64: a vocabulary of 67 leaves the last of tp 4 without a
# real row, one of 33 leaves tp 2's last without any, one of 5 all but the first.
CASES = {
    "odd vocabulary": Case(vocab=67),
    "no padding": Case(vocab=PADDED),
    "one row on the second shard": Case(vocab=33),
    "real rows on the first shard alone": Case(vocab=5),
    "swapped temperatures": Case(vocab=67, taus=(0.6, 1.3)),
    "several chunks": Case(vocab=67, chunk=7),
    "log-probability alone": Case(vocab=101, taus=(0.7, 1.0), entropy=False),
    "entropy alone": Case(vocab=101, taus=(0.7, 1.0), logprob=False, chunk=9),
    "float64": Case(vocab=67, taus=(0.7, 1.0), dtype=torch.float64, chunk=9),
    "bfloat16": Case(vocab=67, dtype=torch.bfloat16),
}


def inputs(case: Case) -> Inputs:
    """Targets start with the first and last row of every shard of every tp."""
    generator = torch.Generator().manual_seed(case.vocab)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    borders = {row + i for row in range(0, PADDED, 32) for i in (0, 31)} | {case.vocab - 1}
    fixed = torch.tensor(sorted(row for row in borders if row < case.vocab))
    random = torch.randint(0, case.vocab, (20,), generator=generator)
    targets_T = torch.cat([fixed, random])
    num_tokens = targets_T.numel()
    weight_VH = normal(PADDED, HIDDEN) * case.logits_std / HIDDEN**0.5
    weight_VH[case.vocab :] = torch.nan
    return Inputs(
        hidden_TH=normal(num_tokens, HIDDEN).to(case.dtype),
        weight_VH=weight_VH.to(case.dtype),
        targets_T=targets_T,
        grad_logprob_T=normal(num_tokens) * case.logprob,
        grad_entropy_T=normal(num_tokens) * case.entropy,
    )


def reference(case: Case) -> Results:
    x = inputs(case)
    hidden_TH = x.hidden_TH.double().requires_grad_()
    weight_VH = x.weight_VH[: case.vocab].double().requires_grad_()
    logits_TV = hidden_TH @ weight_VH.T
    log_p_TV, log_q_TV = (torch.log_softmax(logits_TV / tau, dim=-1) for tau in case.taus)
    logprobs_T = log_p_TV.gather(1, x.targets_T[:, None])[:, 0]
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(dim=-1)
    loss = (x.grad_logprob_T * logprobs_T + x.grad_entropy_T * entropy_T).sum()
    grad_hidden_TH, grad_weight_VH = torch.autograd.grad(loss, (hidden_TH, weight_VH))
    return Results(
        loss=loss.detach(),
        logprobs_train_T=logprobs_T.detach(),
        entropy_T=entropy_T.detach(),
        logprobs_sample_T=log_q_TV.gather(1, x.targets_T[:, None])[:, 0].detach(),
        grad_hidden_TH=grad_hidden_TH,
        grad_weight_VH=torch.cat(
            [grad_weight_VH, torch.zeros(PADDED - case.vocab, HIDDEN, dtype=torch.float64)]
        ),
    )


def objective(case: Case, x: Inputs) -> linear.Objective:
    """A term is left out, not multiplied by zero, so that its missing gradient is tested too."""

    def losses(logprobs_C: Tensor, entropy_C: Tensor, rows: slice) -> Tensor:
        terms_C = torch.zeros_like(logprobs_C)
        if case.logprob:
            terms_C = terms_C + x.grad_logprob_T[rows].to(logprobs_C.dtype) * logprobs_C
        if case.entropy:
            terms_C = terms_C + x.grad_entropy_T[rows].to(entropy_C.dtype) * entropy_C
        return terms_C

    return losses


def sharded(case: Case, x: Inputs, group: dist.ProcessGroup, *, recompute: bool) -> Results:
    """What the ranks of `group` compute together, each from its own rows of the weight."""
    tp, tp_rank = group.size(), group.rank()
    hidden_TH = x.hidden_TH.clone().requires_grad_()
    shard_VH = x.weight_VH.chunk(tp)[tp_rank].clone().requires_grad_()
    found = token_loss(
        hidden_TH,
        shard_VH,
        x.targets_T,
        objective(case, x),
        tau_train=case.taus[0],
        tau_sample=case.taus[1],
        vocab=case.vocab,
        tp_group=group,
        recompute=recompute,
    )
    assert not any(figure.requires_grad for figure in found[1:])
    # Scaled on the way back, as a pipeline schedule may.
    grad_hidden_TH, grad_shard_VH = torch.autograd.grad(found.loss * 0.5, (hidden_TH, shard_VH))
    shards = [torch.empty_like(grad_shard_VH) for _ in range(tp)]
    dist.all_gather(shards, grad_shard_VH.contiguous(), group=group)
    return Results(
        loss=found.loss.detach(),
        logprobs_train_T=found.logprobs_train_T,
        entropy_T=found.entropy_T,
        logprobs_sample_T=found.logprobs_sample_T,
        grad_hidden_TH=2 * grad_hidden_TH,
        grad_weight_VH=2 * torch.cat(shards),
    )


def groups_of(rank: int) -> dict[int, dist.ProcessGroup]:
    """This rank's group of each size; its rank in the group is not always its global rank."""
    mine = {}
    for tp in (1, 2, NUM_RANKS):
        for first in range(0, NUM_RANKS, tp):
            group = dist.new_group(list(range(first, first + tp)))
            if first <= rank < first + tp:
                mine[tp] = group
    return mine


ByName = dict[tuple[str, bool], Results]
"""Case, recompute -> what was found."""


def compute(rank: int, cases: dict[str, Case]) -> dict[int, ByName]:
    groups = groups_of(rank)
    results: dict[int, ByName] = {tp: {} for tp in groups}
    # Of this forked process alone: chunks are as long as the case says.
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setattr(linear, "CHUNK_ELEMENTS", 0)
    for name, case in cases.items():
        monkeypatch.setattr(linear, "LEAST_CHUNK", case.chunk)
        for tp, group in groups.items():
            for recompute in (False, True):
                found = sharded(case, inputs(case), group, recompute=recompute)
                results[tp][name, recompute] = found
    return results


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="module")
def by_rank() -> list[dict[int, ByName]]:
    return run_ranks(compute, NUM_RANKS, cases=CASES)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("recompute", [False, True], ids=["one pass", "recompute"])
def test_values_and_gradients_equal_autograd_on_whole_logits(
    by_rank: list[dict[int, ByName]], tp: int, name: str, recompute: bool
) -> None:
    dtype = CASES[name].dtype
    values = FP64 if dtype == torch.float64 else FP32
    gradients = {torch.float32: FP32, torch.float64: FP64, torch.bfloat16: BF16_GRADIENT}[dtype]
    expected = reference(CASES[name])
    for rank in range(NUM_RANKS):
        found = by_rank[rank][tp][name, recompute]
        assert found.grad_hidden_TH.dtype == found.grad_weight_VH.dtype == dtype
        for field in Results.__slots__:
            tolerance = gradients if field.startswith("grad_") else values
            error = relative_error(getattr(found, field), getattr(expected, field))
            assert error <= tolerance, f"rank {rank}: {field}: {error}"


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_padding_has_no_gradient_whatever_it_holds(
    by_rank: list[dict[int, ByName]], tp: int
) -> None:
    for name, case in CASES.items():
        gradient_VH = by_rank[0][tp][name, False].grad_weight_VH
        assert (gradient_VH[case.vocab :] == 0).all(), name
        assert (gradient_VH[: case.vocab] != 0).any(dim=1).all(), name


EXTREME = Case(vocab=67, taus=(0.6, 1.0))


def extreme_inputs() -> Inputs:
    """Logits of +-1e4: token 0 has one best row, token 1 two on different shards, 2 the reverse."""
    weight_VH = torch.full((PADDED, 3), -100.0)
    weight_VH[40, 0] = weight_VH[3, 1] = weight_VH[66, 1] = 100.0
    weight_VH[:, 2] = -weight_VH[:, 1]
    weight_VH[EXTREME.vocab :] = torch.nan
    ones_T = torch.ones(4)
    return Inputs(
        hidden_TH=100.0 * torch.eye(3)[[0, 1, 2, 0]],
        weight_VH=weight_VH,
        targets_T=torch.tensor([40, 66, 5, 0]),
        grad_logprob_T=ones_T,
        grad_entropy_T=ones_T,
    )


def compute_extreme(rank: int) -> dict[int, Results]:
    return {
        tp: sharded(EXTREME, extreme_inputs(), group, recompute=False)
        for tp, group in groups_of(rank).items()
    }


def test_extreme_logits_stay_exact() -> None:
    log2, log65 = torch.tensor([2.0, 65.0]).log()
    for results in run_ranks(compute_extreme, NUM_RANKS):
        for tp, found in results.items():
            assert all(getattr(found, f).isfinite().all() for f in Results.__slots__), tp
            entropy_T = torch.tensor([0.0, log2, log65, 0.0])
            torch.testing.assert_close(found.entropy_T, entropy_T, rtol=0, atol=1e-6)
            # The last token's label is 2e4 below the best.
            train_T = torch.tensor([0.0, -log2, -log65, -2e4 / 0.6])
            sample_T = torch.tensor([0.0, -log2, -log65, -2e4])
            torch.testing.assert_close(found.logprobs_train_T, train_T, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(found.logprobs_sample_T, sample_T, rtol=1e-6, atol=1e-6)


def compute_sharp(rank: int) -> tuple[float, float]:
    case = Case(vocab=PADDED, logits_std=40.0)
    found = sharded(case, inputs(case), dist.group.WORLD, recompute=False)
    return float(found.entropy_T.min()), float(found.logprobs_train_T.max())


def test_sharp_distributions_keep_their_sign() -> None:
    """No rounding makes an entropy negative or a log-probability positive."""
    for smallest_entropy, largest_logprob in run_ranks(compute_sharp, 2):
        assert 0 <= smallest_entropy <= 1e-6
        assert largest_logprob <= 0
