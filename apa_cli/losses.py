"""The losses, one value per token or per row, reduced by the trainer.

Each is a pure function of float32 tensors, [B, T] or, for a row, [B]. ℓ is the log-probability of the sampled token
under the policy being trained (θ), the behavior policy that sampled it (old) or the frozen reference (init).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on |log-ratio|, or on AWR's Â/λ, before exp, in nats: without one, 0 · ∞ could arise. Beyond the bound a
log-ratio has no gradient."""


def apa_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    lambda_: float,
    log_normalizer: Tensor | float = 0.0,
) -> Tensor:
    """Return the loss of Advantage-Induced Policy Alignment (2306.02231, equation 8): squared error in log space.

        ( ℓ_θ − ℓ_init − Â/λ + log Z )²

    The loss and its gradient are zero exactly at π_θ = π_init · exp(Â/λ) / Z. The paper takes Z as 1
    (`log_normalizer` 0). Arguments [B, T]; λ > 0, in the unit of Â → [B, T].
    """
    return (logprobs - ref_logprobs - advantages / lambda_ + log_normalizer) ** 2


def awr_loss(logprobs: Tensor, advantages: Tensor, lambda_: float, weight_clip: float | None) -> Tensor:
    """Return the loss of Advantage-Weighted Regression (1910.00177, algorithm 1; per token: 2306.02231, equation 6).

        − w ℓ_θ,   w = exp( min(Â/λ, log weight_clip, `MAX_LOG_RATIO`) )

    With `weight_clip` None only `MAX_LOG_RATIO` bounds the weights. Arguments [B, T]; λ > 0, in the unit of Â → [B, T].
    """
    bound = MAX_LOG_RATIO if weight_clip is None else min(math.log(weight_clip), MAX_LOG_RATIO)
    return -(advantages / lambda_).clamp(max=bound).exp() * logprobs


def exp_log_ratio(log_ratio: Tensor) -> Tensor:
    """Return ρ = exp(log-ratio), with the log-ratio clamped to ±`MAX_LOG_RATIO`."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_loss(log_ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None) -> Tensor:
    """Return the negated clipped surrogate of Proximal Policy Optimization (1707.06347, equation 7).

        max( −Â ρ , −Â clip(ρ, 1 − ε, 1 + ε_high) ),   ρ = exp(ℓ_θ − ℓ_old)

    log_ratio = ℓ_θ − ℓ_old and Â: both [B, T], or [B] with the log-ratio of a whole response; ε = `clip_range` in
    (0, 1); ε_high, by default ε, as in DAPO (2503.14476, equation 10) → of the arguments' shape.
    """
    ratio, high = exp_log_ratio(log_ratio), clip_range if clip_range_high is None else clip_range_high
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip_range, 1 + high))


def ppo_clip_mask(
    log_ratio: Tensor, advantages: Tensor, clip_range: float, clip_range_high: float | None = None
) -> Tensor:
    """Return 1 for tokens or rows whose clipped branch in `ppo_loss` is the larger one (no gradient), else 0."""
    ratio, high = exp_log_ratio(log_ratio), clip_range if clip_range_high is None else clip_range_high
    return ((ratio > 1 + high) & (advantages > 0) | (ratio < 1 - clip_range) & (advantages < 0)).float()


def k3_loss(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Return the estimate of KL(π_θ ‖ reference) that GRPO has in its loss (2402.03300, equation 4), in nats.

        exp(d) − 1 − d,   d = ℓ_ref − ℓ_θ, clamped to ±`MAX_LOG_RATIO`

    Never negative but for rounding; the gradient with respect to ℓ_θ is 1 − exp(d). Arguments [B, T] → [B, T].
    """
    difference = (ref_logprobs - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return difference.expm1() - difference


def critic_loss(values: Tensor, returns: Tensor, old_values: Tensor, value_clip_range: float | None) -> Tensor:
    """Return half the critic's squared error, clipped if `value_clip_range` c is given (baselines' PPO; 1909.08593).

        ½ (V − G)²    or    ½ max( (V − G)², (V_old + clip(V − V_old, ±c) − G)² )

    Arguments [B, T]; V, G and c in units of the scaled score → [B, T], in that unit squared.
    """
    error = (values - returns) ** 2
    if value_clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        error = error.maximum((clipped - returns) ** 2)
    return 0.5 * error
