"""Several processes: which of them this one is, what they tell one another, how they are started and how they end.

`torch.distributed` does the work. Everything that is gathered is small and goes over gloo on the CPU; gradients and
weights take the default group (NCCL between GPUs). With one process nothing of this is loaded or called.
"""

from __future__ import annotations

import atexit
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TextIO, TypeVar

import torch
from filelock import FileLock, Timeout

from apa_cli.settings import Device, LaunchSettings
from apa_cli.stopping import Stopped
from apa_cli.types import ConfigError, UserError

T = TypeVar("T")

PAUSE = 3.0
"""Seconds that other processes wait before they say what ended them: the main one, or the one with the cause, is to
be heard first."""
GRACE = 1.0
"""Seconds that the others have to end after one process failed; then they are killed."""
START = 600.0
"""Seconds that processes have to start."""
WEEK = 7 * 86400.0
"""Seconds."""
POLL = 0.2
"""Seconds between two looks at the processes that were started."""


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


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


# --- which processes there are ------------------------------------------------------------------------------


def use_gpu(settings: LaunchSettings) -> bool:
    """Whether to compute on GPUs. UserError where they were asked for and there are none."""
    if settings.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("launch.device: cuda was asked for, and PyTorch sees no GPU")
    return settings.device is not Device.cpu and torch.cuda.is_available()


def given() -> dict[str, str] | None:
    """The place in a world that torchrun, accelerate or SLURM has started, as torch's environment variables name it."""
    found = os.environ
    if int(found.get("WORLD_SIZE", "1")) > 1 and "RANK" in found:
        return {name: found[name] for name in ("RANK", "WORLD_SIZE")} | {"LOCAL_RANK": found.get("LOCAL_RANK", "0")}
    if int(found.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in found:
        host = found.get("MASTER_ADDR") or first_host(found["SLURM_STEP_NODELIST"])
        os.environ["MASTER_ADDR"] = host
        os.environ.setdefault("MASTER_PORT", str(20000 + int(found["SLURM_JOB_ID"]) % 20000))
        return {
            "RANK": found["SLURM_PROCID"],
            "WORLD_SIZE": found["SLURM_NTASKS"],
            "LOCAL_RANK": found["SLURM_LOCALID"],
        }
    return None


def first_host(hosts: str) -> str:
    """The first of a SLURM list of hosts such as gpu[03-04,07]. UserError where SLURM cannot say."""
    try:
        done = subprocess.run(["scontrol", "show", "hostnames", hosts], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("launch: scontrol does not tell the hosts of this SLURM job; set MASTER_ADDR") from error
    return done.stdout.split()[0]


def wanted(settings: LaunchSettings) -> int:
    """How many processes this one has to start: `launch.processes`, or one for each GPU that it sees."""
    if settings.processes is not None:
        if use_gpu(settings) and settings.processes > torch.cuda.device_count():
            raise ConfigError(
                f"launch.processes: {settings.processes} is more than the {torch.cuda.device_count()} GPUs here"
            )
        return settings.processes
    return torch.cuda.device_count() if use_gpu(settings) else 1


def take_part(settings: LaunchSettings, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(world, *arguments)` in the world that another program has started. SystemExit where it fails."""
    place = given()
    assert place is not None
    rank, size = int(place["RANK"]), int(place["WORLD_SIZE"])
    with ending(rank) as end:
        if settings.processes not in (None, size):
            raise ConfigError(f"launch.processes: {settings.processes} were asked for, {size} were started")
        world = join(settings, rank, size, int(place["LOCAL_RANK"]), None)
        worked(world, work, *arguments)
    if end.status:
        sys.exit(end.status)


def join(settings: LaunchSettings, rank: int, size: int, local_rank: int, port: int | None) -> World:
    """Meets the other processes: at `port` of this machine, or where the environment says."""
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if use_gpu(settings) else "gloo"
    timeout = timedelta(seconds=settings.timeout)
    if not dist.is_initialized():  # the jobs of a sweep share one world
        if port is None:
            options: dict[str, Any] = {"init_method": "env://"}
        else:
            store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timedelta(seconds=START))
            store.set(f"started {rank}", "")
            store.wait([f"started {number}" for number in range(size)])  # importing takes its time
            options = {"store": store}
        if use_gpu(settings):
            torch.cuda.set_device(local_rank)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, **options)
        atexit.register(leave)
    return World(rank, size, local_rank, dist.new_group(backend="gloo", timeout=timeout), settings.timeout)


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


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


# --- starting them ------------------------------------------------------------------------------------------


def started(settings: LaunchSettings, count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Runs `work(world, *arguments)` in `count` new processes on this machine and waits for them.

    SIGTERM and SIGINT are handed on, so that the processes can save and end by themselves; a second one ends them.
    The first process that fails ends all; SystemExit with its status. `work` and its arguments are pickled.
    """
    import torch.distributed as dist
    import torch.multiprocessing as multiprocessing

    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    context = multiprocessing.start_processes(
        begun, (settings, count, store.port, work, arguments), nprocs=count, join=False, start_method="spawn"
    )
    with handing_on(context.processes):
        try:
            while not context.join(timeout=POLL, grace_period=GRACE):
                pass
        except multiprocessing.ProcessExitedException as error:
            if error.exit_code < 0:
                print(
                    f"process {error.error_index} was killed by {error.signal_name}; the run ends",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            raise SystemExit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code) from None


@contextmanager
def handing_on(processes: list[Any]) -> Iterator[None]:
    """SIGTERM and SIGINT go to the processes; the second of them kills."""
    received = 0

    def hand_on(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number if received == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def begun(
    rank: int, settings: LaunchSettings, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """One started process. It leaves the terminal's group: the keys pressed there are handed on by its parent."""
    os.setpgid(0, 0)
    if settings.threads is None and not use_gpu(settings):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
    with ending(rank) as end:
        world = join(settings, rank, count, rank, port)
        worked(world, work, *arguments)
    sys.exit(end.status)


def worked(world: World, work: Callable[..., None], *arguments: Any) -> None:
    """`work(world, *arguments)`; none leaves before all have finished, or have stopped."""
    try:
        work(world, *arguments)
    except Stopped:
        world.meet(world.timeout)
        raise
    world.meet(world.timeout)


@dataclass
class End:
    status: int = 0


@contextmanager
def ending(rank: int) -> Iterator[End]:
    """Says on the screen what ends this process, unless another has said it; `status` is its exit status then."""
    end, screen = End(), os.fdopen(os.dup(2), "w")
    try:
        yield end
    except Silent as error:
        show(screen if rank == 0 else sys.stderr, f"apa-train: {error}")
        end.status = error.status
    except ContactLost as error:
        print(f"process {rank}: {error}", file=sys.stderr, flush=True)
        time.sleep(PAUSE)
        end.status = error.status
    except Stopped as error:
        show(screen if rank == 0 else sys.stderr, f"apa-train: {error}")
        end.status = error.status
    except UserError as error:
        if rank > 0:
            time.sleep(PAUSE)  # what all know the main process says
        show(screen, f"apa-train: {error}")
        end.status = error.status
    except KeyboardInterrupt as error:
        end.status = getattr(error, "status", 128 + signal.SIGINT)
    except Exception:
        show(screen, f"process {rank}:\n{traceback.format_exc()}")
        end.status = 1


def show(screen: TextIO, text: str) -> None:
    """On the screen and, where stderr goes to this process's own log, there too."""
    print(text, file=screen, flush=True)
    if os.fstat(screen.fileno()).st_ino != os.fstat(2).st_ino:
        print(text, file=sys.stderr, flush=True)


def keep_log(world: World, folder: Path) -> None:
    """What processes other than the main one print goes to `folder`/rank_N.log from here on."""
    if world.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with (folder / f"rank_{world.rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
