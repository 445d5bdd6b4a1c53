"""Masked reductions and log-probabilities: small pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Sum of `x` where `mask` is true; what lies outside the mask, infinities and NaN included, has no part in it."""
    return x.where(mask, x.new_zeros(())).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of `x` where `mask` is true (0 for an empty mask). x [B, T], mask [B, T] bool → scalar."""
    return masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Population variance of `x` where `mask` is true. x [B, T], mask [B, T] bool → scalar."""
    return masked_mean((x - masked_mean(x, mask)) ** 2, mask)


def whiten(x: Tensor, mask: Tensor) -> Tensor:
    """(x − mean) / std over the true tokens; 0 outside the mask. x [B, T] → [B, T].

    Computed in float64, the deviation at least 1e-8 and 1e-6 of the largest true |x|: a constant `x`, and one that
    is constant but for rounding, gives zeros.
    """
    wide = x.double()
    largest = float(wide.where(mask, wide.new_zeros(())).abs().max()) if x.numel() else 0.0
    deviation = masked_variance(wide, mask).sqrt().clamp(min=max(1e-8, 1e-6 * largest))
    centred = ((wide - masked_mean(wide, mask)) / deviation).to(x.dtype)
    return centred.where(mask, x.new_zeros(()))


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32 at a temperature; at 1 nothing is copied."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def token_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32. logits [B, T, V] of any float type, token_ids [B, T] → [B, T]."""
    return logits.float().log_softmax(dim=-1).gather(-1, token_ids.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, in float32. [B, T, V] → [B, T]."""
    logprobs = logits.float().log_softmax(dim=-1)
    return -(logprobs.exp() * logprobs).sum(dim=-1)
