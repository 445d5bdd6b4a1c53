"""dataset=jsonl: your own prompts or dialogues, with or without replies, one JSON object per line."""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from apa_cli.datasets.base import Dataset, PromptForm
from apa_cli.datasets.dialogue import MARKERS, dialogue_text
from apa_cli.datasets.source import inside, share
from apa_cli.errors import UserError
from apa_cli.types import Example, Range

NAMES = {split: (f"{split}.jsonl", f"{split}.jsonl.gz") for split in ("train", "test")}
FIELDS = ("prompt", "messages", "chosen", "rejected")


@dataclass(frozen=True)
class JSONLines(Dataset):
    """Rows {"prompt": text} or {"messages": [{"role", "content"}, …]}, with "chosen" and "rejected" where there are
    replies; a last message of the assistant's is the chosen reply. Further fields are columns for reward functions.

    Plain texts are kept as they are. A dialogue's prompt is its text in HH's form, and its replies get a space in
    front. Without a file of held-out rows, one distinct prompt in each `held_out_every` is held out with all its rows.
    """

    path: str
    held_out_path: str | None
    held_out_every: Annotated[int, Range(2)]
    format: PromptForm
    stop_strings: list[str]

    @property
    def prompt_form(self) -> PromptForm:
        return self.format

    def load(self, split: str) -> list[Example]:
        train, test = self._files()
        if test is not None:
            key, file = ("dataset.held_out_path", test) if split == "test" else ("dataset.path", train)
            return read(file, key)
        rows = read(train, "dataset.path")
        found = list(share(rows, lambda row: row.prompt, self.held_out_every, held_out=split == "test"))
        if not found:
            count = len({row.prompt for row in rows})
            raise UserError(
                f"dataset.path: {train} has {count} prompts, too few to hold out every {self.held_out_every}th"
            )
        return found

    def _files(self) -> tuple[Path, Path | None]:
        """The files of the rows to train on and of those held out, where they have one of their own."""
        path = Path(self.path).expanduser()
        train: Path | None = path
        test = None if self.held_out_path is None else Path(self.held_out_path).expanduser()
        if path.is_dir():
            train, test = only(path, "train"), test or only(path, "test")
        if train is None:
            raise UserError(f"dataset.path: neither {' nor '.join(NAMES['train'])} in {path}; {inside(path)}")
        return train, test


def only(folder: Path, split: str) -> Path | None:
    """The file of a split in a folder, if there is one; UserError if there are two."""
    files = [folder / name for name in NAMES[split] if (folder / name).is_file()]
    if len(files) > 1:
        raise UserError(f"dataset.path: both {' and '.join(NAMES[split])} are in {folder}; one is needed")
    return files[0] if files else None


def read(file: Path, key: str) -> list[Example]:
    """The rows of a file; blank lines are skipped. UserError that names the file, and the line of a bad row."""
    examples = []
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    try:
                        examples.append(example(json.loads(line)))
                    except json.JSONDecodeError as error:
                        raise UserError(f"{key}: {file}, row {number}: not JSON ({error.msg})") from error
                    except ValueError as error:
                        raise UserError(f"{key}: {file}, row {number}: {error}") from error
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(f"{key}: cannot read {file} ({error})") from error
    if not examples:
        raise UserError(f"{key}: {file} has no rows")
    return examples


def example(row: Any) -> Example:
    """One row; ValueError says what is wrong with it."""
    if not isinstance(row, dict):
        raise ValueError("not an object with fields")
    if ("prompt" in row) == ("messages" in row):
        raise ValueError("either prompt or messages is needed" + (", not both" if "prompt" in row else ""))
    replies = {name: reply(row, name) for name in ("chosen", "rejected")}
    columns = {name: value for name, value in row.items() if name not in FIELDS}
    if "prompt" in row:
        prompt, messages = row["prompt"], None
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt must be a text that is not empty, got {shown(prompt)}")
    else:
        messages = turns(row["messages"])
        if messages[-1]["role"] == "assistant":
            if replies["chosen"] is not None:
                raise ValueError("chosen is given, and the last message is a reply of the assistant's too")
            replies["chosen"] = messages.pop()["content"]
        if all(message["role"] == "system" for message in messages):
            raise ValueError("messages hold nothing to reply to")
        prompt = dialogue_text(messages)
        replies = {name: None if said is None else f" {said}" for name, said in replies.items()}
    if replies["chosen"] is None and replies["rejected"] is not None:
        raise ValueError("rejected is given without chosen")
    return Example(prompt, replies["chosen"], replies["rejected"], columns, messages)


def reply(row: dict[str, Any], name: str) -> str | None:
    """The text of a reply, None where there is none."""
    said = row.get(name)
    if said is not None and (not isinstance(said, str) or not said.strip()):
        raise ValueError(f"{name} must be a text that is not empty, got {shown(said)}")
    return said


def turns(messages: Any) -> list[dict[str, str]]:
    """The messages with role and content alone."""
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"messages must be a list that is not empty, got {shown(messages)}")
    found = []
    for number, message in enumerate(messages, start=1):
        role = message.get("role") if isinstance(message, dict) else None
        if role not in MARKERS and not (role == "system" and number == 1):
            allowed = f"{', '.join(MARKERS)} or, in the first message, system"
            raise ValueError(f"the role of message {number} must be {allowed}, got {shown(role)}")
        content = message.get("content")
        if not isinstance(content, str) or not content.strip():
            raise ValueError(f"the content of message {number} must be a text that is not empty, got {shown(content)}")
        found.append({"role": role, "content": content})
    return found


def shown(value: Any, most: int = 60) -> str:
    """A value in a message of one line."""
    written = json.dumps(value, ensure_ascii=False)
    return written if len(written) <= most else f"{written[:most]}…"
