"""Rows of a data set on the hub, or of a local folder that is laid out the same way, read by `datasets`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from apa_cli.datasets.base import is_held_out
from apa_cli.errors import UserError
from apa_cli.network import hub_answers
from apa_cli.types import Example, Examples

Row = dict[str, Any]
Item = TypeVar("Item")

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Source:
    """The splits of a data set, or of one folder of it. UserError, one line, for all that cannot be read.

    Local files are read as they are. What is on the hub is downloaded once and kept by `datasets`; `streamed`
    reads no more of it than is asked for, and keeps nothing.
    """

    def __init__(self, path: str, folder: str | None = None, streamed: bool = False):
        local = Path(path).expanduser()
        self.name = path if folder is None else f"{path}/{folder}"
        if local.is_file():
            raise UserError(f"dataset.path: {path} is a file; a folder with files such as train.jsonl.gz is needed")
        if local.is_dir():
            if folder is not None and not (local / folder).is_dir():
                raise UserError(f"dataset.path: no folder {folder} in {path}; {inside(local)}")
            path, streamed = str(local.resolve()), True
        elif not HUB_NAME.fullmatch(path):
            raise UserError(f"dataset.path: there is no folder {path}")
        if not local.is_dir():
            hub_answers()
        with quiet("huggingface_hub"), self._readable():
            import datasets

            datasets.logging.set_verbosity(logging.CRITICAL)  # errors are told below
            self._splits = datasets.load_dataset(path, data_dir=folder, streaming=streamed)

    def __contains__(self, split: str) -> bool:
        return split in self._splits

    def rows(self, split: str, forms: Mapping[str, tuple[str, ...]]) -> tuple[str, Iterator[Row]]:
        """The form of a split's rows, the first of `forms` (name → columns) whose columns are there; and its rows."""
        if split not in self:
            raise UserError(f"dataset.path: {self.name} has no split {split}, only {', '.join(self._splits)}")
        rows = self._read(split)
        first = next(rows, None)
        if first is None:
            raise UserError(f"dataset.path: the split {split} of {self.name} is empty")
        for name, columns in forms.items():
            if set(columns) <= set(first):
                return name, _chained(first, rows)
        wanted = " or ".join(", ".join(columns) for columns in forms.values())
        raise UserError(f"dataset.path: {self.name} has the columns {', '.join(first)}; needed are {wanted}")

    def _read(self, split: str) -> Iterator[Row]:
        with self._readable():
            yield from self._splits[split]

    @contextmanager
    def _readable(self) -> Iterator[None]:
        """What goes wrong in here becomes one line."""
        try:
            yield
        except ConnectionError as error:
            raise UserError(
                f"dataset.path: there is no local folder {self.name}, and the hub, where a data set of this name may "
                "be, cannot be reached; a local folder laid out like it works too"
            ) from error
        except StopIteration as error:
            raise UserError(f"dataset.path: a file of {self.name} is empty") from error
        except Exception as error:  # of `datasets`, the hub's client, pyarrow, gzip, …
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"dataset.path: cannot read {self.name} ({first_line})") from error


@contextmanager
def quiet(name: str) -> Iterator[None]:
    """No warnings of a package's logger in here, such as those of a client that tries again."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def inside(folder: Path, most: int = 10) -> str:
    """The names in a folder, for a message."""
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:most]) or "nothing"
    return f"in it: {shown}" + (f" and {len(names) - most} more" if len(names) > most else "")


def _chained(first: Row, rest: Iterator[Row]) -> Iterator[Row]:
    yield first
    yield from rest


def text(row: Row, column: str) -> str:
    """A column that holds text; what is missing is empty."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"dataset.path: the column {column} holds {value!r}, not text")
    return value


def share(rows: Iterable[Item], key: Callable[[Item], Hashable], every: int, held_out: bool) -> Iterator[Item]:
    """The rows whose key is held out (see `is_held_out`) where `held_out`, else all others."""
    numbers: dict[Hashable, int] = {}
    for row in rows:
        number = numbers.setdefault(key(row), len(numbers) + 1)
        if is_held_out(number, every) == held_out:
            yield row


def usable(candidates: Iterable[Example | str], most: int | None) -> Examples:
    """The first `most` examples (None: all); a text among them says why a row is left out, and is counted."""
    dropped: Counter[str] = Counter()

    def examples() -> Iterator[Example]:
        for candidate in candidates:
            if isinstance(candidate, str):
                dropped[candidate] += 1
            else:
                yield candidate

    rows = list(islice(examples(), most))
    return Examples(rows, dropped)
