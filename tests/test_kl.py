"""KL from the reference: estimators on sampled tokens, the exact sum, the adaptive coefficient."""

import math
from functools import partial

import pytest
import torch

from apa_cli.kl import (
    adapt_kl_coef,
    count_on_policy_sequences,
    exact_kl,
    k1,
    measure_sequence_kl,
    measure_token_k3,
)
from apa_cli.tensor_ops import token_logprobs
from apa_cli.types import Rollout, Sequences
from tests.builders import make_mask, make_rollout, make_sequences

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
NAN, INF = math.nan, math.inf

MASK = torch.tensor([[True, True, True], [True, False, False]])
LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, 0.0, 0.0]])
REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-3.25, 0.0, 0.0]])
JUNK_LOGPROBS = torch.tensor([[-1.0, -2.0, -0.5], [-3.0, NAN, -INF]])
JUNK_REFERENCE = torch.tensor([[-1.5, -1.0, -0.5], [-3.25, 5.0, -INF]])


def test_k1_is_the_difference_of_log_probabilities():
    # −1 + 1.5, −2 + 1, −0.5 + 0.5; −3 + 3.25
    assert_close(k1(LOGPROBS, REFERENCE), torch.tensor([[0.5, -1.0, 0.0], [0.25, 0.0, 0.0]]))


def make_responses(logprobs: torch.Tensor, reference: torch.Tensor, mask: torch.Tensor = MASK, **fields) -> Rollout:
    """Return a rollout with these log-probs of its sampler and of the reference."""
    return make_rollout(mask, logprobs={"sampler": logprobs, "init": reference}, **fields)


def make_related(logprobs: list[list[float]], on_policy: torch.Tensor) -> Sequences:
    """Return related sequences of two tokens and of one for the two rows; the reference's log-probs are −1."""
    sequences = make_sequences([[1], [1]], [[2, 3], [2]])
    tables = {"sampler": torch.tensor(logprobs), "init": torch.full((2, 2), -1.0)}
    return sequences.replace(on_policy=on_policy & sequences.mask, logprobs=tables)


@pytest.mark.parametrize(("logprobs", "reference"), [(LOGPROBS, REFERENCE), (JUNK_LOGPROBS, JUNK_REFERENCE)])
def test_sequence_kl_is_the_mean_over_responses_of_their_sums(logprobs, reference):
    # response 1: 0.5 − 1 + 0 = −0.5; response 2: 0.25; mean (−0.5 + 0.25) / 2 = −0.125, so it may be negative
    responses = make_responses(logprobs, reference)
    assert measure_sequence_kl(responses, "init") == pytest.approx(-0.125, rel=1e-6)
    assert count_on_policy_sequences(responses) == 2


@pytest.mark.parametrize(("logprobs", "reference"), [(LOGPROBS, REFERENCE), (JUNK_LOGPROBS, JUNK_REFERENCE)])
def test_token_k3_by_hand(logprobs, reference):
    # exp(−k1) − 1 + k1 at k1 = 0.5, −1, 0, 0.25, over 4 tokens
    total = (math.exp(-0.5) - 0.5) + (math.exp(1) - 2) + 0 + (math.exp(-0.25) - 0.75)
    assert measure_token_k3(make_responses(logprobs, reference), "init") == pytest.approx(total / 4, rel=1e-6)


def test_kl_counts_the_tokens_that_the_present_policy_sampled():
    # of response 1 the last two tokens, −1 + 0, of response 2 none: one sequence, two tokens
    on_policy = torch.tensor([[False, True, True], [False, False, False]])
    responses = make_responses(LOGPROBS, REFERENCE, on_policy=on_policy)
    assert measure_sequence_kl(responses, "init") == pytest.approx(-1, rel=1e-6)
    assert measure_token_k3(responses, "init") == pytest.approx((math.e - 2) / 2, rel=1e-6)
    assert count_on_policy_sequences(responses) == 1


def test_kl_counts_related_sequences_like_the_rows_own():
    # sums −0.5 and 0.25 of the rows' own; k1 = 1 and −0.5, so 0.5, of the related sequence of row 1, 0.5 of row 2's
    related = make_related([[0.0, -1.5], [-0.5, NAN]], make_mask([2, 1]))
    responses = make_responses(LOGPROBS, REFERENCE, related={"second": related})
    assert measure_sequence_kl(responses, "init") == pytest.approx((-0.5 + 0.25 + 0.5 + 0.5) / 4, rel=1e-6)
    assert count_on_policy_sequences(responses) == 4
    own = (math.exp(-0.5) - 0.5) + (math.exp(1) - 2) + 0 + (math.exp(-0.25) - 0.75)
    other = math.exp(-1) + (math.exp(0.5) - 1.5) + (math.exp(-0.5) - 0.5)
    assert measure_token_k3(responses, "init") == pytest.approx((own + other) / (4 + 3), rel=1e-6)


def test_kl_leaves_out_related_sequences_that_another_sampled():
    # no log-probs are needed of a related sequence without an on-policy token
    logged = make_sequences([[1], [1]], [[2, 3], [2]]).replace(on_policy=torch.zeros(2, 2, dtype=torch.bool))
    related = make_related([[0.0, -1.5], [9.0, 9.0]], torch.tensor([[True, False], [False, False]]))
    responses = make_responses(LOGPROBS, REFERENCE, related={"chosen": logged, "second": related})
    assert measure_sequence_kl(responses, "init") == pytest.approx((-0.5 + 0.25 + 1) / 3, rel=1e-6)
    assert count_on_policy_sequences(responses) == 3


def test_kl_without_an_on_policy_token_is_none():
    responses = make_responses(LOGPROBS, REFERENCE, on_policy=torch.zeros_like(MASK))
    assert measure_sequence_kl(responses, "init") is None
    assert measure_token_k3(responses, "init") is None
    assert count_on_policy_sequences(responses) == 0


def test_kl_is_measured_against_the_named_log_probs():
    responses = make_rollout(MASK, logprobs={"sampler": LOGPROBS, "init": REFERENCE, "reference": REFERENCE - 1})
    # one nat more for each token: −0.5 + 3, 0.25 + 1
    assert measure_sequence_kl(responses, "reference") == pytest.approx((2.5 + 1.25) / 2, rel=1e-6)
    with pytest.raises(ValueError, match=r"^logprobs 'old': not computed"):
        measure_sequence_kl(responses, "old")


def measure_k3(difference: float | torch.Tensor) -> float:
    """Return k3 of a single token with this k1."""
    one = torch.tensor([[True]])
    k3 = measure_token_k3(make_responses(torch.as_tensor(difference).reshape(1, 1), torch.zeros(1, 1), one), "init")
    assert k3 is not None
    return k3


def test_k3_is_zero_for_equal_policies_and_positive_otherwise():
    differences = torch.arange(-30, 31) / 10
    k3 = torch.tensor([measure_k3(difference) for difference in differences])
    assert ((k3 > 0) == (differences != 0)).all()
    assert k3[30] == 0  # the middle of the grid is k1 = 0


def test_k3_of_small_differences_is_half_their_square():
    # exp(−d) − 1 + d = d²/2 − d³/6 + …; the rounding of float32 alone would be 6e-8
    for difference in (1e-3, 1e-4, -1e-4, 1e-5):
        assert measure_k3(difference) == pytest.approx(difference**2 / 2 - difference**3 / 6, rel=1e-4)


def test_exact_kl_by_hand():
    # p = (½, ¼, ¼), q = (¼, ¼, ½): ½ ln 2 + ¼ ln 1 + ¼ ln ½ = ¼ ln 2; from q to p the same; from p to p 0
    p, q = torch.tensor([2.0, 1.0, 1.0]).log(), torch.tensor([1.0, 1.0, 2.0]).log()
    logits, reference = torch.stack([p, q, p]).unsqueeze(0), torch.stack([q, p, p]).unsqueeze(0)
    assert_close(exact_kl(logits, reference), torch.tensor([[math.log(2) / 4, math.log(2) / 4, 0.0]]))


def test_exact_kl_is_weighted_by_the_policy_not_the_reference():
    # p = (3/4, 1/4), q = (1/2, 1/2): KL(p‖q) = ¾ ln 1.5 + ¼ ln 0.5; KL(q‖p) = ½ ln ⅔ + ½ ln 2
    p, q = torch.tensor([[[3.0, 1.0]]]).log(), torch.tensor([[[1.0, 1.0]]]).log()
    assert float(exact_kl(p, q)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-6)
    assert float(exact_kl(q, p)) == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2), rel=1e-6)


def test_exact_kl_is_the_expectation_of_k1_and_of_k3_under_the_policy():
    torch.manual_seed(0)
    logits, reference = torch.randn(2, 3, 7), torch.randn(2, 3, 7)
    probabilities = logits.softmax(-1)
    every = [torch.full((2, 3), token) for token in range(7)]
    differences = torch.stack([k1(token_logprobs(logits, t), token_logprobs(reference, t)) for t in every], dim=-1)
    # a sum of seven terms of size 1 in another order: 1e-6 absolute
    assert_close(exact_kl(logits, reference), (probabilities * differences).sum(-1), atol=1e-6)
    k3 = torch.tensor([measure_k3(difference) for difference in differences.flatten()])
    expected = (probabilities * k3.reshape(differences.shape)).sum(-1)
    assert_close(exact_kl(logits, reference), expected, atol=1e-6)


def test_exact_kl_of_low_precision_logits_is_computed_in_float32():
    torch.manual_seed(0)
    logits, reference = torch.randn(1, 4, 7).bfloat16(), torch.randn(1, 4, 7).bfloat16()
    kl = exact_kl(logits, reference)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, exact_kl(logits.float(), reference.float()), rtol=0, atol=0)


def test_exact_kl_does_not_depend_on_a_shift_of_the_logits():
    torch.manual_seed(0)
    logits, reference = torch.randn(1, 4, 7), torch.randn(1, 4, 7)
    assert_close(exact_kl(logits + 3, reference - 2), exact_kl(logits, reference), atol=1e-6)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.05),  # on target
        (6.6, 0.05 * (1 + 0.1 * 64 / 10_000)),  # 6.6/6 − 1 = 0.1
        (5.4, 0.05 * (1 - 0.1 * 64 / 10_000)),  # 5.4/6 − 1 = −0.1
        (60.0, 0.05 * (1 + 0.2 * 64 / 10_000)),  # 9, clipped to 0.2
        (0.0, 0.05 * (1 - 0.2 * 64 / 10_000)),  # −1, clipped to −0.2
        (-3.0, 0.05 * (1 - 0.2 * 64 / 10_000)),  # an estimate may be negative
    ],
)
def test_adaptive_coefficient_by_hand(kl, expected):
    assert adapt_kl_coef(0.05, kl, target=6.0, n=64, horizon=10_000) == pytest.approx(expected, rel=1e-12)


def test_k3_of_far_policies_is_finite():
    """exp(1000) is ∞ also in float64; log-ratios are clamped to ±20: k = −20 gives exp(20) − 1 − 20."""
    mask = make_mask([1])
    rollout = make_rollout(mask, logprobs={"sampler": torch.tensor([[-1000.0]]), "init": torch.tensor([[0.0]])})
    assert measure_token_k3(rollout, "init") == pytest.approx(math.exp(20) - 21, rel=1e-6)
