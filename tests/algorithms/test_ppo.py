"""PPO: KL penalty in the token rewards, KL controller, ratios and clip fraction, computed by hand."""

import math
from functools import partial

import pytest
import torch

from apa_cli.algorithms.base import AdvantageEstimator, ScoreScaling
from apa_cli.algorithms.ppo import PPO, KLController
from apa_cli.types import Critic, Needs, PolicyOutput, Rollout
from tests.builders import make_algorithm, make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
make_ppo = partial(make_algorithm, PPO, kl_target=2.0, kl_horizon=20)

# k1 = −1 + 1.5 = 0.5 and −2 + 1 = −1 in response 1, −0.5 + 2.5 = 2 in response 2
SAMPLER = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])
REFERENCE = torch.tensor([[-1.5, -1.0], [-2.5, 0.0]])
OLD = torch.tensor([[-1.0, -2.0], [-0.5, 0.0]])


def make_responses(**fields) -> Rollout:
    """Return a response of two tokens with score 3 and one of one token with score 4 to one prompt; values 0."""
    logprobs = {"sampler": SAMPLER, "reference": REFERENCE, "init": REFERENCE, "old": OLD}
    defaults = {
        "logprobs": {**logprobs, **fields.pop("logprobs", {})},
        "endings": ["eos", "length"],
        "groups": torch.tensor([0, 0]),
        "scores": torch.tensor([3.0, 4.0]),
        "values": {"value": torch.zeros(2, 2)},
    }
    return make_rollout(make_mask([2, 1]), **{**defaults, **fields})


def test_needs_are_old_log_probs_a_reference_and_a_critic():
    passes = {"response": ("reference", "old", "value")}
    assert make_ppo().needs() == Needs(critics=(Critic("value"),), passes=passes)
    without_critic = make_ppo(advantage_estimator=AdvantageEstimator.group_mean).needs()
    assert without_critic == Needs(passes={"response": ("reference", "old")}, samples_per_prompt=2, least_samples=2)


def test_the_adaptive_controller_needs_the_initial_policy():
    adaptive = make_ppo(kl_controller=KLController.adaptive)
    assert adaptive.needs().passes == {"response": ("reference", "old", "value", "init")}


def test_an_entropy_bonus_needs_the_entropy_and_is_subtracted_from_the_loss():
    algorithm = make_ppo(entropy_coef=0.3)
    assert (algorithm.needs().entropy, make_ppo().needs().entropy) == (True, False)
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    entropy = torch.tensor([[0.5, 1.0], [2.0, 0.0]], requires_grad=True)
    terms = algorithm.loss(batch, PolicyOutput(OLD, {"value": torch.zeros(2, 2)}, entropy=entropy)).terms
    assert [(term.name, term.mask, term.weight) for term in terms] == [
        ("policy", "policy", 1), ("value", "critic/value", 1), ("entropy", "policy", 0.3),
    ]  # fmt: skip
    assert_close(terms[-1].values, -entropy)
    with pytest.raises(ValueError, match=r"^entropy: not computed"):
        algorithm.loss(batch, PolicyOutput(OLD, {"value": torch.zeros(2, 2)}))


def test_token_rewards_are_the_score_at_the_end_minus_the_kl_penalty():
    # −0.1·0.5;  −0.1·(−1) + 3;  −0.1·2 + 4
    algorithm, responses = make_ppo(), make_responses()
    rewards = algorithm.token_rewards(responses, responses.scores, algorithm.initial_state())
    assert_close(rewards, torch.tensor([[-0.05, 3.1], [3.8, 0.0]]))


def test_the_penalty_is_in_units_of_the_scaled_score():
    # scores 3, 4 have the deviation ½: scaled 6, 8; the penalty stays −0.05, +0.1; −0.2
    algorithm = make_ppo(score_scaling=ScoreScaling.batch)
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    # γ = gae_lambda = 1 and V = 0: returns are sums to come, 6.1 − 0.05 and 6.1; 7.8
    assert_close(batch.returns["value"], torch.tensor([[6.05, 6.1], [7.8, 0.0]]))
    assert_close(batch.advantages, torch.tensor([[6.05, 6.1], [7.8, 0.0]]))


def test_the_penalty_uses_the_losss_reference_and_the_samplers_log_probs():
    responses = make_responses(logprobs={"init": REFERENCE + 9, "old": OLD + 9})
    batch, _ = make_ppo().prepare(responses, make_ppo().initial_state())
    assert_close(batch.returns["value"], torch.tensor([[3.05, 3.1], [3.8, 0.0]]))


def test_group_mean_compares_scores_minus_their_penalty():
    # totals 3.1 − 0.05 = 3.05 and 3.8: ∓0.75
    algorithm = make_ppo(advantage_estimator=AdvantageEstimator.group_mean)
    batch, _ = algorithm.prepare(make_responses(values={}), algorithm.initial_state())
    assert_close(batch.advantages, torch.tensor([[-0.75, -0.75], [0.75, 0.0]]), rtol=2e-6)  # a difference


def test_a_fixed_coefficient_does_not_change():
    algorithm = make_ppo()
    batch, state = algorithm.prepare(make_responses(), algorithm.initial_state())
    assert state["kl_coef"] == 0.1
    assert batch.metrics["ppo/kl_coef"] == 0.1


def test_an_adaptive_coefficient_changes_for_the_next_iteration_only():
    algorithm = make_ppo(kl_controller=KLController.adaptive)
    before = algorithm.initial_state()
    first, after = algorithm.prepare(make_responses(), before)
    # this iteration still has the coefficient 0.1
    assert first.metrics["ppo/kl_coef"] == 0.1
    assert_close(first.returns["value"], torch.tensor([[3.05, 3.1], [3.8, 0.0]]))
    # kl/sequence = ((0.5 − 1) + 2)/2 = 0.75; 0.75/2 − 1 = −0.625, clipped to −0.2; n/horizon = 2/20:
    # 0.1·(1 − 0.02) = 0.098
    assert after["kl_coef"] == pytest.approx(0.098, rel=1e-12)
    assert before["kl_coef"] == 0.1
    # the next one has 0.098: −0.098·0.5;  3 + 0.098;  4 − 0.196
    second, last = algorithm.prepare(make_responses(), after)
    assert second.metrics["ppo/kl_coef"] == after["kl_coef"]
    assert_close(second.returns["value"], torch.tensor([[3.049, 3.098], [3.804, 0.0]]))
    assert last["kl_coef"] == pytest.approx(0.098 * 0.98, rel=1e-12)


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (0.6, 0.1 * (1 + 0.2 * 2 / 20)),  # 0.75/0.6 − 1 = 0.25, clipped to 0.2
        (0.6818181818181818, 0.1 * (1 + 0.1 * 2 / 20)),  # 0.75·22/15 − 1 = 0.1
        (0.75, 0.1),
    ],
)
def test_the_controllers_error_is_kl_over_target_minus_one(target, expected):
    algorithm = make_ppo(kl_controller=KLController.adaptive, kl_target=target)
    _, state = algorithm.prepare(make_responses(), algorithm.initial_state())
    assert state["kl_coef"] == pytest.approx(expected, rel=1e-6)


def test_the_controller_measures_kl_against_the_initial_policy():
    # every token one nat further from π_init: kl/sequence = 0.75 + (2 + 1)/2 = 2.25; 2.25/2 − 1 = 0.125
    algorithm = make_ppo(kl_controller=KLController.adaptive)
    _, state = algorithm.prepare(make_responses(logprobs={"init": REFERENCE - 1}), algorithm.initial_state())
    assert state["kl_coef"] == pytest.approx(0.1 * (1 + 0.125 * 2 / 20), rel=1e-6)


@pytest.mark.parametrize(
    ("on_policy", "expected"),
    [
        # kl = −0.5 of response 1 alone, clipped to −0.2, for n = 1: 0.1·(1 − 0.2·1/20)
        ([[True, True], [False, False]], 0.1 * (1 - 0.2 / 20)),
        # nothing to measure: unchanged
        ([[False, False], [False, False]], 0.1),
    ],
)
def test_the_controller_measures_tokens_that_the_present_policy_sampled(on_policy, expected):
    algorithm = make_ppo(kl_controller=KLController.adaptive)
    _, state = algorithm.prepare(make_responses(on_policy=torch.tensor(on_policy)), algorithm.initial_state())
    assert state["kl_coef"] == pytest.approx(expected, rel=1e-12)


def test_loss_and_clip_fraction_by_hand():
    algorithm = make_ppo()
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    batch = batch.replace(advantages=torch.tensor([[2.0, -2.0], [2.0, 0.0]]))
    ratios = torch.tensor([[1.5, 1.5], [0.5, 1.0]])
    loss = algorithm.loss(batch, PolicyOutput(OLD + ratios.log(), {"value": torch.zeros(2, 2)}))
    # −2·1.2 (clipped), max(3, 2.4), max(−1, −1.6); one true token of three is clipped
    assert_close(loss.terms[0].values, torch.tensor([[-2.4, 3.0], [-1.0, 0.0]]))
    clipped = loss.metrics["policy/clip_fraction"]
    assert_close(clipped.values, torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert (clipped.mask, clipped.reduction) == ("policy", "mean")


def test_ratios_use_the_training_forwards_old_log_probs():
    # the sampler's log-probs are one nat lower and do not enter the ratio
    algorithm = make_ppo()
    responses = make_responses(logprobs={"sampler": SAMPLER - 1, "reference": REFERENCE - 1})
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    logprobs = OLD.clone().requires_grad_()
    loss = algorithm.loss(batch, PolicyOutput(logprobs, {"value": torch.zeros(2, 2)}))
    assert_close(loss.terms[0].values, -batch.advantages)
    (gradient,) = torch.autograd.grad(loss.terms[0].values.sum(), logprobs)
    assert_close(gradient, -batch.advantages)  # on-policy: REINFORCE
    assert not loss.metrics["policy/clip_fraction"].values.requires_grad


def test_values_outside_the_mask_do_not_enter_the_controllers_kl():
    algorithm = make_ppo(kl_controller=KLController.adaptive)
    mask = make_responses().mask
    dirty = make_responses(
        logprobs={
            "sampler": SAMPLER.masked_fill(~mask, math.nan),
            "reference": REFERENCE.masked_fill(~mask, math.inf),
            "init": REFERENCE.masked_fill(~mask, -math.inf),
        }
    )
    batch, state = algorithm.prepare(dirty, algorithm.initial_state())
    assert state["kl_coef"] == pytest.approx(0.098, rel=1e-12)
    assert_close(batch.returns["value"], torch.tensor([[3.05, 3.1], [3.8, 0.0]]))
