"""Rows of a data set on the hub, or of a local folder with the same layout, read by `datasets`."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from apa_cli.datasets.base import is_held_out
from apa_cli.errors import UserError, get_first_line
from apa_cli.network import probe_hub
from apa_cli.types import Example, Examples

Row = dict[str, Any]
Candidate = Example | str
"""An example, or the reason why a row is unusable, in the plural ("empty posts")."""
Item = TypeVar("Item")

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Source:
    """The splits of a data set, or of one folder of it; every error in reading them is a UserError of one line.

    Local files are read in place. A data set on the hub is downloaded once and cached by `datasets`; with `streamed`
    only the requested rows are read, and nothing is cached.
    """

    def __init__(self, path: str, folder: str | None = None, streamed: bool = False) -> None:
        local = Path(path).expanduser()
        self.name = path if folder is None else f"{path}/{folder}"
        if local.is_file():
            raise UserError(f"dataset.path: {path} is a file; give a folder with files such as train.jsonl.gz")
        if local.is_dir():
            if folder is not None and not (local / folder).is_dir():
                raise UserError(f"dataset.path: no folder {folder} in {path}; {list_folder(local)}")
            path, streamed = str(local.resolve()), True
        elif not HUB_NAME.fullmatch(path):
            raise UserError(f"dataset.path: there is no folder {path}")
        if not local.is_dir():
            probe_hub()  # if not, it switches `datasets` to offline mode
        with silence_logger("huggingface_hub"), self._translate_errors():
            import datasets

            datasets.logging.set_verbosity(logging.CRITICAL)  # errors are raised as UserError below
            self._splits = datasets.load_dataset(path, data_dir=folder, streaming=streamed)

    def __contains__(self, split: str) -> bool:
        return split in self._splits

    def rows(self, split: str, layouts: Mapping[str, tuple[str, ...]]) -> tuple[str, Iterator[Row]]:
        """Return the column layout of a split and its rows.

        `layouts` maps a name to the columns that the layout needs; the first one whose columns all exist applies.
        """
        if split not in self:
            raise UserError(f"dataset.path: {self.name} has no split {split}, only {', '.join(self._splits)}")
        rows = self._read(split)
        first = next(rows, None)
        if first is None:
            raise UserError(f"dataset.path: split {split} of {self.name} is empty")
        for name, columns in layouts.items():
            if set(columns) <= set(first):
                return name, chain([first], rows)
        alternatives = " or ".join(", ".join(columns) for columns in layouts.values())
        raise UserError(f"dataset.path: {self.name} has the columns {', '.join(first)}; needed are {alternatives}")

    def _read(self, split: str) -> Iterator[Row]:
        with self._translate_errors():
            yield from self._splits[split]

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        """Raise a UserError of one line for any error in the block."""
        try:
            yield
        except ConnectionError as error:
            raise UserError(
                f"dataset.path: there is no local folder {self.name}, and the hub cannot be reached; give a local "
                "folder with the hub's layout, or try again online"
            ) from error
        except StopIteration as error:
            raise UserError(f"dataset.path: a file of {self.name} is empty") from error
        except Exception as error:  # `datasets`, the hub's client, pyarrow, gzip, … raise many types
            raise UserError(f"dataset.path: cannot read {self.name} ({get_first_line(error)})") from error


@contextmanager
def silence_logger(name: str) -> Iterator[None]:
    """Suppress the warnings of a package's logger in the block, such as a client's warnings before each retry."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def list_folder(folder: Path, limit: int = 10) -> str:
    """Return the names in a folder, at most `limit`, as text for a message."""
    names = sorted(entry.name for entry in folder.iterdir())
    listing = ", ".join(names[:limit]) or "nothing"
    return f"in it: {listing}" + (f" and {len(names) - limit} more" if len(names) > limit else "")


def get_text(row: Row, column: str) -> str:
    """Return the text in a column, "" if it is missing or null. Raise UserError for a value that is not text."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"dataset.path: column {column} contains {value!r}, not text")
    return value


def select_split(rows: Iterable[Item], key: Callable[[Item], Hashable], every: int, held_out: bool) -> Iterator[Item]:
    """Yield the rows whose distinct key is held out (see `is_held_out`) if `held_out`, else all other rows."""
    numbers: dict[Hashable, int] = {}
    for row in rows:
        number = numbers.setdefault(key(row), len(numbers) + 1)
        if is_held_out(number, every) == held_out:
            yield row


def take_examples(candidates: Iterable[Candidate], limit: int | None) -> Examples:
    """Return the first `limit` examples (None: all) and count the unusable rows passed over, by reason."""
    drop_counts: Counter[str] = Counter()

    def iterate_examples() -> Iterator[Example]:
        for candidate in candidates:
            if isinstance(candidate, str):
                drop_counts[candidate] += 1
            else:
                yield candidate

    rows = list(islice(iterate_examples(), limit))
    return Examples(rows, drop_counts)
