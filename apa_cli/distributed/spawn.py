"""Several processes: which of them this one is, what they tell one another, how they are started and how they end.

`torch.distributed` does the work. Everything that is gathered is small and goes over gloo on the CPU; gradients and
weights take the default group (NCCL between GPUs). With one process nothing of this is loaded or called.
"""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from apa_cli.distributed.world import ContactLost, Silent, World, use_gpu
from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.stopping import Stopped
from apa_cli.settings import LaunchSettings

PAUSE = 3.0
"""Seconds that other processes wait before they say what ended them: the main one, or the one with the cause, is to
be heard first."""
GRACE = 1.0
"""Seconds that the others have to end after one process failed; then they are killed."""
START = 600.0
"""Seconds that processes have to start."""
POLL = 0.2
"""Seconds between two looks at the processes that were started."""


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
