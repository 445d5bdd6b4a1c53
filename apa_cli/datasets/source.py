"""Rows of a data set on the hub, or of a local folder with the same layout, read by `datasets`."""

from __future__ import annotations

import glob
import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from apa_cli.datasets.base import is_held_out, make_prompt_key
from apa_cli.datasets.row_file import SUFFIXES, Row, abbreviate, find_split_file, get_format, read_row_file
from apa_cli.errors import UserError, get_first_line
from apa_cli.network import probe_hub
from apa_cli.types import Example, Examples

SPLITS = ("train", "test", "validation")
Candidate = Example | str
"""An example, or the reason why a row is unusable, in the plural ("empty posts")."""
Item = TypeVar("Item")

HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


class Source:
    """The splits of a data set, or of one folder of it; every error in reading them is a UserError of one line.

    Local files are read in place, by `row_file` if they are in one of its formats. A data set on the hub is downloaded
    once and cached by `datasets`; with `streamed` only the requested rows are read, and nothing is cached. `subset` is
    the name of one of the data set's configurations.
    """

    def __init__(self, path: str, folder: str | None = None, streamed: bool = False, subset: str | None = None) -> None:
        local = Path(path).expanduser()
        self.name = path if folder is None else f"{path}/{folder}"
        if local.is_file():
            raise UserError(f"dataset.path: {path} is a file; give a folder with files such as train.jsonl.gz")
        if local.is_dir():
            if folder is not None and not (local / folder).is_dir():
                raise UserError(f"dataset.path: no folder {folder} in {path}; {list_folder(local)}")
            self._splits: Mapping[Any, Any] = self._find_files(local.resolve(), folder, subset)
            return
        if not HUB_NAME.fullmatch(path):
            raise UserError(f"dataset.path: there is no folder {path}")
        probe_hub()  # if not, it switches `datasets` to offline mode
        with silence_logger("huggingface_hub"), self._translate_errors():
            self._splits = import_datasets().load_dataset(path, subset, data_dir=folder, streaming=streamed)

    def _find_files(self, root: Path, folder: str | None, subset: str | None) -> Mapping[Any, Any]:
        """Return each split of a local folder: its files, or its rows if they are in another format."""
        if glob.has_magic(str(root)):  # `datasets` takes the folder's name as a pattern
            files = {split: find_split_file(root / (folder or ""), split) for split in SPLITS}
            if found := {split: [file] for split, file in files.items() if file is not None}:
                return found
            raise UserError(f"dataset.path: {root} has no train.jsonl, and *, ? or [ in its name; rename the folder")
        with self._translate_errors():
            builder = import_datasets().load_dataset_builder(str(root), subset, data_dir=folder)
            paths = {str(split): [*map(Path, names)] for split, names in (builder.config.data_files or {}).items()}
            if all(get_format(file) in SUFFIXES for files in paths.values() for file in files):
                return paths
            return builder.as_streaming_dataset()

    def __contains__(self, split: str) -> bool:
        return split in self._splits

    def rows(self, split: str, layouts: Mapping[str, tuple[str, ...]]) -> tuple[str, Iterator[Row]]:
        """Return the column layout of a split and its rows.

        `layouts` maps a name to the columns that the layout needs; the first one whose columns all exist applies.
        """
        rows = self.read(split)
        first = next(rows, None)
        if first is None:
            raise UserError(f"dataset.path: split {split} of {self.name} is empty")
        for name, columns in layouts.items():
            if set(columns) <= set(first):
                return name, check_columns(chain([first], rows), columns)
        alternatives = " or ".join(", ".join(columns) for columns in layouts.values())
        raise UserError(f"dataset.path: {self.name} has the columns {', '.join(first)}; needed are {alternatives}")

    def read(self, split: str) -> Iterator[Row]:
        """Return the rows of a split."""
        if split not in self:
            raise UserError(f"dataset.path: {self.name} has no split {split}, only {', '.join(self._splits)}")
        return self._read(split)

    def _read(self, split: str) -> Iterator[Row]:
        rows = self._splits[split]
        if isinstance(rows, list):
            for file in rows:
                yield from read_row_file(file, "dataset.path")
            return
        with self._translate_errors():
            for number, row in enumerate(rows, start=1):
                yield Row(row, f"split {split} of {self.name}, row {number}")

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


def import_datasets() -> Any:
    """Return the package `datasets`, which then logs nothing: errors are raised as UserError here."""
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    return datasets


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


def check_columns(rows: Iterable[Row], columns: Iterable[str]) -> Iterator[Row]:
    """Yield the rows. Raise UserError for a row without one of the columns."""
    for row in rows:
        for column in columns:
            if column not in row:
                raise UserError(f"dataset.path: {row.place}: no column {column}, only {', '.join(row)}")
        yield row


def get_text(row: Row, column: str) -> str:
    """Return the text in a column, "" if it is missing or null. Raise UserError for a value that is not text."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        hint = "; dataset=jsonl reads lists of messages" if isinstance(value, list) else ""
        raise UserError(f"dataset.path: {row.place}: column {column} must be text, got {abbreviate(value)}{hint}")
    return value


def select_split(rows: Iterable[Item], key: Callable[[Item], str], every: int, held_out: bool) -> Iterator[Item]:
    """Yield the rows whose distinct key is held out (see `is_held_out`) if `held_out`, else all other rows.

    Keys that differ in white space only are one, so that no prompt is on both sides (see `make_prompt_key`).
    """
    numbers: dict[str, int] = {}
    for row in rows:
        number = numbers.setdefault(make_prompt_key(key(row)), len(numbers) + 1)
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
