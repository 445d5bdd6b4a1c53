"""The losses: values by hand, zeros, gradients, bounds, and independence of values outside the mask."""

import math
from functools import partial

import pytest
import torch

from apa_cli.losses import MAX_LOG_RATIO, apa_loss, awr_loss, critic_loss, k3_loss, ppo_clip_mask, ppo_loss
from apa_cli.tensor_ops import masked_mean, token_logprobs

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NAN, INF = math.nan, math.inf


def gradient(value: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(value.sum(), at)[0]


# APA


def test_apa_loss_by_hand():
    # λ = 0.5: (−1 + 1.5 − 0.1/0.5)² = 0.3² = 0.09;  (−2 + 1 − 0.5/0.5)² = (−2)² = 4;
    # (−1 + 1 + 0.2/0.5)² = 0.16
    logprobs = torch.tensor([-1.0, -2.0, -1.0])
    reference = torch.tensor([-1.5, -1.0, -1.0])
    advantages = torch.tensor([0.1, 0.5, -0.2])
    assert_close(apa_loss(logprobs, reference, advantages, 0.5), torch.tensor([0.09, 4.0, 0.16]))
    # with log Z = 0.7: (0.3 + 0.7)² = 1;  (−2 + 0.7)² = 1.69;  (0.4 + 0.7)² = 1.21
    assert_close(apa_loss(logprobs, reference, advantages, 0.5, 0.7), torch.tensor([1.0, 1.69, 1.21]))


@pytest.mark.parametrize("log_normalizer", [0.0, 0.75, -1.5])
def test_apa_loss_and_gradient_vanish_exactly_at_the_target(log_normalizer):
    # sixteenths and λ = 1/8: every number here is exact in float32
    reference = torch.tensor([-1.0, -2.5, -0.0625])
    advantages = torch.tensor([0.25, -0.5, 0.0])
    target = reference + advantages / 0.125 - log_normalizer
    logprobs = target.clone().requires_grad_()
    loss = apa_loss(logprobs, reference, advantages, 0.125, log_normalizer)
    assert not loss.any()
    assert not gradient(loss, logprobs).any()
    for step in (-0.5, 0.5):
        assert (apa_loss(target + step, reference, advantages, 0.125, log_normalizer) == 0.25).all()


def test_apa_gradient_is_twice_the_distance_to_the_target():
    logprobs = torch.tensor([-1.0, -3.0], requires_grad=True)
    loss = apa_loss(logprobs, torch.tensor([-2.0, -2.0]), torch.tensor([0.5, 0.5]), 0.25)
    # distances 1 − 2 = −1 and −1 − 2 = −3
    assert_close(gradient(loss, logprobs), torch.tensor([-2.0, -6.0]))


def test_apa_pulls_to_the_reference_at_large_lambda():
    logprobs, reference = torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -1.0])
    advantages = torch.tensor([5.0, -5.0])
    # 5/1e8 is below float32's resolution near 1, so what is left is the squared log-ratio
    assert_close(apa_loss(logprobs, reference, advantages, 1e8), torch.tensor([1.0, 4.0]))


def test_apa_normalizer_may_differ_by_token():
    loss = apa_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), 1.0, torch.tensor([2.0, -3.0]))
    assert_close(loss, torch.tensor([4.0, 9.0]))


# AWR


def test_awr_loss_by_hand():
    # λ = 0.5: −exp(1)·(−2) = 2e;  −exp(−1)·(−3) = 3/e;  −exp(0)·(−1) = 1
    loss = awr_loss(torch.tensor([-2.0, -3.0, -1.0]), torch.tensor([0.5, -0.5, 0.0]), 0.5, None)
    assert_close(loss, torch.tensor([2 * math.e, 3 / math.e, 1.0]))


def test_awr_weights_are_clipped_from_above_only():
    logprobs = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    advantages = torch.tensor([0.5, 0.75, 10.0, -10.0])
    # λ = 0.5: weights e, e^1.5 = 4.48, e^20, e^−20; clipped at 4
    assert_close(awr_loss(logprobs, advantages, 0.5, 4.0), torch.tensor([math.e, 4.0, 4.0, math.exp(-20)]), atol=0)
    assert_close(awr_loss(logprobs, advantages, 0.5, None)[1:3], torch.tensor([math.exp(1.5), math.exp(20)]))


@pytest.mark.parametrize("weight_clip", [None, 1e30])
def test_awr_weights_stay_finite(weight_clip):
    # Â/λ = 200: exp would be ∞ in float32, and ∞ · 0 NaN; the bound is 20 nats. Â/λ = 19 is not changed
    logprobs = torch.tensor([0.0, -1.0], requires_grad=True)
    loss = awr_loss(logprobs, torch.tensor([20.0, 1.9]), 0.1, weight_clip)
    assert_close(loss.detach(), torch.tensor([0.0, math.exp(19)]), rtol=1e-5)
    assert_close(gradient(loss, logprobs), -torch.tensor([math.exp(20), math.exp(19)]), rtol=1e-5)


def test_awr_gradient_is_minus_the_weight():
    logprobs = torch.tensor([-2.0, -3.0], requires_grad=True)
    loss = awr_loss(logprobs, torch.tensor([1.0, 9.0]), 1.0, 20.0)
    assert_close(gradient(loss, logprobs), torch.tensor([-math.e, -20.0]))


def test_awr_without_advantages_is_imitation():
    logprobs = torch.tensor([-2.0, -3.0])
    assert_close(awr_loss(logprobs, torch.zeros(2), 0.1, 20.0), -logprobs)
    assert_close(awr_loss(logprobs, torch.tensor([3.0, -3.0]), 1e8, 20.0), -logprobs)


# PPO


@pytest.mark.parametrize(
    ("advantage", "ratio", "loss", "slope", "clipped"),
    [
        # slope is d loss / d ratio, which times the ratio is the gradient with respect to ℓ_θ
        (2.0, 1.1, -2.2, -2.0, 0),  # inside
        (2.0, 1.5, -2.4, 0.0, 1),  # −2·1.2: no gradient beyond the bound
        (2.0, 0.5, -1.0, -2.0, 0),  # max(−1, −1.6): not clipped
        (-2.0, 0.9, 1.8, 2.0, 0),  # inside
        (-2.0, 0.5, 1.6, 0.0, 1),  # max(1, 1.6): 2·0.8
        (-2.0, 1.5, 3.0, 2.0, 0),  # max(3, 2.4)
        (0.0, 1.5, 0.0, 0.0, 0),  # no advantage: neither branch is larger
        (0.0, 0.5, 0.0, 0.0, 0),
    ],
)
def test_ppo_loss_by_hand(advantage, ratio, loss, slope, clipped):
    old, advantages = torch.tensor([-1.0]), torch.tensor([advantage])
    logprobs = (old + math.log(ratio)).requires_grad_()
    value = ppo_loss(logprobs - old, advantages, 0.2)
    # exp(log(ratio)) in float32 has an error of a few 1e-7 relative
    torch.testing.assert_close(value, torch.tensor([loss]), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient(value, logprobs), torch.tensor([slope * ratio]), rtol=1e-6, atol=0)
    assert ppo_clip_mask(logprobs - old, advantages, 0.2).item() == clipped


def test_clip_range_sets_both_bounds():
    # ratio 1.5, Â 1: clipped at 1 + 0.4; ratio 0.5, Â −1: at 1 − 0.4
    logprobs, old = torch.tensor([1.5, 0.5]).log(), torch.zeros(2)
    advantages = torch.tensor([1.0, -1.0])
    assert_close(ppo_loss(logprobs - old, advantages, 0.4), torch.tensor([-1.4, 0.6]))
    assert ppo_clip_mask(logprobs - old, advantages, 0.4).tolist() == [1, 1]
    assert ppo_clip_mask(logprobs - old, advantages, 0.6).tolist() == [0, 0]


@pytest.mark.parametrize(("log_ratio", "advantage"), [(0.25, 1.0), (-0.25, -1.0)])
def test_a_ratio_on_the_bound_is_not_clipped(log_ratio, advantage):
    old, logprobs = torch.zeros(1), torch.tensor([log_ratio], requires_grad=True)
    edge = abs(float(logprobs.detach().exp()) - 1)
    loss = ppo_loss(logprobs - old, torch.tensor([advantage]), edge)
    assert_close(gradient(loss, logprobs), -torch.tensor([advantage]) * logprobs.detach().exp())
    assert not ppo_clip_mask(logprobs - old, torch.tensor([advantage]), edge).any()


def test_on_policy_gradient_of_ppo_is_reinforces():
    torch.manual_seed(0)
    logits = torch.randn(4, 6, 9, requires_grad=True)
    tokens, advantages = torch.randint(0, 9, (4, 6)), torch.randn(4, 6)
    logprobs = token_logprobs(logits, tokens)
    ppo_gradient = gradient(ppo_loss(logprobs - logprobs.detach(), advantages, 0.2), logits)
    reinforce_gradient = gradient(-advantages * token_logprobs(logits, tokens), logits)
    assert_close(ppo_gradient, reinforce_gradient)
    assert not ppo_clip_mask(logprobs - logprobs, advantages, 0.2).any()


def test_clipped_tokens_are_those_without_a_gradient():
    torch.manual_seed(0)
    old, advantages = -torch.rand(1000), torch.randn(1000)
    logprobs = (old + 0.5 * torch.randn(1000)).requires_grad_()
    slope = gradient(ppo_loss(logprobs - old, advantages, 0.2), logprobs)
    clipped = ppo_clip_mask(logprobs - old, advantages, 0.2)
    torch.testing.assert_close(clipped, (slope == 0).float(), rtol=0, atol=0)
    assert 100 < clipped.sum() < 900


def test_the_upper_bound_may_be_another_than_the_lower():
    # ε = 0.2, ε_high = 0.5. Â 1: ratio 1.4 is inside, 1.6 clipped at 1.5; Â −1: ratio 0.7 clipped at 0.8, 1.6 is not
    log_ratio = torch.tensor([1.4, 1.6, 0.7, 1.6]).log()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0])
    assert_close(ppo_loss(log_ratio, advantages, 0.2, 0.5), torch.tensor([-1.4, -1.5, 0.8, 1.6]))
    assert ppo_clip_mask(log_ratio, advantages, 0.2, 0.5).tolist() == [0, 1, 1, 0]


def test_log_ratios_are_clamped_so_that_losses_and_gradients_stay_finite():
    # exp(1000) is inf, and 0 · inf is NaN; beyond ±20 the loss is that of ±20, without a gradient
    log_ratio = torch.tensor([1000.0, 1000.0, 1000.0, -1000.0], requires_grad=True)
    advantages = torch.tensor([0.0, 1.0, -1.0, 1.0])
    loss = ppo_loss(log_ratio, advantages, 0.2)
    assert MAX_LOG_RATIO == 20
    assert_close(loss, torch.tensor([0.0, -1.2, math.exp(20), -math.exp(-20)]), atol=0)
    assert gradient(loss, log_ratio).tolist() == [0, 0, 0, 0]
    assert ppo_clip_mask(log_ratio, advantages, 0.2).tolist() == [0, 1, 0, 0]


def test_log_ratios_within_the_bound_are_not_changed():
    # to the bit, value and gradient: −Â·exp(x) at Â = −1, ratios from e⁰ to e²⁰
    log_ratio = torch.linspace(0, 20, 1001, requires_grad=True)
    loss = ppo_loss(log_ratio, -torch.ones(1001), 0.2)
    torch.testing.assert_close(loss, log_ratio.exp(), rtol=0, atol=0)
    torch.testing.assert_close(gradient(loss, log_ratio), log_ratio.detach().exp(), rtol=0, atol=0)


def test_k3_loss_by_hand():
    # d = ℓ_ref − ℓ_θ = ln 2, −ln 2, 0: 2 − 1 − ln 2;  ½ − 1 + ln 2;  0. Gradient 1 − exp(d) = −1, ½, 0: a descent
    # raises ℓ_θ below the reference, and lowers ℓ_θ above the reference
    logprobs = torch.tensor([-2.0, -1.0, -0.5], requires_grad=True)
    reference = torch.tensor([-2 + math.log(2), -1 - math.log(2), -0.5])
    loss = k3_loss(logprobs, reference)
    assert_close(loss, torch.tensor([1 - math.log(2), math.log(2) - 0.5, 0.0]), atol=1e-6)
    assert_close(gradient(loss, logprobs), torch.tensor([-1.0, 0.5, 0.0]), atol=1e-6)


def test_k3_loss_of_far_policies_is_finite():
    # d clamped to ±20: e²⁰ − 21 and e⁻²⁰ + 19
    logprobs = torch.tensor([-1000.0, 0.0], requires_grad=True)
    loss = k3_loss(logprobs, torch.tensor([0.0, -1000.0]))
    assert_close(loss, torch.tensor([math.exp(20) - 21, math.exp(-20) + 19]))
    assert gradient(loss, logprobs).tolist() == [0, 0]


# Critic


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize(
    ("value", "unclipped", "clipped", "slope"),
    [
        # V_old = 1, c = 0.2, G = 2
        (1.5, 0.125, 0.32, 0.0),  # ½·0.5²;  V clipped to 1.2: ½·0.8², the larger, without slope
        (0.5, 1.125, 1.125, -1.5),  # ½·1.5²;  clipped to 0.8: ½·1.2² is smaller, so the slope is V − G
        (1.1, 0.405, 0.405, -0.9),  # within ±0.2 both are ½·0.9²
        (3.5, 1.125, 1.125, 1.5),  # ½·1.5²;  clipped to 1.2: ½·0.8² is smaller
        (2.1, 0.005, 0.32, 0.0),  # ½·0.1²;  clipped to 1.2: ½·0.8²
    ],
)
def test_critic_loss_by_hand(sign, value, unclipped, clipped, slope):
    values = torch.tensor([sign * value], requires_grad=True)
    returns, old = torch.tensor([sign * 2.0]), torch.tensor([sign * 1.0])
    # 1e-5 for V near G, where V − G loses a digit; the other numbers are exact to 1e-6
    assert_near = partial(torch.testing.assert_close, rtol=1e-5 if value == 2.1 else 1e-6, atol=0)
    plain, bounded = critic_loss(values, returns, old, None), critic_loss(values, returns, old, 0.2)
    assert_near(plain, torch.tensor([unclipped]))
    assert_near(gradient(plain, values), torch.tensor([sign * (value - 2.0)]))
    assert_near(bounded, torch.tensor([clipped]))
    assert_near(gradient(bounded, values), torch.tensor([sign * slope]))


def test_a_wide_value_clip_range_changes_nothing():
    torch.manual_seed(0)
    values, returns, old = torch.randn(3, 50)
    # 1e-6: V_old + (V − V_old) is V up to a rounding
    assert_close(critic_loss(values, returns, old, 100.0), critic_loss(values, returns, old, None), atol=1e-6)


# Masks

MASK = torch.tensor([[True, True, False], [True, False, False]])
LOSSES = {
    "apa": lambda x, a, b: apa_loss(x, a, b, 0.5, 0.1),
    "awr": lambda x, a, b: awr_loss(x, a + b, 0.5, 20.0),
    "ppo": lambda x, a, b: ppo_loss(x - a, b, 0.2),
    "k3": lambda x, a, b: k3_loss(x, a + b),
    "critic": lambda x, a, b: critic_loss(x, a, b, None),
    "critic, clipped": lambda x, a, b: critic_loss(x, a, b, 5.0),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("junk", [1e30, INF, -INF, NAN])
def test_values_outside_the_mask_change_neither_loss_nor_gradient(loss, junk):
    torch.manual_seed(0)
    x, first, second = torch.randn(3, 2, 3)

    def value_and_gradient(filling: float) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = x.clone().requires_grad_()
        output = leaf.masked_fill(~MASK, 0.0)  # as the forward pass gives it
        value = masked_mean(loss(output, first.masked_fill(~MASK, filling), second.masked_fill(~MASK, filling)), MASK)
        return value.detach(), gradient(value, leaf)

    for clean, dirty in zip(value_and_gradient(0.0), value_and_gradient(junk), strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
    assert value_and_gradient(junk)[1][MASK].abs().min() > 0
    assert not value_and_gradient(junk)[1][~MASK].any()
