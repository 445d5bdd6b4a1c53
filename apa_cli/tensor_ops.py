"""Masked reductions and log-probabilities: small pure functions of tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ROUNDING = 2.0**-18
"""Share of a number, or of 1 if the number is smaller, within which two results in float32 count as equal: 32 units in
the last place. Measured: a reward model of 4 layers scores a text up to 1.4e-6 apart in batches of other sizes."""


def is_rounding(difference: float, magnitude: float) -> bool:
    """Return True if a difference of numbers of this magnitude may be rounding alone, see `ROUNDING`."""
    return abs(difference) <= ROUNDING * max(1.0, abs(magnitude))


def choose_divisor(deviation: float, magnitude: float) -> float:
    """Return the standard deviation of numbers of this magnitude, or 1 if they do not differ beyond rounding."""
    return 1.0 if is_rounding(deviation, magnitude) else deviation


def drop_rounding(differences: Tensor, magnitudes: Tensor) -> Tensor:
    """Return differences of numbers of these magnitudes, with those that may be rounding alone set to 0."""
    return differences.masked_fill(differences.abs() <= ROUNDING * magnitudes.abs().clamp(min=1), 0)


def differ(x: Tensor, y: Tensor) -> Tensor:
    """Return bool, true where x and y differ beyond rounding."""
    return drop_rounding(x - y, x.abs().maximum(y.abs())) != 0


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

    Computed in float64 with the population standard deviation. An `x` that does not differ beyond rounding gives zeros.
    """
    wide, zero = x.double(), x.new_zeros(())
    deviation = masked_variance(wide, mask).sqrt()
    largest = float(wide.where(mask, wide.new_zeros(())).abs().max()) if x.numel() else 0.0
    if is_rounding(float(deviation), largest):
        return zero.expand(x.shape).clone()
    return ((wide - masked_mean(wide, mask)) / deviation).to(x.dtype).where(mask, zero)


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
