"""Masked reductions and log-probabilities: small pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of `x` over true tokens; values outside the mask, even inf and NaN, do not enter. → scalar."""
    return x.where(mask, x.new_zeros(())).sum()


def masked_row_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Return each row's sum of `x` over true tokens; values outside the mask do not enter. [B, T] each → [B]."""
    return x.where(mask, x.new_zeros(())).sum(dim=-1)


def masked_row_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return each row's mean of `x` over true tokens, 0 for a row without one. x [B, T], mask [B, T] bool → [B]."""
    return masked_row_sum(x, mask) / mask.sum(dim=-1).clamp(min=1)


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of `x` over true tokens, 0 for an empty mask. x [B, T], mask [B, T] bool → scalar."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Return the population variance of `x` over true tokens. x [B, T], mask [B, T] bool → scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """Return (x − mean) / std over the true tokens, 0 outside the mask. x [B, T] → [B, T].

    Computed in float64 with the population standard deviation, floored at 1e-8 and at 1e-6 of the largest true |x|:
    an `x` that is constant, or constant up to rounding, gives zeros.
    """
    wide = x.double()
    largest = float(wide.where(mask, wide.new_zeros(())).abs().max()) if x.numel() else 0.0
    deviation = masked_variance(wide, mask).sqrt().clamp(min=max(1e-8, 1e-6 * largest))
    whitened = ((wide - masked_mean(wide, mask)) / deviation).to(x.dtype)
    return whitened.where(mask, x.new_zeros(()))


def apply_temperature(logits: Tensor, temperature: float) -> Tensor:
    """Return logits / temperature in float32; at temperature 1 without a copy."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Return log softmax(logits)[token] in float32. logits [B, T, V] of any float type, token_ids [B, T] → [B, T]."""
    return logits.float().log_softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Return the entropy of softmax(logits) in nats, in float32; logits may be −∞. [B, T, V] → [B, T]."""
    logprobs = logits.float().log_softmax(dim=-1)
    probabilities = logprobs.exp()
    return -(probabilities * logprobs.masked_fill(probabilities == 0, 0)).sum(dim=-1)
