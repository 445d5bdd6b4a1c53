"""Metrics of a rollout: response/*, reward/*, kl/*, policy/entropy."""

from __future__ import annotations

from torch import Tensor

from apa_cli.kl import sequence_kl, token_k3
from apa_cli.rollout.engine import EOS, LENGTH
from apa_cli.tensor_ops import masked_mean
from apa_cli.types import Rollout


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


def compute_rollout_metrics(rollout: Rollout) -> dict[str, float]:
    """Return reward/* of raw scores, response/*, kl/* before the update, and the sampler's entropy in nats per token.

    kl/sequence and kl/token_k3 are against π_init; kl/refreshed is against a moving reference.
    """
    scores, init, reference = rollout.scores, rollout.init_logprobs, rollout.ref_logprobs
    assert scores is not None and init is not None and reference is not None
    metrics = {
        "reward/mean": float(scores.mean()),
        "reward/std": float(scores.std(correction=0)),
        "policy/entropy": -float(masked_mean(rollout.sampler_logprobs, rollout.mask)),
        **compute_response_metrics(rollout),
    }
    metrics["kl/sequence"] = float(sequence_kl(rollout.sampler_logprobs, init, rollout.mask))
    metrics["kl/token_k3"] = float(token_k3(rollout.sampler_logprobs, init, rollout.mask))
    if reference is not init:
        metrics["kl/refreshed"] = float(sequence_kl(rollout.sampler_logprobs, reference, rollout.mask))
    return metrics


def confidence_half_width(values: Tensor) -> float:
    """Return the half width of the 95 % normal confidence interval of the mean of `values` [N]; 0 if N = 1."""
    return float(1.96 * values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
