"""Masked reductions and log-probabilities: values by hand, and independence of values outside the mask."""

import math
from functools import partial

import pytest
import torch

from apa_cli.tensor_ops import (
    choose_divisor,
    differ,
    drop_rounding,
    is_rounding,
    masked_mean,
    masked_row_mean,
    masked_row_sum,
    masked_sum,
    masked_variance,
    token_entropy,
    token_logprobs,
    whiten,
)

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NAN, INF = math.nan, math.inf

MASK = torch.tensor([[True, True, False], [True, False, False]])
CLEAN = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
JUNK = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, -INF]])


@pytest.mark.parametrize("x", [CLEAN, JUNK])
def test_reductions_are_over_true_tokens_only(x):
    # true tokens 1, 2, 4: sum 7, mean 7/3, variance ((−4/3)² + (−1/3)² + (5/3)²) / 3 = (42/9) / 3 = 14/9
    assert_close(masked_sum(x, MASK), torch.tensor(7.0))
    assert_close(masked_mean(x, MASK), torch.tensor(7 / 3))
    assert_close(masked_variance(x, MASK), torch.tensor(14 / 9))


@pytest.mark.parametrize("x", [CLEAN, JUNK])
def test_gradients_of_sum_and_mean_are_the_mask_and_the_mask_over_its_count(x):
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(masked_sum(x, MASK), x)
    assert_close(gradient, MASK.float())
    (gradient,) = torch.autograd.grad(masked_mean(x, MASK), x)
    assert_close(gradient, MASK / 3)


@pytest.mark.parametrize("x", [CLEAN, JUNK])
def test_sums_and_means_of_rows_are_over_their_true_tokens(x):
    # 1 + 2 and 4; a third row without a true token has the sum and the mean 0
    x, mask = torch.cat([x, x[:1]]).requires_grad_(), torch.cat([MASK, torch.zeros_like(MASK[:1])])
    assert_close(masked_row_sum(x, mask), torch.tensor([3.0, 4.0, 0.0]))
    assert_close(masked_row_mean(x, mask), torch.tensor([1.5, 4.0, 0.0]))
    (gradient,) = torch.autograd.grad(masked_row_mean(x, mask).sum(), x)
    assert_close(gradient, torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_mean_over_an_empty_mask_is_zero():
    assert masked_mean(JUNK, torch.zeros_like(MASK)) == 0


def test_mean_over_one_token_is_that_token():
    only = torch.tensor([[False, False, False], [True, False, False]])
    assert masked_mean(JUNK, only) == 4
    assert masked_variance(JUNK, only) == 0


@pytest.mark.parametrize("x", [CLEAN, JUNK])
def test_whitening_by_hand(x):
    # deviations −4/3, −1/3, 5/3 over the standard deviation √14 / 3: −4, −1 and 5 over √14
    root = math.sqrt(14)
    assert_close(whiten(x, MASK), torch.tensor([[-4 / root, -1 / root, 0.0], [5 / root, 0.0, 0.0]]))


def test_whitened_tokens_have_mean_0_and_variance_1_and_the_rest_is_0():
    torch.manual_seed(0)
    x, mask = 7 + 3 * torch.randn(50, 20), torch.rand(50, 20) < 0.3
    white = whiten(x, mask)
    tokens = white[mask].double()
    assert float(tokens.mean()) == pytest.approx(0, abs=1e-6)
    assert float((tokens**2).mean()) == pytest.approx(1, rel=1e-6)
    assert not white[~mask].any()


def test_whitening_removes_shift_and_scale():
    torch.manual_seed(0)
    x, mask = torch.randn(8, 5), torch.rand(8, 5) < 0.5
    # 1e-6: the shift costs a few units in the last place of numbers near 1
    torch.testing.assert_close(whiten(3 * x + 5, mask), whiten(x, mask), rtol=1e-6, atol=1e-6)
    assert_close(whiten(-x, mask), -whiten(x, mask))


@pytest.mark.parametrize("values", [[3.0, 3.0, 9.0], [0.0, 0.0, math.nan], [1e-7, -1e-7, 9.0], [1e6, 1e6 + 2, 0.0]])
def test_what_does_not_differ_beyond_rounding_whitens_to_zeros(values):
    # deviations 0, 0, 1e-7 and 1; 2⁻¹⁸ = 3.8e-6 of the largest, at least of 1: 3.8e-6 and 3.8
    assert whiten(torch.tensor([values]), torch.tensor([[True, True, False]])).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("values", [[5e-6, -5e-6, 0.0], [1e6, 1e6 + 16, 0.0]])
def test_a_small_difference_beyond_rounding_is_whitened(values):
    # deviations 5e-6 and 8, above 3.8e-6 and 3.8
    high, low = max(values[:2]), min(values[:2])
    expected = [[1.0 if value == high else -1.0 for value in values[:2]] + [0.0]]
    assert high > low
    assert_close(whiten(torch.tensor([values]), torch.tensor([[True, True, False]])), torch.tensor(expected))


def test_rounding_is_relative_to_the_number_and_at_least_to_1():
    # 2⁻¹⁸ = 3.81e-6
    assert is_rounding(3.8e-6, 0.0) and not is_rounding(3.9e-6, 0.5)
    assert is_rounding(-3.8e-5, -10.0) and not is_rounding(3.9e-5, 10.0)
    assert (choose_divisor(1e-6, 0.1), choose_divisor(0.01, 0.1)) == (1.0, 0.01)
    differences = torch.tensor([3.8e-6, -3.9e-6, 3.8e-5, -3.9e-5])
    kept = drop_rounding(differences, torch.tensor([0.1, 1.0, 10.0, -10.0]))
    assert kept.tolist() == torch.tensor([0, -3.9e-6, 0, -3.9e-5]).tolist()
    assert differ(torch.tensor([1.0, 1.0, 0.0]), torch.tensor([1 + 2e-6, 1 + 8e-6, 5e-6])).tolist() == [0, 1, 1]


def test_log_probability_of_the_sampled_token_by_hand():
    # weights 1, 2, 5: probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([1.0, 2.0, 5.0]).log().expand(1, 3, 3)
    token_ids = torch.tensor([[2, 0, 1]])
    assert_close(token_logprobs(logits, token_ids), torch.tensor([[5 / 8, 1 / 8, 2 / 8]]).log())
    assert_close(token_logprobs(logits + 7, token_ids), torch.tensor([[5 / 8, 1 / 8, 2 / 8]]).log(), atol=1e-6)


def test_each_position_has_its_own_distribution():
    logits = torch.tensor([[[1.0, 3.0], [1.0, 1.0]], [[4.0, 1.0], [1.0, 9.0]]]).log()
    token_ids = torch.tensor([[1, 0], [0, 1]])
    assert_close(token_logprobs(logits, token_ids), torch.tensor([[3 / 4, 1 / 2], [4 / 5, 9 / 10]]).log())


def test_gradient_of_the_log_probability_is_one_hot_minus_softmax():
    logits = torch.tensor([[[1.0, 2.0, 5.0]]]).log().requires_grad_()
    token_logprobs(logits, torch.tensor([[1]])).sum().backward()
    assert_close(logits.grad, torch.tensor([[[-1 / 8, 1 - 2 / 8, -5 / 8]]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_logits_are_normalised_in_float32(dtype):
    # 0, ln 2 rounded to the low precision, 0: whatever the rounded number x is, −log(2 + exp(x)) in float32
    logits = torch.tensor([[[0.0, math.log(2), 0.0]]], dtype=dtype)
    expected = -math.log(2 + math.exp(float(logits[0, 0, 1])))
    logprobs = token_logprobs(logits, torch.tensor([[0]]))
    assert logprobs.dtype == torch.float32
    assert float(logprobs) == pytest.approx(expected, rel=1e-6)
    assert token_entropy(logits).dtype == torch.float32


def test_entropy_by_hand():
    # ½, ¼, ¼: ½ ln 2 + 2 · ¼ ln 4 = 1.5 ln 2; uniform over 3: ln 3; certain: 0
    logits = torch.tensor([[[2.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1e-30, 1e-30]]]).log()
    assert_close(token_entropy(logits), torch.tensor([[1.5 * math.log(2), math.log(3), 0.0]]))


def test_entropy_is_the_expected_negative_log_probability():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 5)
    every = torch.stack([token_logprobs(logits, torch.full((2, 3), token)) for token in range(5)], dim=-1)
    assert_close(token_entropy(logits), -(logits.softmax(-1) * every).sum(-1), rtol=2e-6)


@pytest.mark.parametrize("value", [0.7, 0.1, -1e4, 0.0])
def test_whitening_a_constant_gives_zeros_up_to_its_rounding(value):
    x = torch.full((64, 32), value)
    assert whiten(x, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1e-6
    noisy = x * (1 + 1e-7 * torch.randn(64, 32))
    assert whiten(noisy, torch.ones_like(x, dtype=torch.bool)).abs().max() < 1
