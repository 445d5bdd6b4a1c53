"""Numbers about a rollout for the log: response/*, reward/*, kl/*, policy/entropy."""

from __future__ import annotations

from torch import Tensor

from apa_cli.kl import sequence_kl, token_k3
from apa_cli.rollout.engine import EOS, LENGTH
from apa_cli.tensor_ops import masked_mean
from apa_cli.types import Rollout


def distinct_n(token_ids: Tensor, mask: Tensor, n: int) -> float:
    """Different n-grams of tokens over all n-grams, of all responses [N, T] together; 0 if there are none."""
    rows = [ids[keep].tolist() for ids, keep in zip(token_ids, mask, strict=True)]
    grams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def response_statistics(rollout: Rollout) -> dict[str, float]:
    """Mean length in tokens (the terminator counted), how responses ended, diversity."""
    n = len(rollout.endings)
    return {
        "response/length": float(rollout.mask.sum(-1).float().mean()),
        "response/eos_rate": rollout.endings.count(EOS) / n,
        "response/truncated_rate": rollout.endings.count(LENGTH) / n,
        "response/distinct_2": distinct_n(rollout.response_ids, rollout.mask, 2),
    }


def rollout_statistics(rollout: Rollout) -> dict[str, float]:
    """reward/* of the raw scores, kl/* against π_init before the update, the sampler's estimate of entropy."""
    metrics = {
        "reward/mean": float(rollout.scores.mean()),
        "reward/std": float(rollout.scores.std(correction=0)),
        "policy/entropy": -float(masked_mean(rollout.sampler_logprobs, rollout.mask)),
        **response_statistics(rollout),
    }
    metrics["kl/sequence"] = float(sequence_kl(rollout.sampler_logprobs, rollout.init_logprobs, rollout.mask))
    metrics["kl/token_k3"] = float(token_k3(rollout.sampler_logprobs, rollout.init_logprobs, rollout.mask))
    if rollout.ref_logprobs is not rollout.init_logprobs:
        metrics["kl/refreshed"] = float(sequence_kl(rollout.sampler_logprobs, rollout.ref_logprobs, rollout.mask))
    return metrics


def mean_interval(values: Tensor) -> float:
    """Half the width of the 95 % normal interval of the mean of `values` [N]; 0 for a single one."""
    return float(1.96 * values.std() / len(values) ** 0.5) if len(values) > 1 else 0.0
