"""dataset=jsonl: the user's own prompts or dialogues, with or without replies, from a file, a folder or the hub."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from apa_cli.datasets.base import Dataset, PromptStyle, make_prompt_key
from apa_cli.datasets.conversation import Turns, parse_messages, split_reply
from apa_cli.datasets.dialogue import HUMAN, format_dialogue
from apa_cli.datasets.row_file import SUFFIXES, Row, abbreviate, find_split_file, get_format, read_row_file
from apa_cli.datasets.source import HUB_NAME, Source, select_split
from apa_cli.errors import UserError
from apa_cli.types import EscapedText, Example, Range

FIELDS = ("prompt", "messages", "chosen", "rejected", "response", "score")
"""The fields that a row may have, which `columns` maps to the data's own names."""
TEMPLATE = re.compile(r"\{([^{}]+)\}")
"""A column's name in a template."""
SHARE_GPT = "conversations"
"""Column that is read as `messages` if there is no such column."""
HELD_OUT_SPLITS = ("test", "validation")
"""Splits that are held out, in order of preference, if `held_out_split` is null."""


class RowSource(NamedTuple):
    """Rows of one split."""

    key: str
    """The key that errors name."""
    name: str
    """The file, or the split of a data set."""
    rows: Iterator[Row]
    is_held_out: bool = False


@dataclass(frozen=True)
class JSONLines(Dataset):
    """Rows with a prompt, as text or as messages, and optionally chosen, rejected and logged responses.

    The path is a file (JSON Lines, a JSON array, CSV, Parquet), a folder or a data set on the hub. `columns` maps the
    names of FIELDS to the data's columns, or to templates of columns. A last message by the assistant is the chosen
    reply. A text `response` is the logged response, a number `score` its score; both are columns too, as are all that
    `columns` names. Plain texts stay unchanged; a dialogue's prompt is its text in HH's format, and the replies get a
    leading space. Without held-out rows, one distinct prompt in each `held_out_every` is held out with all its rows.
    """

    path: str
    columns: dict[str, str | None]
    subset: str | None
    train_split: str
    held_out_split: str | None
    held_out_path: str | None
    held_out_every: Annotated[int, Range(2)]
    format: PromptStyle
    stop_strings: list[str]

    def __post_init__(self) -> None:
        for name, column in self.columns.items():
            if name not in FIELDS:
                raise ValueError(f"columns: {name!r} is none of {', '.join(FIELDS)}")
            if column is not None and not isinstance(column, str):
                raise ValueError(f"columns.{name}: {column!r} is not the name of a column")

    @property
    def prompt_style(self) -> PromptStyle:
        return self.format

    def load(self, split: str) -> list[Example]:
        train, held_out = self._find_rows()
        if held_out is not None:
            return self._parse_rows(held_out if split == "test" else train)
        rows = self._parse_rows(train)
        examples = list(select_split(rows, lambda row: row.prompt, self.held_out_every, held_out=split == "test"))
        if not examples:
            count = len({make_prompt_key(row.prompt) for row in rows})
            raise UserError(
                f"dataset.path: {train.name} has {count} distinct prompts, too few for "
                f"dataset.held_out_every={self.held_out_every}; lower that or add prompts"
            )
        return examples

    def _find_rows(self) -> tuple[RowSource, RowSource | None]:
        """Return the training rows and the held-out rows, None if there are no such rows."""
        path = Path(self.path).expanduser()
        held_out = None
        if self.held_out_path is not None:
            held_out = open_file(Path(self.held_out_path).expanduser(), "dataset.held_out_path", True)
        names_splits = self.subset is not None or self.held_out_split is not None or self.train_split != "train"
        if path.is_dir() and not names_splits and (file := find_split_file(path, "train")) is not None:
            test = next(filter(None, (find_split_file(path, name) for name in HELD_OUT_SPLITS)), None)
            if held_out is None and test is not None:
                held_out = open_file(test, is_held_out=True)
            return open_file(file), held_out
        if path.is_dir() or (not path.exists() and HUB_NAME.fullmatch(self.path) and get_format(path) not in SUFFIXES):
            return self._find_splits(held_out)
        if path.exists() and names_splits:
            raise UserError(
                f"dataset.path: {path} is a file, without splits; leave out dataset.subset, dataset.train_split and "
                "dataset.held_out_split"
            )
        return open_file(path), held_out

    def _find_splits(self, held_out: RowSource | None) -> tuple[RowSource, RowSource | None]:
        """Return the training and held-out splits of a folder or a data set on the hub, as `_find_rows` does."""
        source = Source(self.path, subset=self.subset)
        names = (self.held_out_split,) if self.held_out_split is not None else HELD_OUT_SPLITS
        name = next((name for name in names if name in source or name == self.held_out_split), None)
        if held_out is None and name is not None:
            held_out = RowSource("dataset.path", f"split {name} of {source.name}", source.read(name), True)
        train = RowSource("dataset.path", f"split {self.train_split} of {source.name}", source.read(self.train_split))
        return train, held_out

    def _parse_rows(self, source: RowSource) -> list[Example]:
        """Return the rows as examples. Raise UserError, which names key, file and row, for an invalid one."""
        rows = list(source.rows)
        if not rows:
            raise UserError(f"{source.key}: {source.name} has no rows")
        columns = {name: column for name, column in self.columns.items() if column is not None}
        needed = FIELDS[:2] if source.is_held_out else FIELDS  # held-out rows may be without responses
        for name, column in ((name, columns[name]) for name in needed if name in columns):
            for part in TEMPLATE.findall(column) or [column]:
                if not any(part in row for row in rows):
                    raise UserError(
                        f"dataset.columns.{name}: no row of {source.name} has the column {part!r}; the first one has "
                        f"{', '.join(rows[0]) or 'none'}"
                    )
        examples = []
        for row in rows:
            try:
                examples.append(parse_row(row, columns))
            except ValueError as error:
                raise UserError(f"{source.key}: {row.place}: {error}") from error
        return examples


def open_file(file: Path, key: str = "dataset.path", is_held_out: bool = False) -> RowSource:
    """Return the rows of a file; errors name `key`."""
    return RowSource(key, str(file), read_row_file(file, key), is_held_out)


def parse_row(row: dict[str, Any], columns: dict[str, str]) -> Example:
    """Return a row as an example. Raise ValueError, with a message for the user, if the row is invalid."""
    names = {name: columns.get(name, name) for name in FIELDS}
    if "messages" not in columns and row.get("messages") is None and isinstance(row.get(SHARE_GPT), list):
        names["messages"] = SHARE_GPT
    values = {name: read_column(row, column) for name, column in names.items()}
    before_chosen, chosen = split_reply(values["chosen"], names["chosen"])
    before_rejected, rejected = split_reply(values["rejected"], names["rejected"])
    dialogues = {names["chosen"]: before_chosen, names["rejected"]: before_rejected}
    if values["messages"] is not None:
        turns = parse_messages(values["messages"], names["messages"])
        if turns[-1]["role"] == "assistant":
            reply = turns.pop()["content"]
            if chosen not in (None, reply):
                raise ValueError(
                    f"both {names['chosen']} and a last message by the assistant in {names['messages']}; only one can "
                    "be the chosen reply"
                )
            chosen = reply
        dialogues[names["messages"]] = turns
    if chosen is None and rejected is not None:
        raise ValueError(f"{names['rejected']} without {names['chosen']}")
    if values["prompt"] is None and all(turns is None for turns in dialogues.values()):
        raise ValueError(describe_missing_prompt(row, names))
    prompt = merge_prompts(values["prompt"], names["prompt"], dialogues)
    response = values["response"] if isinstance(values["response"], str) else None
    score = get_number(values["score"])
    for name, value in (("response", response), ("score", score)):
        if name in columns and value is None and values[name] is not None:
            raise ValueError(f"{names[name]} is no {name}, got {abbreviate(values[name])}")
    read_here = {names[name] for name in FIELDS[:4] if name not in columns}
    further = {name: value for name, value in row.items() if name not in read_here}
    if isinstance(prompt, str):
        return Example(prompt, chosen, rejected, further, None, response, score)
    chosen, rejected, response = (f" {reply}" if reply else reply for reply in (chosen, rejected, response))
    return Example(format_dialogue(prompt), chosen, rejected, further, prompt, response, score)


def read_column(row: dict[str, Any], column: str) -> Any:
    """Return the value of a column, None if the row lacks it; or the text of a template, such as "Q: {question}".

    Raise ValueError, with a message for the user, if the row lacks a column of the template.
    """
    if not TEMPLATE.search(column):
        return row.get(column)

    def fill(match: re.Match[str]) -> str:
        if match[1] not in row:
            raise ValueError(f"no column {match[1]!r} for the template {column!r}")
        return format_part(row[match[1]])

    return TEMPLATE.sub(fill, EscapedText.read(column))


def format_part(value: object) -> str:
    """Return a value as text in a template: a list joined by commas, null as "". Raise ValueError for an object."""
    if isinstance(value, list):
        return ", ".join(map(format_part, value))
    if isinstance(value, dict):
        raise ValueError(f"a template cannot show {abbreviate(value)}")
    return "" if value is None else str(value)


def describe_missing_prompt(row: dict[str, Any], names: dict[str, str]) -> str:
    """Return the message for a row without a prompt."""
    replies = [row.get(names[name]) for name in ("chosen", "rejected")]
    if all(isinstance(reply, str) and HUMAN in reply for reply in replies):
        return (
            f"{names['chosen']} and {names['rejected']} are whole dialogues in HH's format, without a prompt; give "
            "dataset=hh dataset.path=FOLDER dataset.subsets=null, with train.jsonl and test.jsonl in FOLDER"
        )
    if names["prompt"] in row:
        return f"{names['prompt']} must be a non-empty text or a list of messages, got null"
    return (
        f"no prompt; the columns are {', '.join(row) or 'none'}; name the one with the prompt by "
        "dataset.columns.prompt=COLUMN, or the one with messages by dataset.columns.messages=COLUMN"
    )


def merge_prompts(prompt: object, name: str, dialogues: dict[str, Turns | None]) -> str | Turns:
    """Return a row's prompt: a plain text, or the turns if any of its fields is a list of messages.

    `prompt` is the field `name`; `dialogues` maps the other fields to their turns in front of the reply, None for a
    field of another form and [] for a reply without turns. Raise ValueError, with a message for the user, if the prompt
    is invalid or the fields contain different prompts.
    """
    turns_by_name = {name: turns for name, turns in dialogues.items() if turns}
    if isinstance(prompt, list) and prompt and all(isinstance(part, str) for part in prompt):
        raise ValueError(
            f"{name} must be a text or a list of messages, got {abbreviate(prompt)}; a template joins texts, as "
            f"'dataset.columns.prompt=\"{{{name}}}\"'"
        )
    if isinstance(prompt, list):
        turns_by_name[name] = parse_messages(prompt, name)
        if turns_by_name[name][-1]["role"] == "assistant":
            raise ValueError(
                f"{name} ends with the assistant's turn; dataset.columns.messages={name} makes that chosen"
            )
    elif prompt is not None and (not isinstance(prompt, str) or not prompt.strip()):
        raise ValueError(f"{name} must be a non-empty text or a list of messages, got {abbreviate(prompt)}")
    if not turns_by_name and isinstance(prompt, str):
        return prompt if all(turns is None for turns in dialogues.values()) else [{"role": "user", "content": prompt}]
    if all(message["role"] == "system" for turns in turns_by_name.values() for message in turns):
        given = [name for name, turns in dialogues.items() if turns is not None]
        raise ValueError(f"no turn to respond to in {', '.join(given) or name}")
    (first, turns), *others = turns_by_name.items()
    for other, other_turns in others:
        if other_turns != turns:
            raise ValueError(f"{first} and {other} differ before the last reply; a row has one prompt")
    if isinstance(prompt, str) and prompt.strip() not in [turn["content"].strip() for turn in turns]:
        raise ValueError(f"{name} is none of the turns of {first}; leave one of the two out")
    return turns


def get_number(value: object) -> float | None:
    """Return a finite number, or a text of one as CSV has, as a float; None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None
