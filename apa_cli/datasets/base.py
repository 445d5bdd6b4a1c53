"""The contract of a data set, and the order in which a run goes through its prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum

from apa_cli.randomness import Stream, generator, permutation
from apa_cli.types import Example


class PromptForm(Enum):
    """How a prompt becomes the text that the model reads.

    auto: rows with `messages` by the tokenizer's chat template where it has one, else as plain text; hh: always as
    plain text, dialogues in the form of HH; chat: always by the template, a plain prompt being one user message.
    """

    auto = "auto"
    hh = "hh"
    chat = "chat"


class Dataset(ABC):
    """A data set is a frozen dataclass of its settings. Among its fields is `stop_strings`, a list of the
    texts that end a reply in this form of dialogue."""

    @abstractmethod
    def load(self, split: str) -> list[Example]:
        """The rows of "train" or "test", the same at every call. UserError if unreadable.

        Rows that cannot be used are left out and counted by returning `types.Examples`; any list will do. Prompts
        that are in both splits are taken out of "train" by the caller.
        """

    @property
    def prompt_form(self) -> PromptForm:
        """What the user chose, where the data set has the key `format`."""
        return PromptForm.auto

    def describe(self, prompts: list[str], responses: list[str]) -> dict[str, float]:
        """Further numbers about replies to prompts of this data set, logged as eval/NAME; default: none."""
        return {}


def is_held_out(number: int, every: int) -> bool:
    """Whether the `number`-th of a file's distinct prompts (counted from 1) is held out: one in each `every`.

    Which one is drawn by key, so that what comes in turns in a file does not end up on one side.
    """
    stretch, place = divmod(number - 1, every)
    return place == int(generator(0, Stream.held_out, stretch).integers(every))


def positions(start: int, count: int, size: int, seed: int) -> list[int]:
    """Rows number `start` … `start + count − 1` of an endless pass over a data set of `size` rows.

    Each pass has an order of its own, keyed by (seed, pass), so any stretch can be had without the ones before.
    """
    rows = []
    while count > 0:
        number, offset = divmod(start, size)
        order = permutation(size, seed, Stream.data_order, number)
        taken = order[offset : offset + count]
        rows += taken.tolist()
        start, count = start + len(taken), count - len(taken)
    return rows
