"""AWR: clipped weights exp(Â/λ), computed by hand."""

import math
from functools import partial

import pytest
import torch

from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import AdvantageEstimator, Whitening
from apa_cli.types import Critic, Needs, PolicyOutput, Rollout
from tests.builders import make_algorithm, make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
make_awr = partial(make_algorithm, AWR)


def make_responses(scores: list[float], values: list[float]) -> Rollout:
    """Return responses of one token, without a reference."""
    mask = make_mask([1] * len(scores))
    values = {"value": torch.tensor(values).unsqueeze(1)}
    return make_rollout(mask, logprobs={"sampler": -1.0 * mask}, scores=torch.tensor(scores), values=values)


def weights(algorithm: AWR, scores: list[float], values: list[float]) -> list[float]:
    """Return the weight of each token: the policy's loss at log π = −1."""
    batch, _ = algorithm.prepare(make_responses(scores, values), algorithm.initial_state())
    logprobs = torch.full((len(scores), 1), -1.0)
    loss = algorithm.loss(batch, PolicyOutput(logprobs, {"value": torch.zeros_like(logprobs)}))
    return loss.terms[0].values.flatten().tolist()


def test_needs_are_a_critic_and_no_reference():
    assert make_awr().needs() == Needs(critics=(Critic("value"),), passes={"response": ("value",)})
    without_critic = make_awr(advantage_estimator=AdvantageEstimator.group_mean).needs()
    assert without_critic == Needs(passes={"response": ()}, samples_per_prompt=2, least_samples=2)


def test_weights_by_hand():
    # A = score − V = 1, −0.5, 0; over λ = 0.5: e², e⁻¹, 1
    expected = [math.exp(2), math.exp(-1), 1.0]
    assert weights(make_awr(), [2.0, 0.5, 3.0], [1.0, 1.0, 3.0]) == pytest.approx(expected, rel=1e-6)


def test_weights_are_clipped_at_weight_clip():
    # A/λ = 2, 4: e² = 7.39 and e⁴ = 54.6
    assert weights(make_awr(weight_clip=20.0), [1.0, 2.0], [0.0, 0.0]) == pytest.approx([math.exp(2), 20.0], rel=1e-6)
    assert weights(make_awr(weight_clip=None), [1.0, 2.0], [0.0, 0.0]) == pytest.approx(
        [math.exp(2), math.exp(4)], rel=1e-6
    )


def test_whitened_weights_are_in_standard_deviations():
    # scores 1, 5 whiten to −1, 1: weights exp(∓1/λ) at λ = 2
    whitened = weights(make_awr(whitening=Whitening.rollout, lambda_=2.0), [1.0, 5.0], [0.0, 0.0])
    assert whitened == pytest.approx([math.exp(-0.5), math.exp(0.5)], rel=1e-6)


def test_gradient_is_minus_the_weight_at_any_log_prob():
    algorithm = make_awr()
    batch, _ = algorithm.prepare(make_responses([0.5, -0.5], [0.0, 0.0]), algorithm.initial_state())
    logprobs = torch.tensor([[-0.1], [-7.0]], requires_grad=True)
    loss = algorithm.loss(batch, PolicyOutput(logprobs, {"value": torch.zeros(2, 1)}))
    (gradient,) = torch.autograd.grad(loss.terms[0].values.sum(), logprobs)
    assert_close(gradient, torch.tensor([[-math.e], [-1 / math.e]]))
