"""Rows of a local file: JSON Lines, a JSON array, CSV or Parquet."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from apa_cli.datasets.text_file import has_lone_surrogate, read_text_lines
from apa_cli.errors import UserError, get_first_line

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
"""Endings of the files that can be read; all but .parquet may be followed by .gz."""
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
DELIMITERS = ",;\t"
"""Delimiters of CSV files, in order of preference."""


class Row(dict[str, Any]):
    """One row, by column; `place` names its file and number, for messages."""

    def __init__(self, values: dict[str, Any], place: str) -> None:
        super().__init__(values)
        self.place = place


def get_format(file: Path) -> str:
    """Return the file's suffix in lower case, without .gz."""
    name = file.name.lower().removesuffix(".gz")
    return Path(name).suffix


def find_split_file(folder: Path, split: str) -> Path | None:
    """Return the file of a split in a folder, such as train.csv, or None. Raise UserError if there are two."""
    names = [f"{split}{suffix}{packed}" for suffix in SUFFIXES for packed in ("", ".gz")]
    files = [folder / name for name in names if (folder / name).is_file()]
    if len(files) > 1:
        both = " and ".join(file.name for file in files)
        raise UserError(f"dataset.path: both {both} are in {folder}; remove one")
    return files[0] if files else None


def read_row_file(file: Path, key: str) -> Iterator[Row]:
    """Yield the rows of a file in the format of its suffix, JSON for an unknown one; blank lines are skipped.

    Raise UserError, in one line that names `key`, file and row, for a file or row that cannot be read. Rows are counted
    from 1: of CSV as in a spreadsheet, where the header is row 1; of JSON Lines by lines.
    """
    readers: dict[str, Callable[[Path, str], Iterator[tuple[int, Any]]]] = {
        ".csv": read_csv, ".tsv": read_csv, ".parquet": read_parquet,
    }  # fmt: skip
    for number, values in readers.get(get_format(file), read_json)(file, key):
        place = f"{file}, row {number}"
        if not isinstance(values, dict):
            hint = "; lines of text are for dataset=prompts" if isinstance(values, str) else ""
            raise UserError(f"{key}: {place}: not an object with fields{hint}")
        yield Row(values, place)


def read_json(file: Path, key: str) -> Iterator[tuple[int, Any]]:
    """Yield number and content of each row of JSON Lines, or of one array if the file begins with a bracket."""
    lines = ((number, line) for number, line in read_text_lines(file, key) if line.strip())
    first = next(lines, None)
    if first is None:
        return
    if first[1].lstrip().startswith("["):
        text = "".join(line for _, line in chain([first], lines))
        for number, row in enumerate(parse_json(text, f"{key}: {file}"), start=1):
            check_surrogates(row, text, f"{key}: {file}, row {number}")
            yield number, row
        return
    for number, line in chain([first], lines):
        place = f"{key}: {file}, row {number}"
        row = parse_json(line, place)
        check_surrogates(row, line, place)
        yield number, row


def parse_json(text: str, place: str) -> Any:
    """Return the value of a JSON text. Raise UserError that begins with `place` if there is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "one object per line, or one array of objects, is needed; lines of text are for dataset=prompts"
        where = f" at line {error.lineno}" if error.lineno > 1 else ""
        raise UserError(f"{place}: not JSON ({error.msg}{where}); {hint}") from error
    except RecursionError as error:
        raise UserError(f"{place}: JSON nested too deeply") from error
    except ValueError as error:  # an integer of thousands of digits
        raise UserError(f"{place}: {get_first_line(error)}") from error


def read_csv(file: Path, key: str) -> Iterator[tuple[int, dict[str, str | None]]]:
    """Yield number and cells of each row, all of them text, None for an empty cell; the first row is the header.

    The delimiter is the one of DELIMITERS that is most frequent in the header.
    """
    lines = (line for _, line in read_text_lines(file, key))
    header_line = next((line for line in lines if line.strip()), None)
    if header_line is None:
        return
    csv.field_size_limit(sys.maxsize)
    delimiter = max(DELIMITERS, key=header_line.count)
    rows = csv.reader(chain([header_line], lines), delimiter=delimiter, strict=True)
    number = 1
    try:
        header = [name.strip() for name in next(rows)]
        if len(set(header)) < len(header):
            raise UserError(f"{key}: {file}, row 1: two columns have the same name, {', '.join(header)}")
        for number, cells in enumerate(rows, start=2):
            if cells and len(cells) != len(header):
                raise UserError(
                    f"{key}: {file}, row {number}: {len(cells)} cells, but the header has {len(header)}; put cells "
                    'with a delimiter in "…"'
                )
            if any(cells):
                yield number, {name: cell or None for name, cell in zip(header, cells, strict=True)}
    except csv.Error as error:
        raise UserError(f"{key}: {file}, row {number + 1}: not CSV ({error})") from error


def read_parquet(file: Path, key: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield number and values of each row."""
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1000):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    except Exception as error:  # pyarrow raises many types
        if isinstance(error, OSError) and error.errno is not None:
            raise UserError(f"{key}: cannot read {file} ({error.strerror or get_first_line(error)})") from error
        raise UserError(f"{key}: {file}, after row {number}: not Parquet ({get_first_line(error)})") from error


def check_surrogates(row: Any, source: str, place: str) -> None:
    """Raise UserError, which begins with `place`, for a lone surrogate in a key or value of a row at any depth.

    `source` is the JSON text, in which only an escape can stand for a surrogate.
    """
    pending = [row] if ESCAPED_SURROGATE.search(source) else []
    while pending:
        part = pending.pop()
        if isinstance(part, str) and has_lone_surrogate(part):
            shown = part.encode("ascii", "backslashreplace").decode()[:60]
            raise UserError(f"{place}: half of a surrogate pair, which is no character, in '{shown}'")
        if isinstance(part, dict):
            pending += [*part.keys(), *part.values()]
        elif isinstance(part, list):
            pending += part


def abbreviate(value: object, limit: int = 60) -> str:
    """Return a value as JSON of at most `limit` characters, for a message of one line."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[:limit]}…"
