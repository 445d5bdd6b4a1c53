"""apa-eval's metrics, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from apa_cli.inference.eval_metrics import (
    compare_with_sft,
    compute_best_of_n,
    compute_unpaired_metrics,
)
from apa_cli.inference.eval_tables import build_score_rows
from apa_cli.kl import best_of_n_bound
from apa_cli.training.evaluator import RESPONSE_METRICS, ScoredResponses


def test_gain_and_win_rate_are_of_pairs():
    metrics = compare_with_sft([1.0, 2.0, 3.0, 5.0], [1.0, 1.0, 4.0, 1.0])
    # Differences 0, 1, −1, 4: mean 1, squares about it 1 + 0 + 4 + 9 = 14, deviation √(14/3), over √4.
    assert metrics["gain"] == 1
    assert metrics["gain_ci"] == pytest.approx(1.96 * math.sqrt(14 / 3) / 2)
    # A tie, two won, one lost: ½ + 1 + 0 + 1 of 4; squares about 0.625: 0.015625 + 2 · 0.140625 + 0.390625 = 0.6875.
    assert metrics["win_rate_sft"] == 0.625
    assert metrics["win_rate_sft_ci"] == pytest.approx(1.96 * math.sqrt(0.6875 / 3) / 2)
    # 1, 1, 4, 1: mean 1.75, squares about it 3 · 0.5625 + 5.0625 = 6.75.
    assert metrics["reward_mean_sft"] == 1.75
    assert metrics["reward_ci_sft"] == pytest.approx(1.96 * math.sqrt(6.75 / 3) / 2)


def test_best_of_n_is_the_best_of_the_first_n():
    scores = torch.tensor([[1.0, 5.0, 2.0], [4.0, 3.0, 9.0]])
    metrics = compute_best_of_n(scores, [1, 2, 3], [6.0, 8.0, 100.0])  # the third prompt has no n replies
    means = [metrics[f"eval/best_of_{n}/reward_mean"] for n in (1, 2, 3)]
    assert means == [2.5, 4.5, 7.0]  # 1 and 4; 5 and 4; 5 and 9
    # 5 and 9: deviation √8, over √2 is 2.
    assert metrics["eval/best_of_3/reward_ci"] == pytest.approx(1.96 * 2)
    # 6 − 5 and 8 − 9: mean 0, deviation √2, over √2 is 1. And 6 − 5, 8 − 4: mean 2.5.
    assert metrics["eval/best_of_3/gain"] == 0 and metrics["eval/best_of_3/gain_ci"] == pytest.approx(1.96)
    assert metrics["eval/best_of_2/gain"] == 2.5
    assert metrics["eval/best_of_3/kl_bound"] == pytest.approx(1.0986123 - 2 / 3)


def test_best_of_n_stays_within_its_bound():
    assert best_of_n_bound(1) == 0
    # Two equally likely replies: the better one of two samples is the better reply with probability ¾.
    coin = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    # Of m equally likely replies the best of n is number k with probability (k/m)^n − ((k−1)/m)^n.
    m, n = 1000, 4
    shares = [(k / m) ** n - ((k - 1) / m) ** n for k in range(1, m + 1)]
    many = sum(p * math.log(p * m) for p in shares)
    assert coin < best_of_n_bound(2)
    assert many < best_of_n_bound(4) < many + 0.01  # the limit of many replies


def test_replies_are_described_by_themselves():
    rollout = SimpleNamespace(
        response_ids=torch.tensor([[1, 2, 1, 2], [1, 2, 3, 9], [4, 9, 9, 9]]),
        mask=torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]).bool(),
        responses=["a", "b", "c"],
        endings=["length", "stop", "stop"],
    )
    entropy = torch.tensor([[1.0, 1, 1, 1], [1, 1, 3, 0], [2, 0, 0, 0]])
    evaluator = SimpleNamespace(describe_responses=lambda rollout: {"added": len(rollout.responses)})
    metrics = compute_unpaired_metrics(evaluator, ScoredResponses(rollout, {"": [0.0] * 3}, torch.zeros(3, 4), entropy))
    assert metrics == {
        "entropy": pytest.approx(11 / 8),
        "distinct_1": 4 / 8,  # 1, 2, 3, 4 of eight tokens
        "distinct_2": 3 / 5,  # 12, 21, 23 of 12, 21, 12, 12, 23
        "distinct_3": 1.0,  # 121, 212, 123
        "length": pytest.approx(8 / 3),
        "eos_rate": 0,
        "stop_rate": 2 / 3,
        "truncated_rate": 1 / 3,
        "added": 3,
    }
    assert set(metrics) == {*RESPONSE_METRICS, "added"}


def test_one_prompt_has_no_interval():
    metrics = compare_with_sft([1.0], [0.5]) | compute_best_of_n(torch.tensor([[1.0, 2.0]]), [2], [3.0])
    assert metrics["gain"] == 0.5 and metrics["eval/best_of_2/gain"] == 1
    assert not [name for name in metrics if name.endswith("_ci") or "_ci_" in name]


def test_the_table_has_no_interval_that_was_not_measured_and_names_the_truncated_sampler():
    metrics = {"eval/reward_mean": 1.0, "eval/kl_exact": 2.0, "eval/kl_exact_ci": 0.25, "eval/kl_exact_token": 0.5}
    score, _, kl, kl_token = build_score_rows(metrics, [""], is_truncated=True)
    assert score == ["score", "1", "", ""]
    assert kl[:2] == ["exact KL of the truncated sampler, nats per response", "2 ± 0.25"]
    assert kl_token[:2] == ["exact KL of the truncated sampler, nats per token", "0.5"]
    assert build_score_rows(metrics, [""])[2][0] == "exact KL, nats per response"
