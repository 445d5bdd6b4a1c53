"""Out-of-memory retry with half the batch; results do not depend on it."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from apa_cli.errors import UserError

T = TypeVar("T")


class OtherRankOutOfMemory(torch.OutOfMemoryError):
    """Another rank ran out of memory, so this rank repeats the work too."""


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the error is PyTorch's for a full device or full main memory."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


@dataclass
class BatchSizeHalver:
    """Batch size that is halved when memory runs out; the work is then repeated from its beginning."""

    key: str
    """Configuration key of the size, for messages."""
    size: int
    """Sequences per batch."""
    min_size: int
    """Smallest size, in sequences."""
    log: Callable[[str], None]

    def run(self, work: Callable[[int], T]) -> T:
        """Return `work(size)`. Raise UserError if memory runs out at the smallest size too."""
        while True:
            try:
                return work(self.size)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                if self.size <= self.min_size and not isinstance(error, OtherRankOutOfMemory):
                    raise self.make_error() from error
            gc.collect()  # the traceback's frames, which form reference cycles, hold the attempt's tensors
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if self.size > self.min_size:
                self.size = max(self.min_size, self.size // 2)
                self.log(f"{self.key}: out of memory; reduced to {self.size}, which changes no result")

    def make_error(self) -> UserError:
        """Return the error for memory that runs out at the smallest size."""
        return UserError(f"{self.key}: out of memory with {self.size}; set a smaller value and continue with resume=")
