"""dataset=prompts: the user's own prompts, one per line of a text file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from apa_cli.datasets.base import Dataset, make_prompt_key
from apa_cli.datasets.row_file import SUFFIXES, get_format
from apa_cli.datasets.source import select_split
from apa_cli.datasets.text_file import read_text_lines, strip_line_end
from apa_cli.errors import UserError
from apa_cli.types import EscapedText, Example, Examples, Range


@dataclass(frozen=True)
class PromptFile(Dataset):
    """Prompts from a text file, one per line; blank lines are skipped, repetitions skipped and counted.

    One distinct line in each `held_out_every` is held out, the others are for training.
    """

    path: str
    held_out_every: Annotated[int, Range(2)]
    prefix: Annotated[str, EscapedText]
    suffix: Annotated[str, EscapedText]
    stop_strings: list[str]

    def load(self, split: str) -> Examples:
        file = Path(self.path).expanduser()
        if get_format(file) in SUFFIXES:
            raise UserError(f"dataset.path: {file} holds rows, not lines of text; give dataset=jsonl")
        lines = [text for _, line in read_text_lines(file, "dataset.path") if (text := strip_line_end(line)).strip()]
        texts = list(dict.fromkeys(lines))
        count = len({make_prompt_key(text) for text in texts})
        if count < self.held_out_every:
            raise UserError(
                f"dataset.path: {file} has {count} distinct prompts, fewer than "
                f"dataset.held_out_every={self.held_out_every}; lower that or add prompts"
            )
        selected = select_split(texts, lambda text: text, self.held_out_every, held_out=split == "test")
        examples = [Example(f"{self.prefix}{text}{self.suffix}", None, None, {}) for text in selected]
        repeated = len(lines) - len(texts) if split == "train" else 0
        return Examples(examples, {"repeated lines": repeated} if repeated else {})
