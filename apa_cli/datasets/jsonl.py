"""dataset=jsonl: the user's own prompts or dialogues, with or without replies, one JSON object per line."""

from __future__ import annotations

import gzip
import json
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from apa_cli.datasets.base import Dataset, PromptStyle
from apa_cli.datasets.dialogue import MARKERS, format_dialogue
from apa_cli.datasets.source import list_folder, select_split
from apa_cli.errors import UserError
from apa_cli.types import Example, Range

FILE_NAMES = {split: (f"{split}.jsonl", f"{split}.jsonl.gz") for split in ("train", "test")}
FIELDS = ("prompt", "messages", "chosen", "rejected")
"""The fields of a row that are read here only; all others are columns, `response` and `score` too."""


@dataclass(frozen=True)
class JSONLines(Dataset):
    """Rows {"prompt": text} or {"messages": [{"role", "content"}, …]}, optionally with "chosen" and "rejected".

    A last message by the assistant is the chosen reply. A text "response" is the logged response, a number "score" its
    score; both are columns too. Further fields are columns for reward functions. Plain texts
    stay unchanged; a dialogue's prompt is its text in HH's format, and the replies get a leading space. Without a file
    of held-out rows, one distinct prompt in each `held_out_every` is held out with all its rows.
    """

    path: str
    held_out_path: str | None
    held_out_every: Annotated[int, Range(2)]
    format: PromptStyle
    stop_strings: list[str]

    @property
    def prompt_style(self) -> PromptStyle:
        return self.format

    def load(self, split: str) -> list[Example]:
        train, test = self._find_files()
        if test is not None:
            key, file = ("dataset.held_out_path", test) if split == "test" else ("dataset.path", train)
            return read_examples(file, key)
        rows = read_examples(train, "dataset.path")
        examples = list(select_split(rows, lambda row: row.prompt, self.held_out_every, held_out=split == "test"))
        if not examples:
            count = len({row.prompt for row in rows})
            raise UserError(
                f"dataset.path: {train} has {count} distinct prompts, too few for "
                f"dataset.held_out_every={self.held_out_every}; lower that or add prompts"
            )
        return examples

    def _find_files(self) -> tuple[Path, Path | None]:
        """Return the file of training rows and the file of held-out rows, None if there is no such file."""
        path = Path(self.path).expanduser()
        train: Path | None = path
        test = None if self.held_out_path is None else Path(self.held_out_path).expanduser()
        if path.is_dir():
            train, test = find_split_file(path, "train"), test or find_split_file(path, "test")
        if train is None:
            names = " nor ".join(FILE_NAMES["train"])
            raise UserError(f"dataset.path: neither {names} in {path}; {list_folder(path)}")
        return train, test


def find_split_file(folder: Path, split: str) -> Path | None:
    """Return the file of a split in a folder, None if there is none. Raise UserError if there are two."""
    files = [folder / name for name in FILE_NAMES[split] if (folder / name).is_file()]
    if len(files) > 1:
        raise UserError(f"dataset.path: both {' and '.join(FILE_NAMES[split])} are in {folder}; remove one")
    return files[0] if files else None


def read_examples(file: Path, key: str) -> list[Example]:
    """Return the rows of a file, blank lines skipped. Raise UserError naming `key`, file and line of a bad row."""
    examples = []
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        examples.append(parse_row(json.loads(line)))
                    except json.JSONDecodeError as error:
                        raise UserError(f"{key}: {file}, row {number}: not JSON ({error.msg})") from error
                    except ValueError as error:
                        raise UserError(f"{key}: {file}, row {number}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{key}: cannot read {file} ({error})") from error
    if not examples:
        raise UserError(f"{key}: {file} has no rows")
    return examples


def parse_row(row: object) -> Example:
    """Return a row as an example. Raise ValueError, with a message for the user, if the row is invalid."""
    if not isinstance(row, dict):
        raise ValueError("not an object with fields")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("either prompt or messages is needed" + (", not both" if "prompt" in row else ""))
    replies = {name: get_reply(row, name) for name in ("chosen", "rejected")}
    columns = {name: value for name, value in row.items() if name not in FIELDS}
    messages: list[dict[str, str]] | None = None
    if "prompt" in row:
        prompt = row["prompt"]
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt must be a non-empty text, got {abbreviate(prompt)}")
    else:
        messages = parse_messages(row["messages"])
        if messages[-1]["role"] == "assistant":
            if replies["chosen"] is not None:
                raise ValueError("both chosen and a last message by the assistant; only one can be the chosen reply")
            replies["chosen"] = messages.pop()["content"]
        if all(message["role"] == "system" for message in messages):
            raise ValueError("messages contain no turn to respond to")
        prompt = format_dialogue(messages)
        replies = {name: None if reply is None else f" {reply}" for name, reply in replies.items()}
    if replies["chosen"] is None and replies["rejected"] is not None:
        raise ValueError("rejected without chosen")
    response = row.get("response") if isinstance(row.get("response"), str) else None
    response = f" {response}" if response and messages is not None else response
    return Example(
        prompt, replies["chosen"], replies["rejected"], columns, messages, response, get_number(row.get("score"))
    )


def get_number(value: object) -> float | None:
    """Return a finite number as a float, None for any other value."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if abs(value) <= sys.float_info.max else None  # false for nan


def get_reply(row: dict[str, Any], name: str) -> str | None:
    """Return the text of a reply, None if there is none. Raise ValueError if it is not a non-empty text."""
    reply = row.get(name)
    if reply is None or (isinstance(reply, str) and reply.strip()):
        return reply
    raise ValueError(f"{name} must be a non-empty text, got {abbreviate(reply)}")


def parse_messages(messages: object) -> list[dict[str, str]]:
    """Return the messages reduced to role and content. Raise ValueError if the list, a role or a content is invalid."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a non-empty list, got {abbreviate(messages)}")
    turns = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in MARKERS and not (role == "system" and number == 1):
            allowed = f"{', '.join(MARKERS)} or, in the first message, system"
            raise ValueError(f"the role of message {number} must be {allowed}, got {abbreviate(role)}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"the content of message {number} must be a non-empty text, got {abbreviate(content)}")
        turns.append({"role": role, "content": content})
    return turns


def abbreviate(value: object, limit: int = 60) -> str:
    """Return a value as JSON of at most `limit` characters, for a message of one line."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= limit else f"{text[:limit]}…"
