"""Dumps, in a run's faults/, of the responses with numbers that are not finite."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from apa_cli.distributed.world import World
from apa_cli.errors import UserError
from apa_cli.file_modes import apply_umask
from apa_cli.types import Batch, Rollout, Sequences

MAX_DUMPS = 20
"""Number of dumps that a run writes; later faults are only reported."""
MODEL_OUTPUTS = ("logprobs", "values")
"""Fields of a rollout that models compute."""
ALGORITHM_OUTPUTS = ("advantages", "returns", "extra")
"""Fields of a batch that an algorithm computes from scores."""


@dataclass(frozen=True)
class FaultDump:
    """Checker for numbers that are not finite, which dumps the responses with such numbers."""

    folder: Path
    world: World

    def check_rollout(self, iteration: int, rollout: Rollout) -> None:
        """Raise UserError, after a dump, for log-probs or values that are not finite, which a broken model gives."""
        self._check(iteration, find_nonfinite(rollout, MODEL_OUTPUTS), rollout, None)

    def check_batch(self, iteration: int, rollout: Rollout, batch: Batch) -> None:
        """Raise UserError, after a dump, for advantages or returns that are not finite, as very large scores give."""
        self._check(iteration, find_nonfinite(batch, ALGORITHM_OUTPUTS), rollout, batch)

    def _check(self, iteration: int, fault: tuple[str, Tensor] | None, rollout: Rollout, batch: Batch | None) -> None:
        if fault is not None:
            message, rows = f"iteration {iteration}: {fault[0]}", fault[1]
            dump = self.write(f"iteration_{iteration:06d}", message, rollout, batch, rows)
            raise UserError(f"{message}; nothing was changed by this iteration{dump}")

    def write(self, name: str, message: str, rollout: Rollout, batch: Batch | None, rows: Tensor) -> str:
        """Dump the responses of a fault on rank 0. Return the end of an error message, which there names the file."""
        file = None
        if self.world.is_main:
            file = write_dump(self.folder, name, message, rollout, batch, rows)
        self.world.barrier()  # other ranks that end now would end rank 0 while it writes
        return "" if file is None else f"; the responses are in {file}"


def find_nonfinite(part: Sequences, names: tuple[str, ...]) -> tuple[str, Tensor] | None:
    """Return a description of the first number that is not finite in fields [N, T] or [N], and the rows [B] with such.

    Tokens outside the mask do not count; related sequences do.
    """
    for prefix, sequences in {"": part, **getattr(part, "related", {})}.items():
        for name, tensor in iterate_tensors(sequences):
            if name.partition(".")[0] in names and tensor.is_floating_point():
                wrong = ~tensor.isfinite()
                wrong = wrong & sequences.mask if wrong.dim() == 2 else wrong
                if bool(wrong.any()):
                    row, *token = wrong.nonzero()[0].tolist()
                    place = f"token {token[0]} of response {row}" if token else f"response {row}"
                    message = f"{name}{f' of {prefix}' if prefix else ''} is {float(tensor[row, *token])} at {place}"
                    return message, (wrong.any(-1) if wrong.dim() == 2 else wrong).nonzero().squeeze(-1)
    return None


def iterate_tensors(part: Sequences) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor of rows with its field's name; an entry of a mapping is named as in `values.value`."""
    for field in fields(part):
        value = getattr(part, field.name)
        if isinstance(value, Tensor):
            yield field.name, value
        elif isinstance(value, Mapping):
            yield from ((f"{field.name}.{key}", entry) for key, entry in value.items() if isinstance(entry, Tensor))


def write_dump(
    folder: Path, name: str, message: str, rollout: Rollout, batch: Batch | None, rows: Tensor
) -> Path | None:
    """Write rows of a rollout batch to `folder`: the texts as NAME.json, every tensor as NAME.safetensors.

    Return the path of NAME.json, or None if there are `MAX_DUMPS` already.
    """
    folder.mkdir(exist_ok=True)
    if len(list(folder.glob("*.json"))) >= MAX_DUMPS:
        return None
    tensors: dict[str, Tensor] = {}
    for prefix, part in (("rollout", rollout), ("batch", batch)):
        if part is not None:
            for suffix, sequences in {"": part, **part.related}.items():
                tensors |= {
                    f"{prefix}.{suffix}{'.' if suffix else ''}{key}": tensor[rows].cpu().contiguous()
                    for key, tensor in iterate_tensors(sequences)
                }
    save_file(tensors, folder / f"{name}.safetensors")
    responses = [describe_response(rollout, row) for row in rows.tolist()]
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"what": message, "responses": responses}, indent=2, ensure_ascii=False) + "\n")
    apply_umask(folder)
    return file


def describe_response(rollout: Rollout, row: int) -> dict[str, Any]:
    """Return a response's text, score and ending, with its row in the rollout batch."""
    score = None if rollout.scores is None else float(rollout.scores[row])
    return {
        "row": row,
        "prompt": rollout.prompts[row],
        "response": rollout.responses[row],
        "ending": rollout.endings[row],
        "score": score,
        "columns": rollout.columns[row],
    }
