"""The loop of a supervised stage: AdamW, warm-up and cosine decay, batches of similar length in a keyed order."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from apa_cli.randomness import Stream, permutation
from apa_cli.settings import FitSettings

POOL = 16
"""Batches whose examples are sorted by length together."""


def batches(lengths: list[int], batch: int, seed: int, epoch: int) -> list[list[int]]:
    """The examples of one epoch in batches: shuffled, sorted by length within pools, the batches shuffled again."""
    order = permutation(len(lengths), seed, Stream.data_order, epoch).tolist()
    pool = batch * POOL
    pooled = [sorted(order[i : i + pool], key=lambda j: lengths[j]) for i in range(0, len(order), pool)]
    cut = [rows[i : i + batch] for rows in pooled for i in range(0, len(rows), batch)]
    return [cut[i] for i in permutation(len(cut), seed, Stream.minibatch_order, epoch)]


def fit(
    model: nn.Module,
    loss: Callable[[list[int]], Tensor],
    lengths: list[int],
    settings: FitSettings,
    seed: int,
    progress: Callable[[int, int, float], None],
) -> None:
    """Minimises `loss(indices of a batch)`, a scalar; `progress(step, steps, loss)` is called after each step."""
    total = settings.epochs * math.ceil(len(lengths) / settings.batch)
    warmup = max(1, round(total * settings.warmup_fraction))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(
            (step + 1) / warmup,
            0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / max(1, total - warmup))),
        ),
    )
    step = 0
    for epoch in range(settings.epochs):
        for rows in batches(lengths, settings.batch, seed, epoch):
            value = loss(rows)
            value.backward()
            nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
            step += 1
            progress(step, total, float(value.detach()))
