"""dataset=prompts: the user's own prompts, one per line of a text file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from apa_cli.datasets.base import Dataset, is_held_out
from apa_cli.errors import UserError
from apa_cli.types import Example, Range


@dataclass(frozen=True)
class PromptFile(Dataset):
    """Prompts from a text file, one per line; blank lines and repetitions are skipped.

    One distinct line in each `held_out_every` is held out, the others are for training.
    """

    path: str
    held_out_every: Annotated[int, Range(2)]
    prefix: str
    suffix: str
    stop_strings: list[str]

    def load(self, split: str) -> list[Example]:
        file = Path(self.path).expanduser()
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"dataset.path: cannot read {file} ({error})") from error
        texts = list(dict.fromkeys(line for line in lines if line.strip()))
        if len(texts) < self.held_out_every:
            raise UserError(
                f"dataset.path: {file} has {len(texts)} distinct prompts, fewer than "
                f"dataset.held_out_every={self.held_out_every}; lower that or add prompts"
            )
        held_out = split == "test"
        return [
            Example(f"{self.prefix}{text}{self.suffix}", None, None, {})
            for number, text in enumerate(texts, start=1)
            if is_held_out(number, self.held_out_every) == held_out
        ]
