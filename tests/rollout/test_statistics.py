"""Metrics of a rollout, by hand: their log-probs, tokens and signs."""

import math
from dataclasses import replace

import pytest
import torch

from apa_cli.rollout.statistics import (
    compute_kl_metrics,
    compute_response_metrics,
    compute_sampling_metrics,
    confidence_half_width,
    distinct_n,
)
from apa_cli.types import Rollout
from tests.builders import make_mask, make_rollout, make_sequences

JUNK = 77.0
"""Value outside the mask."""


def pad_with_junk(*rows: list[float]) -> torch.Tensor:
    return torch.tensor([[*row, *[JUNK] * (3 - len(row))] for row in rows])


@pytest.fixture
def rollout() -> Rollout:
    """Four responses of 3, 1, 2 and 1 tokens; the kinds of log-probs all differ."""
    return make_rollout(
        make_mask([3, 1, 2, 1]),
        response_ids=torch.tensor([[5, 6, 5], [6, 5, 6], [5, 6, 6], [9, 8, 7]]),
        endings=["length", "length", "length", "eos"],
        scores=torch.tensor([1.0, 4.0, 7.0, 10.0]),
        logprobs={
            "sampler": pad_with_junk([-1.0, -2.0, -0.5], [-3.0], [-0.25, -4.0], [-1.25]),
            "init": pad_with_junk([-1.5, -1.0, -2.0], [-2.0], [-1.0, -4.5], [-1.0]),
            "reference": pad_with_junk([-1.25, -2.5, -1.0], [-3.5], [-2.0, -3.0], [-5.25]),
            "old": pad_with_junk([-9.0, -8.0, -7.0], [-6.0], [-5.0, -10.0], [-11.0]),
        },
        values={"value": pad_with_junk([0.1, 0.2, 0.3], [0.4], [0.5, 0.6], [0.7])},
    )


def test_reward_mean_and_std_by_hand(rollout):
    metrics = compute_sampling_metrics(rollout)
    assert metrics["reward/mean"] == 5.5  # 22 of 4
    # −4½, −1½, 1½ and 4½: squares 20¼ + 2¼ + 2¼ + 20¼ = 45 of 4 (of 3 it would be 15)
    assert metrics["reward/std"] == pytest.approx(math.sqrt(45 / 4), rel=1e-6)


def test_entropy_is_the_mean_negative_log_prob_of_the_sampler(rollout):
    # 1 + 2 + ½ + 3 + ¼ + 4 + 1¼ = 12 on seven tokens
    assert compute_sampling_metrics(rollout)["policy/entropy"] == pytest.approx(12 / 7, rel=1e-6)


K1 = [0.5, -1.0, 1.5, -1.0, 0.75, 0.5, -0.25]
"""Sampler minus π_init of the seven tokens in order; per response 1, −1, 1.25 and −0.25."""


def test_kl_is_between_the_sampler_and_the_initial_policy(rollout):
    metrics = compute_kl_metrics(rollout)
    assert metrics["kl/sequence"] == pytest.approx((1 - 1 + 1.25 - 0.25) / 4, rel=1e-6)
    assert metrics["kl/token_k3"] == pytest.approx(sum(math.exp(-k) - 1 + k for k in K1) / 7, rel=1e-6)
    assert metrics["kl/token_k3"] != pytest.approx(
        sum(math.exp(k) - 1 - k for k in K1) / 7, rel=0.1
    )  # the opposite sign


def test_kl_refreshed_is_between_the_sampler_and_the_moving_reference(rollout):
    # Sampler minus reference: ¼ + ½ + ½; ½; 1¾ − 1; 4. Sum over four responses: 1.25 + 0.5 + 0.75 + 4 = 6.5.
    assert compute_kl_metrics(rollout)["kl/refreshed"] == pytest.approx(6.5 / 4, rel=1e-6)
    fixed = compute_kl_metrics(rollout.replace(logprobs={**rollout.logprobs, "reference": rollout.logprobs["init"]}))
    assert "kl/refreshed" not in fixed and fixed["kl/sequence"] == 0.25


def test_entropy_and_kl_count_the_tokens_of_the_present_policy_only(rollout):
    """The policy completes row 0 after its first token and samples row 2; rows 1 and 3 are another model's."""
    on_policy = torch.tensor([[0, 1, 1], [0, 0, 0], [1, 1, 0], [0, 0, 0]]).bool()
    mixed = rollout.replace(on_policy=on_policy)
    # 2 + ½ + ¼ + 4 on four tokens
    assert compute_sampling_metrics(mixed)["policy/entropy"] == pytest.approx(6.75 / 4, rel=1e-6)
    metrics = compute_kl_metrics(mixed)
    # Sampler minus π_init: −1 + 1½ in row 0, ¾ + ½ in row 2; minus the reference: ½ + ½, and 1¾ − 1.
    assert metrics["kl/sequence"] == pytest.approx((0.5 + 1.25) / 2, rel=1e-6)
    assert metrics["kl/refreshed"] == pytest.approx((1 + 0.75) / 2, rel=1e-6)
    k3 = sum(math.exp(-k) - 1 + k for k in (-1.0, 1.5, 0.75, 0.5))
    assert metrics["kl/token_k3"] == pytest.approx(k3 / 4, rel=1e-6)
    # A related response of row 3 with two tokens, sampler minus π_init ¼ and ½, of which the policy sampled the second.
    tokens = make_sequences([[1]] * 4, [[5], [5], [5], [5, 6]])
    logprobs = {
        "sampler": pad_with_junk([-1.0], [-1.0], [-1.0], [-1.0, -2.0])[:, :2],
        "init": pad_with_junk([-2.0], [-2.0], [-2.0], [-1.25, -2.5])[:, :2],
        "reference": pad_with_junk([-2.0], [-2.0], [-2.0], [-1.25, -2.75])[:, :2],
    }
    second = tokens.replace(on_policy=torch.tensor([[0, 0]] * 3 + [[0, 1]]).bool(), logprobs=logprobs)
    metrics = compute_kl_metrics(mixed.replace(related={"second": second}))
    assert metrics["kl/sequence"] == pytest.approx((0.5 + 1.25 + 0.5) / 3, rel=1e-6)
    assert metrics["kl/refreshed"] == pytest.approx((1 + 0.75 + 0.75) / 3, rel=1e-6)
    assert metrics["kl/token_k3"] == pytest.approx((k3 + math.exp(-0.5) - 0.5) / 5, rel=1e-6)
    # If the rows' own responses are all off-policy, for which nothing is computed, the related one remains.
    logged = rollout.replace(on_policy=torch.zeros_like(rollout.mask), logprobs={}, related={"second": second})
    assert compute_kl_metrics(logged) == {
        "kl/sequence": pytest.approx(0.5),
        "kl/refreshed": pytest.approx(0.75),
        "kl/token_k3": pytest.approx(math.exp(-0.5) - 0.5),
    }


def test_without_a_token_of_the_present_policy_there_is_no_entropy_and_no_kl(rollout):
    logged = rollout.replace(on_policy=torch.zeros_like(rollout.mask))
    assert compute_kl_metrics(logged) == {}
    assert "policy/entropy" not in compute_sampling_metrics(logged)
    assert compute_sampling_metrics(logged)["reward/mean"] == 5.5


def test_without_log_probs_of_the_initial_policy_there_is_no_kl(rollout):
    """Not even if they were computed for a part of what the policy sampled."""
    sampler = {"sampler": rollout.logprobs["sampler"]}
    assert compute_kl_metrics(rollout.replace(logprobs=sampler)) == {}
    second = make_sequences([[1]] * 4, [[5]] * 4).replace(logprobs={"sampler": torch.zeros(4, 1)})
    assert compute_kl_metrics(rollout.replace(related={"second": second})) == {}


def test_response_statistics_by_hand(rollout):
    metrics = compute_response_metrics(rollout)
    # Bigrams 56, 65 and 56: two of three are distinct.
    assert metrics == {
        "response/length": 7 / 4,
        "response/eos_rate": 1 / 4,
        "response/truncated_rate": 3 / 4,
        "response/distinct_2": pytest.approx(2 / 3),
    }
    assert compute_sampling_metrics(rollout).items() >= metrics.items()
    stopped = compute_response_metrics(replace(rollout, endings=["stop", "length", "eos", "eos"]))
    assert (stopped["response/eos_rate"], stopped["response/truncated_rate"]) == (2 / 4, 1 / 4)


def test_ngrams_are_counted_over_all_responses_but_not_across_two(rollout):
    # 5, 6, 5; 6; 5, 6; 9: three distinct tokens of seven; 565 is the only trigram.
    assert distinct_n(rollout.response_ids, rollout.mask, 1) == 3 / 7
    assert distinct_n(rollout.response_ids, rollout.mask, 3) == 1
    assert distinct_n(rollout.response_ids, rollout.mask, 4) == 0  # there are none


def test_the_confidence_interval_of_a_mean():
    # Squared deviations from 5½ sum to 45, over N − 1 = 3: standard deviation √15, over √4.
    assert confidence_half_width(torch.tensor([1.0, 4.0, 7.0, 10.0])) == pytest.approx(
        1.96 * math.sqrt(15) / 2, rel=1e-6
    )
    assert confidence_half_width(torch.tensor([3.0])) is None
