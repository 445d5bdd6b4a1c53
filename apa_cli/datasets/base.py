"""The contract of a data set, and the order in which a run goes through its prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

from apa_cli.randomness import Stream, make_generator, sample_permutation
from apa_cli.types import Example


class PromptStyle(Enum):
    """Rendering of a prompt as the text that the model reads.

    auto: rows with `messages` through the tokenizer's chat template if there is one, all others as plain text; hh:
    always plain text, dialogues in HH's format; chat: always the template, a plain prompt as a single user message.
    """

    auto = "auto"
    hh = "hh"
    chat = "chat"


class Dataset(ABC):
    """A data set: a frozen dataclass whose fields are its settings."""

    stop_strings: list[str]
    """Strings that end a response to a prompt of this data set."""

    @abstractmethod
    def load(self, split: str) -> list[Example]:
        """Return the rows of "train" or "test", the same at every call. Raise UserError if they cannot be read.

        Unusable rows are left out, and counted if the returned list is a `types.Examples`. The caller removes prompts
        that are in both splits from "train".
        """

    @property
    def prompt_style(self) -> PromptStyle:
        """Prompt style that the user chose, in data sets with the key `format`; else auto."""
        return PromptStyle.auto

    def describe(self, prompts: list[str], responses: list[str]) -> dict[str, float]:
        """Return further metrics of responses to prompts of this data set, logged as eval/NAME; default: none."""
        return {}


def make_prompt_key(prompt: str) -> str:
    """Return the text by which prompts count as the same one: they may differ in white space only."""
    return " ".join(prompt.split())


def is_held_out(number: int, every: int) -> bool:
    """Return True if the `number`-th distinct prompt of a file, counted from 1, is held out: one in each `every`.

    The position within each group of `every` prompts is random, so that a file with a periodic order is split evenly.
    """
    group, index = divmod(number - 1, every)
    return index == int(make_generator(0, Stream.held_out, group).integers(every))


def shuffle_rows(start: int, count: int, size: int, seed: int) -> list[int]:
    """Return the row indices at positions start … start + count − 1 of endless shuffled epochs over `size` rows.

    The order of each epoch is keyed by (seed, epoch), so any range can be computed without the ones before it.
    """
    rows: list[int] = []
    while count > 0:
        epoch, offset = divmod(start, size)
        order = sample_permutation(size, seed, Stream.data_order, epoch)
        chunk = order[offset : offset + count]
        rows += chunk.tolist()
        start, count = start + len(chunk), count - len(chunk)
    return rows
