"""REINFORCE++: whitened returns-to-go of score and KL penalty, and PPO's loss on them, computed by hand."""

import math
from functools import partial

import pytest
import torch

from apa_cli.algorithms.base import ScoreScaling
from apa_cli.algorithms.reinforce_pp import Baseline, ReinforcePP
from apa_cli.types import Batch, Needs, PolicyOutput, Rollout
from tests.builders import make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NEUTRAL = {
    "score_scaling": ScoreScaling.none, "score_clip": None, "entropy_coef": 0.0, "clip_range": 0.2, "kl_coef": 0.5,
    "baseline": Baseline.none,
}  # fmt: skip


def make_reinforce_pp(**fields) -> ReinforcePP:
    """Return REINFORCE++ with unscaled scores, a KL coefficient of 0.5 and no baseline."""
    return ReinforcePP(**{**NEUTRAL, **fields})


# k1 = 1 and −2; 2; 1 and 1. Responses 1 and 3 answer prompt 7, response 2 prompt 5 (and 4 too, where there are four)
SAMPLER = torch.tensor([[-1.0, -3.0], [-0.5, 0.0], [-1.0, -1.0]])
REFERENCE = torch.tensor([[-2.0, -1.0], [-2.5, 0.0], [-2.0, -2.0]])
LENGTHS = [2, 1, 2]
MASK = make_mask(LENGTHS)
SCORES = torch.tensor([3.0, 4.0, 5.0])
# Token rewards at kl_coef 0.5: −0.5, 3 + 1; 4 − 1; −0.5, 5 − 0.5. Returns to go:
RETURNS = torch.tensor([[3.5, 4.0], [3.0, 0.0], [4.0, 4.5]])
# Mean (3.5 + 4 + 3 + 4 + 4.5)/5 = 3.8; squares 0.09 + 0.04 + 0.64 + 0.04 + 0.49 = 1.3, variance 0.26
ADVANTAGES = (RETURNS - 3.8) / 0.26**0.5 * MASK


def make_responses(junk: float = 0.0, **fields) -> Rollout:
    """Return three responses; log-probs outside the mask are `junk`."""
    tables = {"sampler": SAMPLER, "reference": REFERENCE, "old": SAMPLER, **fields.pop("logprobs", {})}
    logprobs = {name: table.masked_fill(~MASK, junk) for name, table in tables.items()}
    return make_rollout(MASK, logprobs=logprobs, **{"scores": SCORES, **fields})


def prepare(responses: Rollout, algorithm: ReinforcePP) -> Batch:
    return algorithm.prepare(responses, algorithm.initial_state())[0]


def test_needs_are_old_and_reference_log_probs_and_two_responses_to_a_prompt_for_their_mean():
    passes = {"response": ("reference", "old")}
    assert make_reinforce_pp().needs() == Needs(passes=passes)
    with_baseline = make_reinforce_pp(baseline=Baseline.group_mean).needs()
    assert with_baseline == Needs(passes=passes, samples_per_prompt=2, least_samples=2)
    assert make_reinforce_pp(kl_coef=0.0).needs().passes == {"response": ("old",)}
    assert make_reinforce_pp(entropy_coef=0.1).needs().entropy


def test_advantages_are_whitened_returns_to_go():
    assert_close(prepare(make_responses(), make_reinforce_pp()).advantages, ADVANTAGES, rtol=2e-6)


def test_without_a_price_of_kl_all_tokens_of_a_response_have_its_score():
    # scores 3, 3, 4, 5, 5 over the tokens: mean 4, variance (1 + 1 + 0 + 1 + 1)/5 = 0.8
    responses = make_responses().replace(logprobs={"sampler": SAMPLER, "old": SAMPLER})
    batch = prepare(responses, make_reinforce_pp(kl_coef=0.0))
    assert_close(batch.advantages, torch.tensor([[-1.0, -1.0], [0.0, 0.0], [1.0, 1.0]]) / 0.8**0.5)


def test_the_penalty_is_in_units_of_the_scaled_score():
    # scores 1, 5, 3 with the deviation √((4 + 4 + 0)/3); k1 = 1 in response 1: a price of 0.5 after the scaling
    scores = torch.tensor([1.0, 5.0, 3.0])
    responses = make_rollout(
        make_mask([1, 1, 1]),
        scores=scores,
        logprobs={"sampler": torch.full((3, 1), -1.0), "reference": torch.tensor([[-2.0], [-1.0], [-1.0]])},
    )
    algorithm = make_reinforce_pp(score_scaling=ScoreScaling.running)
    batch, state = algorithm.prepare(responses, algorithm.initial_state())
    scale = (8 / 3) ** 0.5
    rewards = [1 / scale - 0.5, 5 / scale, 3 / scale]
    mean = sum(rewards) / 3
    deviation = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / 3)
    assert_close(batch.advantages, torch.tensor([[(reward - mean) / deviation] for reward in rewards]), rtol=2e-6)
    assert batch.metrics["score/scale"] == pytest.approx(scale, rel=1e-12)
    assert state == {"score_moments": (3, 3, 8)}


FOUR = {
    "scores": torch.tensor([3.0, 4.0, 7.0, 0.0]),
    "groups": torch.tensor([7, 5, 7, 5]),
    "logprobs": {
        "sampler": torch.tensor([[-1.0], [-1.0], [-1.0], [-1.0]]),
        "reference": torch.tensor([[-2.0], [-1.0], [-1.0], [-3.0]]),
    },
}


def test_the_groups_mean_score_is_subtracted_before_the_price_of_kl_and_the_whitening():
    # 3 − 5, 4 − 2, 7 − 5, 0 − 2, less 0.5·(1, 0, 0, 2): −2.5, 2, 2, −3; mean −3/8, squares sum 23.25
    batch = prepare(make_rollout(make_mask([1] * 4), **FOUR), make_reinforce_pp(baseline=Baseline.group_mean))
    deviation = math.sqrt(23.25 / 4 - (3 / 8) ** 2)
    expected = (torch.tensor([[-2.5], [2.0], [2.0], [-3.0]]) + 3 / 8) / deviation
    assert_close(batch.advantages, expected, rtol=2e-6)


def test_without_a_baseline_prompts_are_compared_with_each_other():
    # 3 − 0.5, 4, 7, 0 − 1: mean 12.5/4, squares sum 6.25 + 16 + 49 + 1 = 72.25
    batch = prepare(make_rollout(make_mask([1] * 4), **FOUR), make_reinforce_pp())
    deviation = math.sqrt(72.25 / 4 - (12.5 / 4) ** 2)
    expected = (torch.tensor([[2.5], [4.0], [7.0], [-1.0]]) - 12.5 / 4) / deviation
    assert_close(batch.advantages, expected, rtol=2e-6)


def test_equal_scores_of_a_prompt_have_no_advantage_over_its_mean():
    # 0.1 three times and 0.7 twice, without KL: nothing is left, and nothing is divided by it
    scores = torch.tensor([0.1, 0.7, 0.1, 0.1, 0.7])
    responses = make_rollout(
        make_mask([1, 2, 2, 1, 2]), scores=scores, groups=torch.tensor([7, 5, 7, 7, 5]),
        logprobs={"reference": torch.zeros(5, 2)},
    )  # fmt: skip
    assert not prepare(responses, make_reinforce_pp(baseline=Baseline.group_mean)).advantages.any()


def test_a_mean_over_a_single_response_is_refused():
    responses = make_responses(groups=torch.tensor([7, 5, 7]))
    assert_close(prepare(responses, make_reinforce_pp()).advantages, ADVANTAGES, rtol=2e-6)
    with pytest.raises(ValueError, match=r"^samples_per_prompt: "):
        prepare(responses, make_reinforce_pp(baseline=Baseline.group_mean))


def test_tokens_of_another_sampler_have_no_price_and_others_than_the_policys_are_not_whitened():
    # the first token of response 1 is another's, and trains nobody: returns 4 (second), 3, 4, 4.5 as before, with the
    # mean 15.5/4 and the squares' sum 16 + 9 + 16 + 20.25 = 61.25
    policy = MASK.clone()
    policy[0, 0] = False
    batch = prepare(make_responses(masks={"policy": policy}, on_policy=policy), make_reinforce_pp())
    deviation = math.sqrt(61.25 / 4 - (15.5 / 4) ** 2)
    assert_close(batch.advantages, (RETURNS - 15.5 / 4) / deviation * policy, rtol=2e-6)
    # the second token another's: the first has −0.5 + 3 = 2.5, and it has 3; with 3, 4, 4.5: mean 14/4 without it
    policy = MASK.clone()
    policy[0, 1] = False
    batch = prepare(make_responses(masks={"policy": policy}, on_policy=policy), make_reinforce_pp())
    deviation = math.sqrt((2.5**2 + 9 + 16 + 20.25) / 4 - (14 / 4) ** 2)
    assert float(batch.advantages[0, 0]) == pytest.approx((2.5 - 14 / 4) / deviation, rel=2e-6)


def test_loss_gradient_and_clip_fraction_by_hand():
    algorithm = make_reinforce_pp()
    batch = prepare(make_responses(), algorithm).replace(
        advantages=torch.tensor([[2.0, -2.0], [2.0, 0.0], [-2.0, 1.0]])
    )
    ratios = torch.tensor([[1.5, 1.5], [0.5, 1.0], [0.5, 1.1]])
    logprobs = ((SAMPLER + ratios.log()) * MASK).requires_grad_()
    loss = algorithm.loss(batch, PolicyOutput(logprobs, {}))
    (policy,) = loss.terms
    assert (policy.name, policy.mask, policy.weight) == ("policy", "policy", 1)
    # −2·1.2 (clipped), 2·1.5;  −2·0.5;  2·0.8 (clipped), −1.1
    assert_close(policy.values, torch.tensor([[-2.4, 3.0], [-1.0, 0.0], [1.6, -1.1]]))
    (gradient,) = torch.autograd.grad(policy.values.sum(), logprobs)
    assert_close(gradient, torch.tensor([[0.0, 3.0], [-1.0, 0.0], [0.0, -1.1]]))
    clipped = loss.metrics["policy/clip_fraction"]
    assert clipped.values.tolist() == [[1, 0], [0, 0], [1, 0]]
    assert (clipped.mask, clipped.reduction, clipped.values.requires_grad) == ("policy", "mean", False)


def test_on_policy_the_gradient_is_minus_the_advantage_and_ratios_are_to_the_old_log_probs():
    # the sampler's log-probs are a nat below the training forward's; the price of KL keeps to the sampler's
    algorithm = make_reinforce_pp()
    batch = prepare(make_responses(logprobs={"sampler": SAMPLER - 1, "reference": REFERENCE - 1}), algorithm)
    logprobs = (SAMPLER * MASK).requires_grad_()
    values = algorithm.loss(batch, PolicyOutput(logprobs, {})).terms[0].values
    assert_close(values, -ADVANTAGES, rtol=2e-6)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert_close(gradient, -ADVANTAGES, rtol=2e-6)  # a descent raises tokens whose returns are above the mean


def test_an_entropy_bonus_is_subtracted_from_the_loss():
    algorithm, entropy = make_reinforce_pp(entropy_coef=0.3), torch.rand(3, 2)
    output = PolicyOutput(SAMPLER, {}, entropy=entropy)
    _, bonus = algorithm.loss(prepare(make_responses(), algorithm), output).terms
    assert (bonus.name, bonus.mask, bonus.weight) == ("entropy", "policy", 0.3)
    assert_close(bonus.values, -entropy)


@pytest.mark.parametrize("junk", [1e30, math.inf, math.nan])
def test_values_outside_the_mask_change_nothing(junk):
    results = []
    for filling in (0.0, junk):
        algorithm = make_reinforce_pp(score_scaling=ScoreScaling.running)
        batch, state = algorithm.prepare(make_responses(junk=filling), algorithm.initial_state())
        leaf = (SAMPLER + 0.1).requires_grad_()
        output = PolicyOutput(leaf.masked_fill(~MASK, 0.0), {})  # as the forward pass gives it
        loss = algorithm.loss(batch, output).terms[0].values.where(MASK, torch.zeros(())).sum()
        results.append((batch.advantages, loss.detach(), *torch.autograd.grad(loss, leaf)))
        assert state == {"score_moments": (3, 4, 2)}
    for clean, dirty in zip(*results, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)


@pytest.mark.parametrize("baseline", list(Baseline))
def test_a_random_batch_agrees_with_plain_loops_in_float64(baseline):
    torch.manual_seed(0)
    lengths, groups = [3, 5, 1, 4, 2, 5, 3, 2], [0, 1, 0, 2, 1, 2, 0, 1]
    mask, scores = make_mask(lengths), torch.randn(8)
    sampler, reference, old, new = (-torch.rand(8, 5) for _ in range(4))
    responses = make_rollout(
        mask,
        scores=scores,
        groups=torch.tensor(groups),
        logprobs={"sampler": sampler, "reference": reference, "old": old},
    )
    algorithm = make_reinforce_pp(kl_coef=0.3, baseline=baseline)
    batch = prepare(responses, algorithm)
    values = algorithm.loss(batch, PolicyOutput(new * mask, {})).terms[0].values

    returns = {}
    for i in range(8):
        group = [float(scores[j]) for j in range(8) if groups[j] == groups[i]]
        to_come = float(scores[i]) - (sum(group) / len(group) if baseline is Baseline.group_mean else 0)
        for t in reversed(range(lengths[i])):
            to_come -= 0.3 * float(sampler[i, t].double() - reference[i, t].double())
            returns[i, t] = to_come
    mean = sum(returns.values()) / len(returns)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in returns.values()) / len(returns))
    for (i, t), value in returns.items():
        advantage = (value - mean) / deviation
        ratio = math.exp(float(new[i, t].double() - old[i, t].double()))
        expected = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
        assert float(values[i, t]) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert len(returns) == 25
