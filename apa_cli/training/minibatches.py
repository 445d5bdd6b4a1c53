"""Minibatches and microbatches of a batch of any number of rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.randomness import Stream, sample_permutation
from apa_cli.settings import RunSettings, UpdateOrder
from apa_cli.types import Batch, Sequences


def count_steps(rows: int, responses_per_row: int, minibatch_size: int) -> int:
    """Return the number of optimizer steps of one pass over `rows` rows, of about `minibatch_size` responses each.

    At least one and at most one per row; 0 for no row. A half is rounded up.
    """
    return min(rows, max(1, (2 * rows * responses_per_row + minibatch_size) // (2 * minibatch_size)))


def split_into_minibatches(run: RunSettings, iteration: int, rows: int, responses_per_row: int = 1) -> list[Tensor]:
    """Return the rows of each minibatch of an iteration, int64 [B] with nearly equal B, in the order of `update_order`.

    No row is left out. The shuffle is keyed by the seed, the iteration and the epoch.
    """
    steps = count_steps(rows, responses_per_row, run.minibatch_size)

    def shuffle(epoch: int) -> list[Tensor]:
        order = sample_permutation(rows, run.seed, Stream.minibatch_order, iteration, epoch)
        return list(torch.from_numpy(order).tensor_split(steps)) if steps else []

    if run.update_order is UpdateOrder.epochs:
        return [part for epoch in range(run.update_epochs) for part in shuffle(epoch)]
    return [part for part in shuffle(0) for _ in range(run.update_epochs)]


def split_into_microbatches(batch: Sequences, size: int, world: World = SINGLE_PROCESS) -> list[Tensor]:
    """Return the rows of each microbatch of this rank: rows of similar length, at most `size` sequences if possible.

    The ranks take turns in the order of lengths, so that they have similar work. Each has the same number of
    microbatches, the last of which may have no row.
    """
    related = getattr(batch, "related", {}).values()
    lengths = batch.prompt_mask.sum(-1) + batch.mask.sum(-1)
    for sequences in related:
        lengths = lengths + sequences.prompt_mask.sum(-1) + sequences.mask.sum(-1)
    rows = max(1, size // (1 + len(related)))
    order = lengths.argsort(stable=True)
    parts = list(order[world.rank :: world.size].split(rows))
    count = math.ceil(math.ceil(len(order) / world.size) / rows)
    return parts + [order[:0]] * (count - len(parts))


def mask_out(batch: Batch) -> Batch:
    """Return the batch with nothing that counts: the microbatch of a rank without rows."""

    def clear(masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.zeros_like(mask) for name, mask in masks.items()}

    related = {
        name: part.replace(**clear({"mask": part.mask, "on_policy": part.on_policy}))
        for name, part in batch.related.items()
    }
    cleared = clear({"mask": batch.mask, "on_policy": batch.on_policy})
    return batch.replace(**cleared, masks=clear(batch.masks), related=related)
