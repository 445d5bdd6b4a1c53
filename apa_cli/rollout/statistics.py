"""Metrics of a rollout: response/*, reward/*, kl/*, policy/entropy."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from apa_cli.kl import list_on_policy_sequences, measure_sequence_kl, measure_token_k3
from apa_cli.rollout.response_text import EOS, LENGTH
from apa_cli.tensor_ops import differ, masked_mean, masked_sum
from apa_cli.types import INIT, OLD, REFERENCE, SAMPLER, Rollout, require


def distinct_n(token_ids: Tensor, mask: Tensor, n: int) -> float:
    """Return the share of distinct n-grams among the token n-grams of all responses [N, T]; 0 if there are none.

    Source: Li et al., "A diversity-promoting objective function for neural conversation models", 2016.
    """
    rows = [ids[row_mask].tolist() for ids, row_mask in zip(token_ids, mask, strict=True)]
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def compute_response_metrics(rollout: Rollout) -> dict[str, float]:
    """Return mean length in tokens (end token included), shares of endings, and diversity."""
    n = len(rollout.endings)
    return {
        "response/length": float(rollout.mask.sum(-1).float().mean()),
        "response/eos_rate": rollout.endings.count(EOS) / n,
        "response/truncated_rate": rollout.endings.count(LENGTH) / n,
        "response/distinct_2": distinct_n(rollout.response_ids, rollout.mask, 2),
    }


def compute_equal_groups(scores: Tensor, groups: Tensor) -> float | None:
    """Return the share of the prompts with several responses whose scores do not differ beyond rounding.

    scores and groups [N]; None if no prompt has several responses.
    """
    by_group = [scores[groups == group] for group in groups.unique()]
    parts = [part for part in by_group if len(part) > 1]
    return sum(not bool(differ(part.max(), part.min())) for part in parts) / len(parts) if parts else None


def compute_sampling_metrics(rollout: Rollout) -> dict[str, float]:
    """Return reward/*, response/*, and policy/entropy, the sampler's in nats per token, of the responses as sampled.

    The entropy is over the tokens that the present policy sampled; without such a token it is left out.
    """
    scores = require(rollout.scores, "scores")
    metrics = {"reward/mean": float(scores.mean()), "reward/std": float(scores.std(correction=0))}
    metrics |= drop_missing({"reward/equal_groups": compute_equal_groups(scores, rollout.groups)})
    if bool(rollout.on_policy.any()):
        metrics["policy/entropy"] = -float(masked_mean(rollout.get_logprobs(SAMPLER), rollout.on_policy))
    return metrics | compute_response_metrics(rollout)


def compute_kl_metrics(rollout: Rollout) -> dict[str, float]:
    """Return kl/* before the update, over the tokens that the present policy sampled, related sequences included.

    kl/sequence and kl/token_k3 are against π_init, if its log-probs were computed; kl/refreshed is against a reference
    that is refreshed. Without such a token they are left out.
    """
    parts = [part.logprobs for part in list_on_policy_sequences(rollout)]
    metrics: dict[str, float | None] = {}
    if all(INIT in part for part in parts):
        metrics["kl/sequence"] = measure_sequence_kl(rollout, INIT)
        metrics["kl/token_k3"] = measure_token_k3(rollout, INIT)
        if all(REFERENCE in part and part[REFERENCE] is not part[INIT] for part in parts):
            metrics["kl/refreshed"] = measure_sequence_kl(rollout, REFERENCE)
    return drop_missing(metrics)


def compute_sampler_gap(rollout: Rollout) -> dict[str, float]:
    """Return policy/sampler_gap, the mean |log-prob of the training forward pass − log-prob of the sampler|, in nats.

    Over the tokens that the present policy sampled, related sequences included. Return {} without old log-probs; the
    updater then measures the gap.
    """
    parts = [part for part in list_on_policy_sequences(rollout) if OLD in part.logprobs]
    if not parts:
        return {}
    gaps = [(part.get_logprobs(SAMPLER) - part.get_logprobs(OLD)).abs() for part in parts]
    total = sum(masked_sum(gap, part.on_policy) for gap, part in zip(gaps, parts, strict=True))
    return {"policy/sampler_gap": float(total / sum(part.on_policy.sum() for part in parts))}


def confidence_half_width(values: Tensor) -> float | None:
    """Return the half width of the 95 % normal confidence interval of the mean of `values` [N]; None if N = 1."""
    return float(1.96 * values.std() / len(values) ** 0.5) if len(values) > 1 else None


def drop_missing(metrics: Mapping[str, float | None]) -> dict[str, float]:
    """Return the metrics without those that could not be measured, which are None."""
    return {name: value for name, value in metrics.items() if value is not None}
