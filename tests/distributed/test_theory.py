"""The paper's statements about the objective, on the code that trains, by enumeration.

A tabular model: one free logit per (state, token), where a state is the tokens sampled so far.
Its hidden states are one-hot, so the output weight holds the logits and the gradient of the
weight is the gradient of the theory. Everything is float64. Statements are checked with
`token_loss` over 1 and 2 ranks; the expected values are written here in plain torch.
"""

import itertools
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from osft_mcore.loss.linear import Objective as TokenObjective
from osft_mcore.loss.linear import token_loss

VOCAB, END, MAX_TOKENS = 4, 0, 3
EXACT = 1e-12
Response = tuple[int, ...]


def enumerate_sequences() -> list[Response]:
    """All responses: up to the first END inclusive, or MAX_TOKENS tokens without one."""
    whole = itertools.product(range(VOCAB), repeat=MAX_TOKENS)
    return sorted({o[: o.index(END) + 1] if END in o else o for o in whole})


SEQUENCES = enumerate_sequences()
STATES = sorted({o[:t] for o in SEQUENCES for t in range(len(o))})


def random_logits(seed: int) -> Tensor:
    """One row of logits per state."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(len(STATES), VOCAB, generator=generator, dtype=torch.float64)


def state_probabilities(logits_SV: Tensor, tau: float) -> Tensor:
    """d(z): how often a response sampled at `tau` passes through state z."""
    p_SV = torch.softmax(logits_SV / tau, dim=-1)
    return torch.stack(
        [
            torch.stack(
                [p_SV[STATES.index(z[:t]), z[t]] for t in range(len(z))] + [torch.ones(())]
            ).prod()
            for z in STATES
        ]
    )


def kl(p_SV: Tensor, q_SV: Tensor) -> Tensor:
    return (p_SV * (p_SV.log() - q_SV.log())).sum(dim=-1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """E over responses of `old_SV` at tau_sample of their cross-entropy at tau_train."""

    old_SV: Tensor
    tau_sample: float
    tau_train: float

    def tokens(self) -> tuple[Tensor, Tensor, Tensor]:
        """State, target and weight (the probability of its response) of every token."""
        p_SV = torch.softmax(self.old_SV / self.tau_sample, dim=-1)
        states, targets, weights = [], [], []
        for o in SEQUENCES:
            path = [(STATES.index(o[:t]), o[t]) for t in range(len(o))]
            probability = torch.stack([p_SV[z, y] for z, y in path]).prod()
            states += [z for z, _ in path]
            targets += [y for _, y in path]
            weights += [probability] * len(path)
        return torch.tensor(states), torch.tensor(targets), torch.stack(weights)

    def loss(self, shard_VS: Tensor) -> Tensor:
        """The loss, from this rank's rows of the output weight."""
        states_T, targets_T, weights_T = self.tokens()
        hidden_TS = torch.eye(len(STATES), dtype=torch.float64)[states_T]
        return loss_of(
            hidden_TS,
            shard_VS,
            targets_T,
            lambda logprobs_C, _, rows: -weights_T[rows] * logprobs_C,
            self.tau_train,
        )


def loss_of(
    hidden_TS: Tensor, shard_VS: Tensor, targets_T: Tensor, objective: TokenObjective, tau: float
) -> Tensor:
    return token_loss(
        hidden_TS,
        shard_VS,
        targets_T,
        objective,
        tau_train=tau,
        tau_sample=tau,
        vocab=VOCAB,
        tp_group=dist.group.WORLD,
    ).loss


def shard_of(logits_SV: Tensor) -> Tensor:
    """This rank's rows of the output weight [V, S], as a leaf."""
    shard_VS = logits_SV.T.chunk(dist.get_world_size())[dist.get_rank()]
    return shard_VS.clone(memory_format=torch.contiguous_format).requires_grad_()


def whole(shard_VS: Tensor) -> Tensor:
    """[S, V] from every rank's rows."""
    shards = [torch.empty_like(shard_VS) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, shard_VS.contiguous())
    return torch.cat(shards).T


def _loss_and_gradient(rank: int, objective: Objective, logits_SV: Tensor) -> tuple[Tensor, Tensor]:
    shard_VS = shard_of(logits_SV)
    loss = objective.loss(shard_VS)
    (gradient_VS,) = torch.autograd.grad(loss, shard_VS)
    return loss.detach(), whole(gradient_VS)


def loss_and_gradient(objective: Objective, logits_SV: Tensor, tp: int) -> tuple[Tensor, Tensor]:
    """At `logits_SV`; the gradient [S, V] is the same on every rank."""
    by_rank = run_ranks(_loss_and_gradient, tp, objective=objective, logits_SV=logits_SV)
    assert all(torch.equal(gradient, by_rank[0][1]) for _, gradient in by_rank)
    return by_rank[0]


tensor_parallel = pytest.mark.parametrize("tp", [1, 2])


def test_enumeration_is_complete() -> None:
    """1 + 3 + 9 * 4 responses; at any temperature their probabilities sum to one."""
    assert (len(SEQUENCES), len(STATES)) == (40, 13)
    for tau in (0.6, 1.0, 1.2):
        _, _, weights_T = Objective(old_SV=random_logits(0), tau_sample=tau, tau_train=1.0).tokens()
        last_T = torch.tensor([len(o) for o in SEQUENCES]).cumsum(0) - 1
        assert float(weights_T[last_T].sum()) == pytest.approx(1, abs=EXACT)


@tensor_parallel
@pytest.mark.parametrize("tau", [0.6, 1.0, 1.2])
def test_t1_coupled_temperatures_teach_nothing(tau: float, tp: int) -> None:
    """E_{o ~ pi(tau)} grad log pi(o; tau) = 0."""
    old_SV = random_logits(0)
    objective = Objective(old_SV=old_SV, tau_sample=tau, tau_train=tau)
    _, gradient_SV = loss_and_gradient(objective, old_SV, tp)
    assert float(gradient_SV.abs().max()) < EXACT


@tensor_parallel
@pytest.mark.parametrize(("tau_sample", "at_least"), [(0.6, 0.2), (1.2, 0.05)])
def test_t1_decoupled_temperatures_teach(tau_sample: float, at_least: float, tp: int) -> None:
    """The same expectation at tau_train = 1 is far from zero."""
    old_SV = random_logits(0)
    objective = Objective(old_SV=old_SV, tau_sample=tau_sample, tau_train=1.0)
    _, gradient_SV = loss_and_gradient(objective, old_SV, tp)
    assert float(gradient_SV.norm()) > at_least


@tensor_parallel
@pytest.mark.parametrize("taus", [(0.6, 1.0), (1.3, 0.8)])
def test_t2_loss_is_a_constant_plus_kl_to_the_sharpened_model(
    taus: tuple[float, float], tp: int
) -> None:
    """L = C + sum_z d_old(z) KL(pi_old(.|z; tau_s) || pi(.|z; tau_t)), at an unrelated model."""
    old_SV, logits_SV = random_logits(0), random_logits(1)
    objective = Objective(old_SV=old_SV, tau_sample=taus[0], tau_train=taus[1])
    loss, _ = loss_and_gradient(objective, logits_SV, tp)
    p_SV, q_SV = torch.softmax(old_SV / taus[0], -1), torch.softmax(logits_SV / taus[1], -1)
    d_S = state_probabilities(old_SV, taus[0])
    constant = -(d_S[:, None] * p_SV * p_SV.log()).sum()
    divergence = (d_S * kl(p_SV, q_SV)).sum()
    assert float(divergence) > 0.1
    assert float(loss) == pytest.approx(float(constant + divergence), abs=EXACT)


def optimum(objective: Objective) -> Tensor:
    """Theorem 1: (tau_t / tau_s) z_old, up to a constant per state."""
    return objective.old_SV * objective.tau_train / objective.tau_sample


@tensor_parallel
def test_t3_the_scaled_logits_are_the_optimum(tp: int) -> None:
    """Gradient 0 and L = C there, whatever constant is added to a state's logits."""
    objective = Objective(old_SV=random_logits(0), tau_sample=0.6, tau_train=1.0)
    constants_S = torch.linspace(-3, 3, len(STATES), dtype=torch.float64)
    best_SV = optimum(objective) + constants_S[:, None]
    loss, gradient_SV = loss_and_gradient(objective, best_SV, tp)
    p_SV = torch.softmax(objective.old_SV / 0.6, -1)
    d_S = state_probabilities(objective.old_SV, 0.6)
    assert float(gradient_SV.abs().max()) < EXACT
    constant = -(d_S[:, None] * p_SV * p_SV.log()).sum()
    assert float(loss) == pytest.approx(float(constant), abs=EXACT)


def _minimise(rank: int, objective: Objective) -> Tensor:
    """Logits after training from `old_SV`; LBFGS sees all of them, hence one rank."""
    shard_VS = shard_of(objective.old_SV)
    optimizer = torch.optim.LBFGS(
        [shard_VS], max_iter=300, tolerance_grad=1e-12, tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = objective.loss(shard_VS)
        loss.backward()
        return loss

    optimizer.step(closure)
    return whole(shard_VS.detach())


@pytest.mark.parametrize("taus", [(0.6, 1.0), (1.3, 0.8)])
def test_t3_training_scales_every_margin_by_the_ratio_of_temperatures(
    taus: tuple[float, float],
) -> None:
    objective = Objective(old_SV=random_logits(0), tau_sample=taus[0], tau_train=taus[1])
    (found_SV,) = run_ranks(_minimise, 1, objective=objective)
    expected_SV = optimum(objective)
    margins = found_SV[:, :, None] - found_SV[:, None, :]
    expected_margins = expected_SV[:, :, None] - expected_SV[:, None, :]
    assert float((margins - expected_margins).abs().max()) < 1e-4
    assert float((found_SV - objective.old_SV).abs().max()) > 0.1


@tensor_parallel
@pytest.mark.parametrize("taus", [(0.6, 1.0), (1.2, 1.0), (0.6, 0.8)])
def test_t4_first_gradient_in_closed_form(taus: tuple[float, float], tp: int) -> None:
    """At theta_old, per state: d(z)/tau_t (softmax(z/tau_t) - softmax(z/tau_s))."""
    old_SV = random_logits(0)
    objective = Objective(old_SV=old_SV, tau_sample=taus[0], tau_train=taus[1])
    _, gradient_SV = loss_and_gradient(objective, old_SV, tp)
    d_S = state_probabilities(old_SV, taus[0])
    step_SV = torch.softmax(old_SV / taus[1], -1) - torch.softmax(old_SV / taus[0], -1)
    expected_SV = d_S[:, None] / taus[1] * step_SV
    assert float((gradient_SV - expected_SV).abs().max()) < EXACT


@pytest.mark.parametrize(("tau_sample", "sign"), [(0.6, 1), (1.4, -1)])
def test_t4_cooler_samples_raise_the_best_tokens_margin_and_hotter_ones_lower_it(
    tau_sample: float, sign: int
) -> None:
    """In every state, for one small gradient step."""
    old_SV = random_logits(0)
    objective = Objective(old_SV=old_SV, tau_sample=tau_sample, tau_train=1.0)
    _, gradient_SV = loss_and_gradient(objective, old_SV, 1)
    new_SV = old_SV - 1e-3 * gradient_SV
    best_S1 = old_SV.argmax(dim=-1, keepdim=True)

    def margins(logits_SV: Tensor) -> Tensor:
        others_SV = logits_SV.scatter(1, best_S1, -torch.inf)
        return logits_SV.gather(1, best_S1)[:, 0] - others_SV.amax(dim=-1)

    assert (sign * (margins(new_SV) - margins(old_SV)) > 0).all()


def _gradients_of_one_state_each(
    rank: int, logits_SV: Tensor, targets_S: Tensor, tau: float
) -> tuple[Tensor, Tensor]:
    """d(-log p)/dz and dH/dz, one token per state."""
    shard_VS = shard_of(logits_SV)
    hidden_SS = torch.eye(len(STATES), dtype=torch.float64)

    def gradient(objective: TokenObjective) -> Tensor:
        loss = loss_of(hidden_SS, shard_VS, targets_S, objective, tau)
        return whole(torch.autograd.grad(loss, shard_VS)[0])

    return gradient(lambda logprobs, _h, _rows: -logprobs), gradient(
        lambda _lp, entropy, _: entropy
    )


@tensor_parallel
@pytest.mark.parametrize("tau", [0.5, 1.0, 2.0])
def test_t5_t6_token_gradients_carry_one_over_tau(tau: float, tp: int) -> None:
    """d(-log p_y)/dz = (p - onehot_y)/tau_t and dH/dz = -p (log p + H)/tau_t."""
    logits_SV = random_logits(2)
    targets_S = torch.arange(len(STATES)) % VOCAB
    nll_SV, entropy_SV = run_ranks(
        _gradients_of_one_state_each, tp, logits_SV=logits_SV, targets_S=targets_S, tau=tau
    )[0]
    p_SV = torch.softmax(logits_SV / tau, dim=-1)
    entropy_S1 = -(p_SV * p_SV.log()).sum(dim=-1, keepdim=True)
    onehot_SV = torch.nn.functional.one_hot(targets_S, VOCAB).double()
    expected_SV = -p_SV * (p_SV.log() + entropy_S1) / tau
    assert float((nll_SV - (p_SV - onehot_SV) / tau).abs().max()) < EXACT
    assert float((entropy_SV - expected_SV).abs().max()) < EXACT
