"""One process among all processes of a run: its rank, the world size and the collectives.

Collectives exchange small Python objects over gloo on the CPU; gradients and weights use the default process group
(NCCL between GPUs). With one process, `torch.distributed` is neither imported nor called.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

from apa_cli.errors import UserError, find_details, get_first_line

T = TypeVar("T")
WEEK = 7 * 86400.0
"""Seconds."""


class RankLost(UserError):
    """Another rank is gone; the rank with the cause prints the cause."""


class RankTimeout(RankLost):
    """Another rank did not reach a barrier in time; no rank prints a cause."""


class OtherRankFailed(Exception):
    """Another rank failed before a collective step that needs all ranks."""


@dataclass(frozen=True)
class World:
    """This process among all processes of a run; every rank calls the same methods in the same order."""

    rank: int
    """0 to size − 1. Only rank 0, the main process, writes files, logs and plots."""
    size: int
    """Number of processes."""
    local_rank: int
    """Rank among the processes of this machine, which is the index of the process's GPU."""
    group: Any
    """The gloo process group of all ranks; None with one process."""
    timeout: float
    """Seconds after which a rank that does not respond ends the run."""

    @property
    def is_main(self) -> bool:
        """True on rank 0."""
        return self.rank == 0

    def shard_indices(self, count: int) -> list[int]:
        """Return this rank's contiguous shard of the indices 0 to count − 1.

        Shards have equal length; the last index is repeated to fill them. The shards of all ranks, concatenated by rank
        and cut to `count`, are the indices in order.
        """
        shard_size = -(-count // self.size)
        start = self.rank * shard_size
        return [min(i, count - 1) for i in range(start, start + shard_size)]

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, by rank, on every rank. Raise RankLost if a rank is gone or unresponsive."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.barrier()
        values: list[Any] = [None] * self.size
        with translate_errors():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def run_on_all_ranks(self, work: Callable[[], T]) -> T:
        """Run `work` on every rank and return this rank's result. Raise UserError on every rank if it fails on one."""
        if self.size == 1:
            return work()
        value: Any = None
        failure: UserError | None = None
        try:
            value = work()
        except OtherRankFailed as error:
            raise UserError(str(error)) from error
        except UserError as error:
            failure = error
        report = None if failure is None else (str(failure), find_details(failure))
        for rank, failed in enumerate(self.all_gather(report)):
            if failed is not None:
                reported = UserError(f"rank {rank}: {failed[0]}")
                reported.details = failed[1]  # rank 0 alone writes run.log
                raise reported from failure
        return value

    def check_all_ranks(self) -> None:
        """Raise OtherRankFailed if another rank has failed.

        Call this inside `run_on_all_ranks`, before a step in which all ranks must take part. Its all-gather pairs with
        the all-gather in which a failed rank reports its error.
        """
        for rank, failed in enumerate(self.all_gather(None)):
            if failed is not None:
                raise OtherRankFailed(f"rank {rank}: {failed[0]}")

    def barrier(self, timeout: float | None = None) -> None:
        """Wait for all ranks, at most `timeout` seconds (None: `self.timeout`).

        Raise RankTimeout naming the ranks that did not arrive in time, RankLost if the connection to a rank broke.
        """
        if self.size == 1:
            return
        import torch.distributed as dist

        seconds = self.timeout if timeout is None else timeout
        try:
            dist.monitored_barrier(self.group, timedelta(seconds=seconds), wait_all_ranks=True)
        except RuntimeError as error:
            if missing := re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)):
                raise RankTimeout(
                    f"launch.timeout: rank {missing[1]} did not respond within {seconds:g} s; the run ends"
                ) from error
            raise RankLost(f"lost contact with another rank ({get_first_line(error)})") from error

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        """Run the block on rank 0 before it runs on the others, which wait up to a week."""
        if not self.is_main:
            self.barrier(WEEK)
        yield
        if self.is_main:
            self.barrier(WEEK)

    def any_rank(self, flag: bool) -> bool:
        """Return True on every rank if the flag is true on at least one."""
        return any(self.all_gather(flag))

    def broadcast_from_main(self, make: Callable[[], T]) -> T:
        """Run `make` on rank 0 alone and return its result on every rank.

        If `make` fails, rank 0 raises the error and the other ranks raise RankLost.
        """
        if self.size == 1:
            return make()
        value: Any = None
        failure: BaseException | None = None
        if self.is_main:
            try:
                value = make()
            except Exception as error:
                failure = error
        main_value, has_failed = self.all_gather((value, failure is not None))[0]
        if failure is not None:
            raise failure
        if has_failed:
            raise RankLost("rank 0 failed")
        return main_value


SINGLE_PROCESS = World(0, 1, 0, None, 0.0)
"""The world of a run in one process."""


@contextmanager
def translate_errors() -> Iterator[None]:
    """Raise RankLost for a RuntimeError of a collective in the block."""
    try:
        yield
    except RuntimeError as error:
        raise RankLost(f"lost contact with another rank ({get_first_line(error)})") from error
