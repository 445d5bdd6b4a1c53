"""KL divergence between the policy and the reference: estimators on chosen tokens, the exact sum, the controller."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from apa_cli.tensor_ops import masked_mean

if TYPE_CHECKING:
    from torch import Tensor


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π_old − log π_init on chosen tokens [B, T], in nats: unbiased for the KL, may be negative."""
    return logprobs - ref_logprobs


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """Mean over responses of Σ_t k1_t, in nats per response (`kl/sequence`). [B, T] each → scalar."""
    per_token = k1(logprobs, ref_logprobs)
    return per_token.where(mask, per_token.new_zeros(())).sum(dim=-1).mean()


def token_k3(logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor) -> Tensor:
    """mean_m (exp(−k1) − 1 + k1), in nats per token (`kl/token_k3`): never negative. [B, T] each → scalar."""
    difference = k1(logprobs, ref_logprobs).double()  # in float32 small values would be rounding, of either sign
    return masked_mean((-difference).expm1() + difference, mask).to(logprobs.dtype)


def exact_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """KL(π_θ ‖ π_init) at each position, summed over the vocabulary, in nats. logits [B, T, V] → [B, T] float32."""
    logprobs = logits.float().log_softmax(dim=-1)
    ref_logprobs = ref_logits.float().log_softmax(dim=-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)


def best_of_n_bound(n: int) -> float:
    """log n − (n − 1)/n nats: best-of-n is at most so far from the model that it draws from (2401.01879)."""
    return math.log(n) - (n - 1) / n


def adapted_coefficient(kl_coef: float, kl: float, target: float, n: int, horizon: int) -> float:
    """The adaptive controller of 1909.08593, section 2.2: the coefficient after an iteration whose KL was `kl`.

    kl_coef · (1 + clip(kl/target − 1, −0.2, 0.2) · n / horizon), with n responses an iteration and the
    horizon in responses; kl and target in nats per response.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * n / horizon)
