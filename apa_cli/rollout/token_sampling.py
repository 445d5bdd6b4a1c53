"""Sampling of one token per row from logits: truncation by top_k and top_p, then the inverse CDF of a uniform."""

from __future__ import annotations

import torch
from torch import Tensor

from apa_cli.settings import SamplingSettings
from apa_cli.tensor_ops import apply_temperature


def sample_tokens(logits: Tensor, uniforms: Tensor, settings: SamplingSettings) -> tuple[Tensor, Tensor]:
    """Return the tokens, [B] int64, that uniforms [B] in (0, 1] select from logits [B, V], and their log-probs, [B].

    Log-probs are those of the whole distribution at the sampling temperature, before truncation.
    """
    log_pi = apply_temperature(logits, settings.temperature).log_softmax(-1)
    tokens = invert_cdf(truncate_probabilities(log_pi.exp(), settings.top_k, settings.top_p), uniforms)
    return tokens, log_pi.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def truncate_logits(logits: Tensor, settings: SamplingSettings) -> Tensor:
    """Return logits [B, V] at the temperature with −∞ for the tokens that `sample_tokens` never returns.

    Their softmax is the distribution that is sampled. Without top_k and top_p they are the logits themselves.
    """
    if not settings.top_k and settings.top_p == 1:
        return logits
    kept = truncate_probabilities(logits.log_softmax(-1).exp(), settings.top_k, settings.top_p)
    return logits.masked_fill(kept == 0, -float("inf"))


def invert_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token whose cumulative probability is ≥ u · total: [B, V] and u [B] in (0, 1] → [B] int64.

    The cumulative sum is in float64; a token of probability 0 is never returned.
    """
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniforms.double() * cumulative[:, -1]
    return torch.searchsorted(cumulative, threshold.unsqueeze(-1)).squeeze(-1).clamp(max=cumulative.shape[1] - 1)


def truncate_probabilities(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Return probabilities [B, V] with the tokens outside the top k, then those outside the nucleus, set to 0.

    `top_k` = 0 and `top_p` = 1 keep all tokens. The nucleus is the smallest set of likeliest tokens that has the share
    `top_p` of the remaining probability (Holtzman et al., "The curious case of neural text degeneration", 2020).
    """
    if top_k and top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1:
        descending, order = probabilities.sort(dim=-1, descending=True)
        mass_before = descending.cumsum(-1) - descending
        nucleus = descending.masked_fill(mass_before >= top_p * descending.sum(-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, nucleus)
    return probabilities
