"""What a run does where memory runs out: the same work in smaller batches, on which no result depends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from apa_cli.errors import UserError

T = TypeVar("T")


class OutOfMemoryElsewhere(torch.OutOfMemoryError):
    """Another process has run out of memory, and this one does the work again with it."""


def out_of_memory(error: BaseException) -> bool:
    """Whether it is PyTorch's word that a device, or main memory, is full."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@dataclass
class Halving:
    """A batch size that is halved where memory runs out; the work is then done again from its beginning."""

    key: str
    """The key that holds the size."""
    size: int
    smallest: int
    """Where halving ends."""
    say: Callable[[str], None]

    def run(self, work: Callable[[int], T]) -> T:
        """`work(size)`. UserError where memory runs out at the smallest size too."""
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if self.size <= self.smallest and not isinstance(error, OutOfMemoryElsewhere):
                    raise self.exhausted() from error
            gc.collect()  # what the attempt held may be held by its traceback
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.size > self.smallest:
                self.size = max(self.smallest, self.size // 2)
                self.say(f"out of memory: {self.key} is {self.size} from here on, which changes no result")

    def exhausted(self) -> UserError:
        return UserError(
            f"{self.key}: out of memory with {self.size}; give a smaller one, and resume= where it stopped"
        )
