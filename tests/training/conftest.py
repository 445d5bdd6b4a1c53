"""Several ranks of one run as threads of this process."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from apa_cli.distributed.world import World

TIMEOUT = 60.0
"""Seconds that a rank waits for the others."""


@dataclass
class Meeting:
    """What the threads share: the values of a collective by rank, and the lock of the thread that computes."""

    barrier: threading.Barrier
    values: list[Any]
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(frozen=True)
class ThreadWorld(World):
    """A rank in a thread. One thread computes at a time, so that ranks can share models; collectives wait for all."""

    def all_gather(self, value: Any) -> list[Any]:
        self.group.values[self.rank] = value
        self.barrier()
        values = list(self.group.values)
        self.barrier()
        return values

    def barrier(self, timeout: float | None = None) -> None:
        self.group.lock.release()
        try:
            self.group.barrier.wait(TIMEOUT)
        finally:
            self.group.lock.acquire()


@pytest.fixture
def run_on_ranks():
    """run_on_ranks(size, work) → the results of work(world) on each of `size` ranks, by rank."""

    def run(size: int, work) -> list:
        meeting = Meeting(threading.Barrier(size), [None] * size)

        def run_rank(rank: int):
            with meeting.lock:
                try:
                    return work(ThreadWorld(rank, size, rank, meeting, TIMEOUT))
                except BaseException:
                    meeting.barrier.abort()
                    raise

        with ThreadPoolExecutor(size) as pool:
            futures = [pool.submit(run_rank, rank) for rank in range(size)]
        errors = [error for future in futures if (error := future.exception()) is not None]
        for error in errors:
            if not isinstance(error, threading.BrokenBarrierError):  # which the other ranks raise
                raise error
        return [future.result() for future in futures]

    return run
