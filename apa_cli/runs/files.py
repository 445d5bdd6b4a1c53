"""Names of a run's files, and their parsers: each file is parsed here and nowhere else.

This module does not import torch, so that apa-compare and the checks of a configuration start quickly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from apa_cli.errors import UserError, get_first_line

CONFIG, ENVIRONMENT, METRICS, SAMPLES, RESULT = (
    "config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "result.json",
)  # fmt: skip
"""Files of a run's directory."""
STATE = "state.json"
"""File of a checkpoint with its iteration, the algorithm's state and every other value that is not a tensor."""

POOLS = "pools"
"""Folder, in a run's directory, of the pools' files."""

CHECKPOINT_NAME = "iteration_{:06d}"
CHECKPOINT_PATTERN = re.compile(r"iteration_(\d{6})$")


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints in `folder`, oldest first."""
    names = folder.glob("iteration_*") if folder.is_dir() else ()
    return sorted(path for path in names if CHECKPOINT_PATTERN.match(path.name))


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.yaml as it is written. Raise UserError if it cannot be read."""
    file = directory / CONFIG
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file}: not readable as YAML ({get_first_line(error)})") from error
    if not isinstance(config, dict):
        raise UserError(f"{file}: not a configuration")
    return config


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raise UserError if it cannot be read."""
    return read_object(checkpoint / STATE)


def read_result(directory: Path) -> dict[str, Any] | None:
    """Return result.json; None if it is missing or incomplete, which means that the run has not finished."""
    try:
        return read_object(directory / RESULT)
    except UserError:
        return None


def read_object(file: Path) -> dict[str, Any]:
    """Return the object in a .json file. Raise UserError if it cannot be read."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON ({get_first_line(error)})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object")
    return content


def read_rows(file: Path, keys: Sequence[str] = ("iteration",)) -> list[dict[str, Any]]:
    """Return the objects of a .jsonl file, each of which has whole numbers under `keys`.

    An incomplete last line is left out, since a run is writing it or was killed while writing it. Raise UserError, with
    the line's number, for any other line that cannot be read.
    """
    return [row for row, _ in _parse_lines(file, keys)]


def read_lines(file: Path, last_iteration: int) -> list[str]:
    """Return the lines of a .jsonl file, as written, up to an iteration. Raise UserError as `read_rows` does."""
    return [line for row, line in _parse_lines(file, ("iteration",)) if row["iteration"] <= last_iteration]


def _parse_lines(file: Path, keys: Sequence[str]) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield each object of a .jsonl file with its line."""
    try:
        lines = file.read_bytes().split(b"\n")  # not splitlines: responses may contain other line separators
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from error
    last = max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            text = line.decode()
            row = json.loads(text)
            for key in keys:
                row[key] = int(row[key])
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            if number == last:
                return
            named = " and ".join(f'"{key}"' for key in keys)
            raise UserError(f"{file}, line {number}: not JSON with {named}") from error
        yield row, text
