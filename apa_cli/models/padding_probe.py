"""Probe of models for padding: the outputs of short sequences in a padded batch against those of each one alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from apa_cli.settings import DType

PROBE_LENGTHS = (3, 7)
"""Tokens of the sequences."""
TOLERANCE = {DType.float32: 1e-2, DType.bfloat16: 0.15}
"""Largest relative difference that is rounding, by the precision of computation. TF32 rounds each product to about
1e-3, bfloat16 to 4e-3; every layer rounds, and a router may choose other experts. Models that fail were seen at 0.2 to
0.8 in both."""
HIDDEN_LOGIT = -1e4
"""Logits below this are constants that exclude a token; they would hide the differences of the others."""


def build_probe_rows(vocab_size: int, pad_id: int = 0) -> list[list[int]]:
    """Return sequences of different tokens, none of them the pad token, if the vocabulary has enough."""
    count = sum(PROBE_LENGTHS)
    step = max(1, vocab_size // (count + 1))
    ids = [token for token in range(step, vocab_size, step) if token != pad_id] or [0]
    ids = [ids[i % len(ids)] for i in range(count)]
    return [ids[: PROBE_LENGTHS[0]], ids[PROBE_LENGTHS[0] :]]


def measure_difference(outputs: Tensor, expected: Tensor) -> float:
    """Return |outputs − expected| / |expected|, over all elements that are no hidden logits; NaN if one is NaN."""
    outputs, expected = outputs.float(), expected.float()
    visible = ~(expected < HIDDEN_LOGIT)
    difference, scale = (outputs - expected)[visible].norm(), expected[visible].norm()
    return float(difference / scale) if float(difference) else 0.0


@torch.no_grad()
def measure_padding_difference(
    compute: Callable[[dict[str, Tensor]], Tensor], vocab_size: int, pad_id: int, device: torch.device, side: str
) -> float:
    """Return the relative difference between outputs in a batch padded on `side`, left or right, and without padding.

    `compute` maps input_ids and attention_mask [B, S] to one output per sequence, [B, …], such as a score.
    """
    rows = build_probe_rows(vocab_size, pad_id)
    width = max(map(len, rows))

    def pad(row: list[int], filler: int) -> list[int]:
        padding = [filler] * (width - len(row))
        return padding + row if side == "left" else row + padding

    batch = {
        "input_ids": torch.tensor([pad(row, pad_id) for row in rows], device=device),
        "attention_mask": torch.tensor([pad([1] * len(row), 0) for row in rows], device=device),
    }
    alone = [
        compute({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        for ids in (torch.tensor([row], device=device) for row in rows)
    ]
    return measure_difference(compute(batch), torch.cat(alone))
