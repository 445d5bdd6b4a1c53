"""Numbers that are not finite: where they are, and the responses that they came with, kept to be looked at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from apa_cli.types import Batch, Rollout

MOST_KEPT = 20
"""Batches that a run keeps; of those after them it only says what was wrong."""


def not_finite(part: Rollout | Batch, names: tuple[str, ...]) -> tuple[str, Tensor] | None:
    """The first of these tensors [N, T] with a true token that is not finite, in words, and the rows [B] with one."""
    for name, tensor in tensors(part):
        if name.partition(".")[0] in names:
            wrong = ~tensor.isfinite() & part.mask
            if bool(wrong.any()):
                row, token = wrong.nonzero()[0].tolist()
                what = f"{name} is {float(tensor[row, token])} at token {token} of response {row}"
                return what, wrong.any(-1).nonzero().squeeze(-1)
    return None


def tensors(part: Rollout | Batch) -> Iterator[tuple[str, Tensor]]:
    """Every tensor by its name, those by name within one as `values.value`."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif isinstance(value, Mapping):
            yield from ((f"{field.name}.{key}", entry) for key, entry in value.items() if isinstance(entry, Tensor))


def keep(folder: Path, name: str, what: str, rollout: Rollout, batch: Batch | None, rows: Tensor) -> Path | None:
    """Writes these rows of a rollout batch to `folder`: NAME.json in words, NAME.safetensors with every tensor.

    Returns the former's path; None where there are `MOST_KEPT` already.
    """
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.json"))) >= MOST_KEPT:
        return None
    kept: dict[str, Tensor] = {}
    for prefix, part in (("rollout", rollout), ("batch", batch)):
        if part is not None:
            kept |= {f"{prefix}.{key}": tensor[rows].cpu().contiguous() for key, tensor in tensors(part)}
    save_file(kept, folder / f"{name}.safetensors")
    responses = [described(rollout, row) for row in rows.tolist()]
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"what": what, "responses": responses}, indent=2, ensure_ascii=False) + "\n")
    return file


def described(rollout: Rollout, row: int) -> dict[str, Any]:
    """One response in words, with its row in the rollout batch."""
    score = None if rollout.scores is None else float(rollout.scores[row])
    return {
        "row": row,
        "prompt": rollout.prompts[row],
        "response": rollout.responses[row],
        "ending": rollout.endings[row],
        "score": score,
        "columns": rollout.columns[row],
    }
