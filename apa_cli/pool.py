"""A growing list of rows in an algorithm's state, kept as an append-only file beside a run's checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any, Self

from apa_cli.errors import UserError


class Pool:
    """A growing list of rows, each a dict of plain JSON data.

    Every rank holds all rows in memory, as lines of JSON, and appends the same rows. Rank 0 brings a file up to date
    before each checkpoint, which stores the number of rows; what a killed run has written after its last checkpoint is
    not read again.
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._file: Path | None = None
        """File of the last save; None if that save failed or there was none."""
        self._saved_length = 0

    def append(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows. Raise TypeError, and append nothing, if one is not a dict of plain JSON data."""
        lines = []
        for row in rows:
            if not isinstance(row, dict):
                raise TypeError(f"Pool: a row is a dict, not {type(row).__name__}")
            lines.append(json.dumps(row))
        self._lines += lines

    @property
    def length(self) -> int:
        """Number of rows."""
        return len(self._lines)

    def __len__(self) -> int:
        return len(self._lines)

    def rows(self, indices: Iterable[int]) -> list[dict[str, Any]]:
        """Return copies of the rows at these indices, in that order.

        Floats return to the bit; as in any JSON, tuples return as lists and keys as strings.
        """
        return [json.loads(self._lines[i]) for i in indices]

    @classmethod
    def read(cls, file: Path, length: int) -> Self:
        """Return a pool of the first `length` rows of a file; without rows the file need not exist.

        Raise UserError naming file and line if one of these rows is missing or damaged.
        """
        pool = cls()
        if length == 0:
            return pool
        try:
            with file.open("rb") as handle:
                lines = list(islice(handle, length))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror}); the checkpoint needs {length} rows") from error
        for number in range(1, length + 1):
            line = lines[number - 1] if number <= len(lines) else b""
            if not is_complete_row(line):
                raise UserError(
                    f"{file}, line {number}: missing or damaged, and the checkpoint needs {length} rows; continue from "
                    f"an earlier checkpoint"
                )
            pool._lines.append(line.decode().rstrip("\n"))
        return pool

    def save(self, file: Path) -> None:
        """Bring a file up to date and flush it to disk; only rank 0 may call this.

        The first call replaces the file atomically by the pool's rows, which removes the rows that an interrupted run
        wrote after its checkpoint; later calls append the new rows. An empty pool has no file. Raise UserError if the
        file cannot be written.
        """
        is_same_file, self._file = file == self._file, None
        try:
            if not self._lines:
                file.unlink(missing_ok=True)
            elif is_same_file and self._saved_length:
                write_lines(file, "a", self._lines[self._saved_length :])
            else:
                replace_lines(file, self._lines)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); checkpoints are intact") from error
        self._file, self._saved_length = file, len(self._lines)


def is_complete_row(line: bytes) -> bool:
    """Return True if a line ends and holds a JSON object."""
    try:
        return line.endswith(b"\n") and isinstance(json.loads(line.decode()), dict)
    except ValueError:
        return False


def replace_lines(file: Path, lines: list[str]) -> None:
    """Replace a file atomically by these lines, and flush it and its name to disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.new")
    try:
        write_lines(temporary, "w", lines)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_lines(file: Path, mode: str, lines: list[str]) -> None:
    """Write lines to a file opened in `mode`, and flush them to disk."""
    with file.open(mode, encoding="utf-8", newline="\n") as handle:
        handle.writelines(f"{line}\n" for line in lines)
        handle.flush()
        os.fsync(handle.fileno())
