"""One token for each row from its logits: truncation, and inverse CDF from given uniform numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from apa_cli.settings import SamplingSettings
from apa_cli.tensor_ops import tempered


def drawn(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """logits [B, V], uniforms [B] in (0, 1] → the tokens, [B] int64, and their log π in the whole distribution, [B]."""
    log_pi = tempered(logits, settings.temperature).log_softmax(-1)
    tokens = inverse_cdf(truncated(log_pi.exp(), settings.top_k, settings.top_p), uniforms)
    return tokens, log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability reaches u · total. [B, V], u [B] in (0, 1] → [B] int64.

    The sum is cumulated in float64; a token of probability 0 is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniforms.double() * cumulative[:, -1]
    return torch.searchsorted(cumulative, threshold.unsqueeze(-1)).squeeze(-1).clamp(max=cumulative.shape[1] - 1)


def truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [B, V] with all but the `top_k` likeliest (0: all) and the `top_p` nucleus (1: all) set to 0."""
    if top_k and top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities
