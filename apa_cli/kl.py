"""KL divergence from the reference: estimators on sampled tokens, the exact sum, the adaptive controller."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from apa_cli.tensor_ops import masked_mean

if TYPE_CHECKING:
    from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return log π_old − log π_init of sampled tokens [B, T], in nats: an unbiased estimate of KL, may be negative."""
    return logprobs - ref_logprobs


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return the mean over responses of Σ_t k1_t, in nats per response (`kl/sequence`). [B, T] each → scalar."""
    per_token = k1(logprobs, ref_logprobs)
    return per_token.where(mask, per_token.new_zeros(())).sum(dim=-1).mean()


def token_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Return mean_m (exp(−k1) − 1 + k1), in nats per token (`kl/token_k3`), never negative. [B, T] each → scalar."""
    difference = k1(logprobs, ref_logprobs).double()  # in float32 small values would be rounding, of either sign
    return masked_mean((-difference).expm1() + difference, mask).to(logprobs.dtype)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Return KL(π_θ ‖ π_init) per position, summed over the vocabulary, in nats. [B, T, V] each → [B, T] float32."""
    logprobs = logits.float().log_softmax(dim=-1)
    ref_logprobs = ref_logits.float().log_softmax(dim=-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)


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
