"""KL divergence from the reference: estimators on sampled tokens, the exact sum, the adaptive controller."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from apa_cli.losses import MAX_LOG_RATIO
from apa_cli.tensor_ops import masked_row_sum, masked_sum
from apa_cli.types import SAMPLER, Rollout, Sequences

if TYPE_CHECKING:
    from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log π_old − log π_init of sampled tokens [B, T], in nats: an unbiased estimate of KL, may be negative."""
    return logprobs - ref_logprobs


def sum_k1(sequences: Sequences, reference: str) -> Tensor:
    """Return Σ_t k1_t [N] against the log-probs `reference`, over the tokens that the present policy sampled."""
    per_token = k1(sequences.get_logprobs(SAMPLER), sequences.get_logprobs(reference))
    return masked_row_sum(per_token, sequences.on_policy)


def list_on_policy_sequences(rollout: Rollout) -> list[Sequences]:
    """Return the rows' own sequences and the related ones, each if it has tokens that the present policy sampled."""
    return [part for part in (rollout, *rollout.related.values()) if bool(part.on_policy.any())]


def count_on_policy_sequences(rollout: Rollout) -> int:
    """Return the number of sequences, related ones included, with tokens that the present policy sampled."""
    return sum(int(part.on_policy.any(-1).sum()) for part in list_on_policy_sequences(rollout))


def measure_sequence_kl(rollout: Rollout, reference: str) -> float | None:
    """Return the mean over responses of Σ_t k1_t against the log-probs `reference`, in nats per response.

    Only tokens that the present policy sampled count, related sequences included; None if there are none.
    """
    sums = []
    for part in list_on_policy_sequences(rollout):
        sums.append(sum_k1(part, reference)[part.on_policy.any(-1)])
    import torch  # here, so that algorithms can be checked before torch is loaded

    return float(torch.cat(sums).mean()) if sums else None


def measure_token_k3(rollout: Rollout, reference: str) -> float | None:
    """Return the mean over tokens of exp(−k1) − 1 + k1 against the log-probs `reference`, in nats, never negative.

    Only tokens that the present policy sampled count, related sequences included; None if there are none.
    """
    parts, total, count = list_on_policy_sequences(rollout), 0.0, 0
    for part in parts:
        # In float64: in float32 small values would be rounding, of either sign.
        difference = k1(part.get_logprobs(SAMPLER), part.get_logprobs(reference)).double()
        difference = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        total += float(masked_sum((-difference).expm1() + difference, part.on_policy))
        count += int(part.on_policy.sum())
    return float(parts[0].get_logprobs(SAMPLER).new_tensor(total / count)) if count else None


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Return KL(π_θ ‖ π_init) per position, summed over the vocabulary, in nats. [B, T, V] each → [B, T] float32.

    A token of probability 0 under π_θ, even one with a logit of −∞, adds nothing.
    """
    logprobs = logits.float().log_softmax(dim=-1)
    ref_logprobs = ref_logits.float().log_softmax(dim=-1)
    probabilities = logprobs.exp()
    return (probabilities * (logprobs - ref_logprobs).masked_fill(probabilities == 0, 0)).sum(dim=-1)


def best_of_n_bound(n: int) -> float:
    """Return log n − (n − 1)/n: an upper bound, in nats, on best-of-n's KL from the model it samples (2401.01879)."""
    return math.log(n) - (n - 1) / n


def adapt_kl_coef(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """Return the KL coefficient for the next iteration, by the adaptive controller of 1909.08593, section 2.2.

        kl_coef · (1 + clip(kl/target − 1, −0.2, 0.2) · n / horizon)

    kl and target in nats per response; n responses per iteration; horizon in responses.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)
