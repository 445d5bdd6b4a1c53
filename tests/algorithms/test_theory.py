"""Each algorithm's theoretical fixed point, on a tabular problem small enough to enumerate.

Responses are T tokens of a vocabulary of 3; the policy is a table of logits, one row for each state (no
token yet, or the first token). A rollout holds each of the 3^T sequences once, and the expectation over
responses that a sampler would estimate is exact: every sequence's loss is multiplied by its probability under
the policy that "sampled" it, which is the current policy for on-policy algorithms. Scores are not
scaled, advantages not whitened, γ = gae_lambda = 1, and the critic is exact: V(s) is the expected sum of
token rewards from s on. All in float64; the losses and advantages are the package's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import pytest
import torch
from torch import Tensor

from apa_cli.algorithms.apa import APA
from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import ActorCritic
from apa_cli.algorithms.ppo import PPO
from apa_cli.types import Batch, PolicyOutput, Rollout
from tests.builders import make_algorithm, make_rollout

TEMPERATURE = 0.5
"""λ of APA and AWR, and kl_coef of PPO."""


def apa() -> APA:
    return make_algorithm(APA, lambda_=TEMPERATURE)


def ppo() -> PPO:
    return make_algorithm(PPO, kl_coef=TEMPERATURE)


def awr(gae_lambda: float) -> AWR:
    return make_algorithm(AWR, gae_lambda=gae_lambda, lambda_=TEMPERATURE, weight_clip=None)


@dataclass(frozen=True)
class Problem:
    """A reference policy, [states, 3] log-probs, and a score for each sequence, [3^T]."""

    reference: Tensor
    scores: Tensor

    @property
    def sequences(self) -> Tensor:
        """All sequences, [3^T, T], in the order of `scores`: the last token varies fastest."""
        length = 1 if len(self.scores) == 3 else 2
        return torch.tensor(list(itertools.product(range(3), repeat=length)))

    @property
    def states(self) -> Tensor:
        """The row of the table that each token is sampled from, [3^T, T]: 0, then 1 + the first token."""
        return torch.cat([torch.zeros_like(self.sequences[:, :1]), 1 + self.sequences[:, :-1]], dim=1)

    def token_logprobs(self, table: Tensor) -> Tensor:
        """Return the log-probs of all tokens, [3^T, T], from a table of log-probs or logits."""
        return table.log_softmax(-1)[self.states, self.sequences]

    def probabilities(self, table: Tensor) -> Tensor:
        """Return the probability of each sequence, [3^T]."""
        return self.token_logprobs(table).sum(-1).exp()

    def rollout(self, table: Tensor, kl_coef: float = 0.0) -> Rollout:
        """Return every sequence once, with the log-probs and exact values of the policy `table`."""
        logprobs, reference = self.token_logprobs(table), self.token_logprobs(self.reference)
        rewards = -kl_coef * (logprobs - reference)
        rewards[:, -1] += self.scores
        return make_rollout(
            torch.ones_like(self.states, dtype=torch.bool),
            response_ids=self.sequences,
            logprobs={"sampler": logprobs, "reference": reference, "init": reference, "old": logprobs},
            scores=self.scores,
            values={"value": self.values(table, rewards)},
        )

    def values(self, table: Tensor, rewards: Tensor) -> Tensor:
        """Return V(s_t), [3^T, T]: the policy's mean of the rewards to come over all sequences through s_t."""
        to_come = rewards.flip(1).cumsum(1).flip(1)
        p = self.probabilities(table)
        columns = []
        for t in range(self.states.shape[1]):
            same = (self.states[:, None, t] == self.states[None, :, t]).double()
            columns.append(same @ (p * to_come[:, t]) / (same @ p))
        return torch.stack(columns, dim=1)


def make_problem(length: int) -> Problem:
    reference = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.2, 0.6], [0.6, 0.3, 0.1], [0.3, 0.4, 0.3]])
    # the first token 1 leads to the best sequence, (1, 2), which π_init rarely samples, but is poor on average
    scores = {1: [0.5, 0.0, 1.0], 2: [0.6, 0.5, 0.7, 0.0, 0.1, 1.2, 0.4, 0.8, 0.3]}[length]
    states = 1 if length == 1 else 4
    return Problem(reference[:states].double().log(), torch.tensor(scores, dtype=torch.float64))


def prepare_batch(algorithm: ActorCritic, problem: Problem, table: Tensor) -> Batch:
    rollout = problem.rollout(table, kl_coef=getattr(algorithm, "kl_coef", 0.0))
    return algorithm.prepare(rollout, algorithm.initial_state())[0]


def policy_loss(algorithm: ActorCritic, problem: Problem, batch: Batch, table: Tensor, p: Tensor) -> Tensor:
    """Return the expected loss of a response under sequence probabilities `p`, which have no gradient."""
    output = PolicyOutput(problem.token_logprobs(table), dict(batch.values))
    term = algorithm.loss(batch, output).terms[0]
    return (p.unsqueeze(-1) * term.values).sum()


def descend(algorithm: ActorCritic, problem: Problem, start: Tensor) -> Tensor:
    """Return the policy after on-policy gradient descent until convergence, as log-probs [states, 3]."""
    table = start.clone().requires_grad_()
    for _ in range(20_000):
        with torch.no_grad():
            batch, p = prepare_batch(algorithm, problem, table), problem.probabilities(table)
        (gradient,) = torch.autograd.grad(policy_loss(algorithm, problem, batch, table, p), table)
        if float(gradient.abs().max()) < 1e-8:
            return table.detach().log_softmax(-1)
        table.data -= gradient
    raise AssertionError(f"no fixed point: the gradient is still {float(gradient.abs().max())}")


def project(algorithm: ActorCritic, problem: Problem, old: Tensor) -> Tensor:
    """Return the policy that minimises the loss on responses of the policy `old`, as log-probs."""
    batch, p = prepare_batch(algorithm, problem, old), problem.probabilities(old)
    table = old.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [table], max_iter=100, tolerance_grad=1e-9, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = policy_loss(algorithm, problem, batch, table, p)
        loss.backward()
        return loss

    optimizer.step(closure)
    return table.detach().log_softmax(-1)


def target(prior: Tensor, exponent: Tensor) -> Tensor:
    """Return prior · exp(exponent) / Z along the last dimension; the prior as log-probs."""
    return (prior + exponent).softmax(-1)


def apa_fixed_point(problem: Problem) -> Tensor:
    """Return π(a given s) ∝ π_init · exp(Q^π(s, a)/λ), computed backwards from the last token, whose Q is the score."""
    if len(problem.scores) == 3:
        return target(problem.reference, problem.scores.unsqueeze(0) / TEMPERATURE).log()
    scores = problem.scores.reshape(3, 3)
    second = target(problem.reference[1:], scores / TEMPERATURE)
    expected_score = (second * scores).sum(-1)  # without KL
    first = target(problem.reference[:1], expected_score / TEMPERATURE)
    return torch.cat([first, second]).log()


def ppo_optimum(problem: Problem) -> Tensor:
    """Return p(y) ∝ p_init(y) · exp(R(y)/β) over whole sequences, [3^T]."""
    prior = problem.token_logprobs(problem.reference).sum(-1)
    return target(prior, problem.scores / TEMPERATURE)


TOLERANCE = {"rtol": 0, "atol": 1e-6}


@cache
def find_fixed_point(algorithm: Callable[[], ActorCritic], length: int) -> Tensor:
    """Return the policy to which on-policy gradient descent from π_init converges, as log-probs."""
    return descend(algorithm(), make_problem(length), make_problem(length).reference)


def test_the_critic_of_this_file_is_exact():
    # under π_init, after token 0: 0.2·0.6 + 0.2·0.5 + 0.6·0.7 = 0.64;
    # after 1: 0.6·0 + 0.3·0.1 + 0.1·1.2 = 0.15;  after 2: 0.3·0.4 + 0.4·0.8 + 0.3·0.3 = 0.53;
    # at the start 0.5·0.64 + 0.3·0.15 + 0.2·0.53 = 0.471
    problem = make_problem(2)
    values = problem.rollout(problem.reference).values["value"]
    first = torch.full((9,), 0.471, dtype=torch.float64)
    second = torch.tensor([0.64, 0.15, 0.53], dtype=torch.float64).repeat_interleave(3)
    torch.testing.assert_close(values, torch.stack([first, second], dim=1))


@pytest.mark.parametrize("length", [1, 2])
def test_apa_converges_to_the_reference_times_exp_of_q_per_token(length):
    expected = apa_fixed_point(make_problem(length)).exp()
    torch.testing.assert_close(find_fixed_point(apa, length).exp(), expected, **TOLERANCE)


def test_apa_converges_to_it_from_a_random_policy():
    problem = make_problem(2)
    torch.manual_seed(0)
    table = descend(apa(), problem, torch.randn_like(problem.reference))
    torch.testing.assert_close(table.exp(), apa_fixed_point(problem).exp(), **TOLERANCE)


def test_apas_fixed_point_is_consistent_with_its_own_q():
    # log π − log π_init − Q^π/λ is the same for every token, here for the first one
    problem, table = make_problem(2), find_fixed_point(apa, 2)
    p, residuals = problem.probabilities(table), []
    for token in range(3):
        through = problem.sequences[:, 0] == token
        q = float((p * problem.scores)[through].sum() / p[through].sum())
        residuals.append(float(table[0, token] - problem.reference[0, token]) - q / TEMPERATURE)
    assert residuals == pytest.approx([residuals[0]] * 3, abs=1e-6)


@pytest.mark.parametrize("length", [1, 2])
def test_ppo_converges_to_the_reference_times_exp_of_the_score_per_sequence(length):
    problem = make_problem(length)
    torch.testing.assert_close(problem.probabilities(find_fixed_point(ppo, length)), ppo_optimum(problem), **TOLERANCE)


def test_apa_and_ppo_coincide_for_one_token_and_differ_for_two():
    one = make_problem(1)
    torch.testing.assert_close(
        one.probabilities(find_fixed_point(apa, 1)), one.probabilities(find_fixed_point(ppo, 1)), **TOLERANCE
    )
    # PPO charges the first token for the KL that the second will cost, APA does not: it takes more of the
    # first token 1, whose good score needs a second token that π_init rarely samples
    apa_first, ppo_first = find_fixed_point(apa, 2)[0].exp(), find_fixed_point(ppo, 2)[0].exp()
    assert float(apa_first[1]) > float(ppo_first[1]) + 0.05
    # after the first token only one token is left, so there they agree
    torch.testing.assert_close(find_fixed_point(apa, 2)[1:].exp(), find_fixed_point(ppo, 2)[1:].exp(), **TOLERANCE)


def test_a_full_projection_of_awr_is_the_old_policy_times_exp_of_the_advantage():
    # gae_lambda 0 with an exact critic makes A(s, a) = Q(s, a) − V(s) for every token
    problem = make_problem(2)
    torch.manual_seed(0)
    old = torch.randn_like(problem.reference).log_softmax(-1)
    scores = problem.scores.reshape(3, 3)
    expected_score = (old[1:].exp() * scores).sum(-1)
    expected = torch.cat([target(old[:1], expected_score / TEMPERATURE), target(old[1:], scores / TEMPERATURE)])
    torch.testing.assert_close(project(awr(0.0), problem, old).exp(), expected, **TOLERANCE)


@pytest.mark.parametrize("length", [1, 2])
def test_with_gae_lambda_1_a_full_projection_of_awr_reweights_whole_sequences(length):
    # A = R − V(s_t) is one response's; E[exp(R/λ)] over what follows makes p_old(y) · exp(R(y)/λ) / Z
    problem = make_problem(length)
    torch.manual_seed(0)
    old = torch.randn_like(problem.reference).log_softmax(-1)
    expected = target(problem.token_logprobs(old).sum(-1), problem.scores / TEMPERATURE)
    new = project(awr(1.0), problem, old)
    torch.testing.assert_close(problem.probabilities(new), expected, **TOLERANCE)


@pytest.mark.parametrize("gae_lambda", [0.0, 1.0])
def test_repeated_projections_of_awr_become_deterministic_on_the_best_sequence(gae_lambda):
    problem = make_problem(2)
    table = problem.reference
    for _ in range(12):
        table = project(awr(gae_lambda), problem, table)
    assert float(problem.probabilities(table)[problem.scores.argmax()]) > 0.99


def test_awr_does_not_depend_on_the_reference():
    problem = make_problem(2)
    old = problem.reference
    elsewhere = Problem(torch.zeros_like(old).log_softmax(-1), problem.scores)
    assert awr(1.0).needs().passes == {"response": ("value",)}
    torch.testing.assert_close(project(awr(1.0), problem, old), project(awr(1.0), elsewhere, old), rtol=0, atol=0)
