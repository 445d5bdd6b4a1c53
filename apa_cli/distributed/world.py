"""This process among all of a run, and what the processes exchange."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout

from apa_cli.errors import UserError, first_line
from apa_cli.settings import Device, LaunchSettings

T = TypeVar("T")
WEEK = 7 * 86400.0
"""Seconds."""


class ContactLost(UserError):
    """Another process is gone. Where it has said why, this need not be shown."""


class Silent(ContactLost):
    """Another process does not answer, and nobody else says so."""


class FailedElsewhere(Exception):
    """What another process could not do, so that what all do together cannot be done."""


@dataclass(frozen=True)
class World:
    """This process among all of a run; every process calls the same methods in the same order."""

    rank: int
    """From 0; process 0, the main one, alone writes, logs and draws."""
    size: int
    local_rank: int
    """The rank on this machine, which is the number of its GPU."""
    group: Any
    """The gloo group of all processes; None with one process."""
    timeout: float
    """Seconds after which a process that does not answer ends the run."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, count: int) -> list[int]:
        """Which of `count` things are this process's: as many for each, the last thing repeated to fill up.

        Results of all shares one after the other, cut to `count`, are in order.
        """
        each = -(-count // self.size)
        return [min(i, count - 1) for i in range(self.rank * each, (self.rank + 1) * each)]

    def gather(self, value: T) -> list[T]:
        """The value of each process, by rank, on every process. ContactLost where one is gone or silent."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        self.meet(self.timeout)
        values: list[Any] = [None] * self.size
        with told():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def together(self, work: Callable[[], T]) -> T:
        """`work()` of this process. UserError on every process where it fails on one."""
        if self.size == 1:
            return work()
        value, error = None, None
        try:
            value = work()
        except FailedElsewhere as told_before:
            raise UserError(str(told_before)) from told_before
        except UserError as found:
            error = found
        for rank, text in enumerate(self.gather(None if error is None else str(error))):
            if text is not None:
                raise UserError(f"process {rank}: {text}") from error
        return value

    def ready(self) -> None:
        """Before a step amid `together` that all processes take alike: FailedElsewhere where one has failed."""
        for rank, text in enumerate(self.gather(None)):
            if text is not None:
                raise FailedElsewhere(f"process {rank}: {text}")

    def meet(self, timeout: float) -> None:
        """Waits for all processes, at most `timeout` seconds. Silent naming those that did not come in time."""
        if self.size == 1:
            return
        import torch.distributed as dist

        try:
            dist.monitored_barrier(self.group, timedelta(seconds=timeout), wait_all_ranks=True)
        except RuntimeError as error:
            if silent := re.search(r"Ranks? ([\d, ]+) failed to pass", str(error)):
                raise Silent(
                    f"process {silent[1]} did not answer within {timeout:g} s (launch.timeout); the run ends"
                ) from error
            raise ContactLost(f"lost contact with another process ({first_line(error)})") from error

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block runs in process 0 before it runs in the others, however long that takes."""
        if not self.is_main:
            self.meet(WEEK)
        yield
        if self.is_main:
            self.meet(WEEK)

    def any(self, flag: bool) -> bool:
        """Whether it is true on any process."""
        return any(self.gather(flag))

    def from_main(self, make: Callable[[], T]) -> T:
        """What process 0 makes, told to all. Where that fails its error is raised there, ContactLost elsewhere."""
        if self.size == 1:
            return make()
        made: tuple[Any, BaseException | None] = (None, None)
        if self.is_main:
            try:
                made = (make(), None)
            except Exception as error:
                made = (None, error)
        value, failed = self.gather((made[0], made[1] is not None))[0]
        if made[1] is not None:
            raise made[1]
        if failed:
            raise ContactLost("process 0 could not go on")
        return value


ALONE = World(0, 1, 0, None, 0.0)
"""The only process of a run."""


@contextmanager
def told() -> Iterator[None]:
    """An exchange with other processes; what goes wrong in it is ContactLost."""
    try:
        yield
    except RuntimeError as error:
        raise ContactLost(f"lost contact with another process ({first_line(error)})") from error


# --- which processes there are ------------------------------------------------------------------------------


def use_gpu(settings: LaunchSettings) -> bool:
    """Whether to compute on GPUs. UserError where they were asked for and there are none."""
    if settings.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("launch.device: cuda was asked for, and PyTorch sees no GPU")
    return settings.device is not Device.cpu and torch.cuda.is_available()


def gpu(settings: LaunchSettings, world: World) -> int:
    """The number of this process's GPU: its local rank, or for a run in one process the first that no other such run
    on this machine has; 0 where all are taken."""
    if world.size > 1 or settings.processes != 1:
        return world.local_rank
    if HELD:
        return next(iter(HELD))
    for number in range(torch.cuda.device_count()):
        lock = FileLock(Path(tempfile.gettempdir()) / f"apa-cli-gpu-{number}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        HELD[number] = lock
        return number
    return 0


HELD: dict[int, FileLock] = {}
"""The GPUs that this process keeps to its end: the jobs that it runs of a sweep share them."""
