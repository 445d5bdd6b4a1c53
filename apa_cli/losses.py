"""The losses, one value per token, reduced by the trainer.

Each is a pure function of [B, T] float32 tensors. ℓ is the log-probability of the sampled token under the policy
being trained (θ), the behavior policy that sampled it (old) or the frozen reference (init).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


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

        − w ℓ_θ,   w = exp( min(Â/λ, log weight_clip) )

    `weight_clip` None leaves the weights unbounded. Arguments [B, T]; λ > 0, in the unit of Â → [B, T].
    """
    exponent = advantages / lambda_
    if weight_clip is not None:
        exponent = exponent.clamp(max=math.log(weight_clip))
    return -exponent.exp() * logprobs


def ppo_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return the negated clipped surrogate of Proximal Policy Optimization (1707.06347, equation 7).

        max( −Â ρ , −Â clip(ρ, 1 − ε, 1 + ε) ),   ρ = exp(ℓ_θ − ℓ_old)

    Arguments [B, T]; ε = `clip_range` in (0, 1) → [B, T].
    """
    ratio = (logprobs - old_logprobs).exp()
    return (-advantages * ratio).maximum(-advantages * ratio.clamp(1 - clip_range, 1 + clip_range))


def ppo_clip_mask(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_range: float) -> Tensor:
    """Return 1 for tokens whose clipped branch in `ppo_loss` is the larger one (no gradient), else 0. Each [B, T]."""
    ratio = (logprobs - old_logprobs).exp()
    return ((ratio > 1 + clip_range) & (advantages > 0) | (ratio < 1 - clip_range) & (advantages < 0)).float()


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
