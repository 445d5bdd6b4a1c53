"""Score moments, token rewards and advantage estimators."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from apa_cli.advantages import (
    center_in_groups,
    gae,
    group_mean,
    place_scores_at_end,
    spread_over_tokens,
    subtract_mean_of_others,
    update_moments,
)
from tests.builders import make_mask

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NAN, INF = math.nan, math.inf
NO_SCORES = (0.0, 0.0, 0.0)


def test_moments_by_hand():
    # 1, 2, 3: mean 2, squares 1 + 0 + 1
    first = update_moments(NO_SCORES, torch.tensor([1.0, 2.0, 3.0]))
    assert first == pytest.approx((3, 2, 2), rel=1e-12)
    # 1, 2, 3, 4, 8: mean 18/5 = 3.6, squares 2.6² + 1.6² + 0.6² + 0.4² + 4.4² = 29.2
    assert update_moments(first, torch.tensor([4.0, 8.0])) == pytest.approx((5, 3.6, 29.2), rel=1e-12)


def test_running_moments_are_the_moments_of_the_concatenation():
    scores = torch.from_numpy(1000 + np.random.default_rng(0).standard_normal(100))
    moments = NO_SCORES
    for part in scores.split([1, 9, 40, 50]):
        moments = update_moments(moments, part)
    values = scores.numpy()
    squares = ((values - values.mean()) ** 2).sum()
    assert moments == pytest.approx((100, values.mean(), squares), rel=1e-9)


def test_moments_of_float32_scores_are_computed_in_float64():
    # 2²⁴ and twice 2²⁴ + 2, float32 neighbours: mean 2²⁴ + 4/3, squares (4/3)² + 2·(2/3)² = 8/3
    scores = 2.0**24 + torch.tensor([0.0, 2.0, 2.0])
    moments = update_moments(NO_SCORES, scores)
    assert moments == pytest.approx((3, 2**24 + 4 / 3, 8 / 3), rel=1e-9)


def test_the_score_is_on_the_last_true_token_only():
    mask = make_mask([1, 3, 2, 0])
    expected = torch.tensor([[5.0, 0.0, 0.0], [0.0, 0.0, -2.0], [0.0, 7.0, 0.0], [0.0, 0.0, 0.0]])
    assert_close(place_scores_at_end(torch.tensor([5.0, -2.0, 7.0, 9.0]), mask), expected)


def test_gae_by_hand():
    rewards, values = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 2.0, 4.0]])
    # γ = 0.5: δ = 1 + 0.5·2 − 1 = 1;  0 + 0.5·4 − 2 = 0;  2 + 0 − 4 = −2
    # γ·gae_lambda = 0.4: A_3 = −2;  A_2 = 0 + 0.4·(−2) = −0.8;  A_1 = 1 + 0.4·(−0.8) = 0.68;  G = A + V
    advantages, returns = gae(rewards, values, make_mask([3]), gamma=0.5, gae_lambda=0.8)
    assert_close(advantages, torch.tensor([[0.68, -0.8, -2.0]]))
    assert_close(returns, torch.tensor([[1.68, 1.2, 2.0]]))


@pytest.fixture
def random_responses():
    """Token rewards, values and mask of twelve responses of 1 to 12 tokens, [12, 12] each."""
    torch.manual_seed(0)
    return torch.randn(12, 12), torch.randn(12, 12), make_mask(list(range(1, 13)))


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 0.95), (0.9, 0.8), (1.0, 0.0), (1.0, 1.0)])
def test_gae_equals_the_double_sum_of_its_definition(random_responses, gamma, gae_lambda):
    rewards, values, mask = random_responses
    expected = np.zeros(mask.shape)
    for row, length in enumerate(mask.sum(1).tolist()):
        r, v = rewards[row, :length].double().numpy(), [*values[row, :length].double().tolist(), 0.0]
        for t in range(length):
            expected[row, t] = sum(
                (gamma * gae_lambda) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length)
            )
    advantages, returns = gae(rewards, values, mask, gamma, gae_lambda)
    expected = torch.from_numpy(expected)
    # float32 sums of up to 24 terms of size 1
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(returns.double(), expected + (values * mask).double(), rtol=1e-6, atol=3e-6)


def test_with_gamma_and_gae_lambda_1_the_advantage_is_return_minus_value(random_responses):
    rewards, values, mask = random_responses
    advantages, returns = gae(rewards, values, mask, gamma=1.0, gae_lambda=1.0)
    to_come = (rewards * mask).flip(1).cumsum(1).flip(1) * mask
    # float32 sums of up to 24 terms of size 1
    assert_close(advantages, to_come - values * mask, atol=3e-6)
    assert_close(returns, to_come, atol=3e-6)


def test_with_gae_lambda_0_the_advantage_is_the_td_error(random_responses):
    rewards, values, mask = random_responses
    advantages, returns = gae(rewards, values, mask, gamma=0.9, gae_lambda=0.0)
    following = torch.nn.functional.pad((values * mask)[:, 1:], (0, 1))
    assert_close(returns, (rewards + 0.9 * following) * mask)
    assert_close(advantages, (rewards + 0.9 * following - values) * mask, atol=1e-6)


def test_nothing_is_bootstrapped_after_the_last_true_token():
    # one token, reward 3, value 1: A = 3 − 1 and G = 3, although columns with values follow
    advantages, returns = gae(
        torch.tensor([[3.0, 50.0]]), torch.tensor([[1.0, 70.0]]), make_mask([1], width=2), 1.0, 0.95
    )
    assert_close(advantages, torch.tensor([[2.0, 0.0]]))
    assert_close(returns, torch.tensor([[3.0, 0.0]]))


def test_tokens_before_the_first_true_one_have_no_advantage():
    # a prefix that is not trained on: A_3 = 2 − 4 = −2, A_2 = 0 + 4 − 3 − 2·0.5 = 0, nothing at 1
    mask = torch.tensor([[False, True, True]])
    advantages, returns = gae(
        torch.tensor([[7.0, 0.0, 2.0]]), torch.tensor([[9.0, 3.0, 4.0]]), mask, gamma=1.0, gae_lambda=0.5
    )
    assert_close(advantages, torch.tensor([[0.0, 0.0, -2.0]]))
    assert_close(returns, torch.tensor([[0.0, 3.0, 2.0]]))


@pytest.mark.parametrize("junk", [1e30, INF, NAN])
def test_values_outside_the_mask_change_no_advantage(random_responses, junk):
    rewards, values, mask = random_responses
    expected = gae(rewards * mask, values * mask, mask, 0.9, 0.8)
    actual = gae(rewards.masked_fill(~mask, junk), values.masked_fill(~mask, -junk), mask, 0.9, 0.8)
    for clean, dirty in zip(expected, actual, strict=True):
        torch.testing.assert_close(dirty, clean, rtol=0, atol=0)
        assert not dirty[~mask].any()


def test_group_mean_by_hand():
    totals, groups = torch.tensor([1.0, 10.0, 2.0, 6.0, 4.0]), torch.tensor([3, 8, 3, 3, 8])
    mask = make_mask([1, 2, 2, 1, 2])
    # prompt 3: 1 − (2 + 6)/2 = −3;  2 − (1 + 6)/2 = −1.5;  6 − (1 + 2)/2 = 4.5
    # prompt 8: 10 − 4 = 6;  4 − 10 = −6
    expected = torch.tensor([[-3.0, 0.0], [6.0, 6.0], [-1.5, -1.5], [4.5, 0.0], [-6.0, -6.0]])
    assert_close(group_mean(place_scores_at_end(totals, mask), groups, mask), expected)


def test_group_mean_counts_all_token_rewards_of_a_response_and_none_outside_the_mask():
    rewards = torch.tensor([[1.0, 2.0, 4.0], [0.5, 3.0, NAN], [2.0, -INF, NAN]])
    mask = make_mask([3, 2, 1])
    # totals 7, 3.5, 2: 7 − 5.5/2 = 4.25;  3.5 − 9/2 = −1;  2 − 10.5/2 = −3.25
    expected = torch.tensor([[4.25, 4.25, 4.25], [-1.0, -1.0, 0.0], [-3.25, 0.0, 0.0]])
    assert_close(group_mean(rewards, torch.tensor([0, 0, 0]), mask), expected)


def test_a_value_per_row_is_spread_over_its_true_tokens():
    expected = torch.tensor([[2.0, 2.0, 0.0], [-1.0, -1.0, -1.0], [0.0, 0.0, 0.0]])
    assert_close(spread_over_tokens(torch.tensor([2.0, -1.0, 5.0]), make_mask([2, 3, 0])), expected)


def test_the_mean_of_the_other_responses_is_subtracted():
    # prompt 3: 1 − (2 + 6)/2, 2 − (1 + 6)/2, 6 − (1 + 2)/2; prompt 8: 10 − 4, 4 − 10
    rewards, groups = torch.tensor([1.0, 10.0, 2.0, 6.0, 4.0]), torch.tensor([3, 8, 3, 3, 8])
    expected = torch.tensor([-3.0, 6.0, -1.5, 4.5, -6.0], dtype=torch.float64)
    assert_close(subtract_mean_of_others(rewards, groups), expected)


def test_mean_and_deviation_of_groups_by_hand():
    # prompt 3, scores 1, 2, 6: mean 3, squares 4 + 1 + 9 = 14 over 3 − 1; prompt 8, scores 10, 4: mean 7, 18 over 1
    centered, std = center_in_groups(torch.tensor([1.0, 10.0, 2.0, 6.0, 4.0]), torch.tensor([3, 8, 3, 3, 8]))
    assert_close(centered, torch.tensor([-2.0, 3.0, -1.0, 3.0, -3.0], dtype=torch.float64))
    assert_close(std, torch.tensor([7.0, 18.0, 7.0, 7.0, 18.0], dtype=torch.float64).sqrt())


@pytest.mark.parametrize("size", [2, 3, 5, 7])
def test_equal_float32_scores_have_exactly_their_mean_and_no_deviation(size):
    # in float32, 0.1 + 0.1 + 0.1 over 3 would be another number than 0.1
    scores = torch.tensor([0.1, 0.7, 1 / 3, -1e8]).repeat(size)
    centered, std = center_in_groups(scores, torch.arange(4).repeat(size))
    assert not centered.any() and not std.any()
    assert not subtract_mean_of_others(scores, torch.arange(4).repeat(size)).any()


@pytest.mark.parametrize("offset", [0.0, 0.3, -1e6])
def test_scores_of_a_group_that_differ_by_rounding_are_equal(offset):
    # 2⁻¹⁸ = 3.8e-6 of the score, at least of 1; the second prompt's scores differ by 12.5 times that
    unit = 2.0**-18 * max(1, abs(offset))
    scores = torch.tensor([offset, offset + unit / 2, offset, offset + 12.5 * unit], dtype=torch.float64)
    groups = torch.tensor([0, 0, 1, 1])
    centered, std = center_in_groups(scores, groups)
    difference = subtract_mean_of_others(scores, groups)
    for result, size in ((centered, 6.25), (difference, 12.5)):
        assert_close(result, torch.tensor([0, 0, -size, size], dtype=torch.float64) * unit, rtol=1e-4, atol=0.0)
    assert (std > 0).tolist() == [False, False, True, True]


@pytest.mark.parametrize("measure", [center_in_groups, subtract_mean_of_others])
def test_a_prompt_with_a_single_response_is_refused(measure):
    with pytest.raises(ValueError, match=r"^samples_per_prompt: at least two responses to every prompt"):
        measure(torch.ones(3), torch.tensor([0, 0, 1]))
    with pytest.raises(ValueError, match=r"^samples_per_prompt: "):
        group_mean(torch.ones(3, 1), torch.tensor([0, 0, 1]), make_mask([1, 1, 1]))


def test_group_mean_of_equal_scores_is_0():
    # Five equal scores for each of twelve prompts; in floating point (5 · 0.1 − 0.1) / 4 ≠ 0.1.
    scores = torch.tensor([0.1, 0.7, 1 / 3] * 4).repeat_interleave(5)
    mask = torch.ones(60, 3, dtype=torch.bool)
    advantages = group_mean(place_scores_at_end(scores, mask), torch.arange(12).repeat_interleave(5), mask)
    assert advantages.abs().max() < 1e-15
