"""Start, process group and termination of a run's processes.

A run's processes are started here (`spawn_processes`) or by torchrun, accelerate or SLURM (`run_under_launcher`). With
one process, neither is called.
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

from apa_cli.distributed.device import should_use_gpu
from apa_cli.distributed.world import RankLost, RankTimeout, World
from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.stopping import RunStopped, describe_interruption
from apa_cli.settings import LaunchSettings

REPORT_DELAY = 3.0
"""Seconds that a rank waits before printing an error, so that rank 0, or the rank with the cause, prints first."""
TERMINATION_GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL for the other processes after one has failed."""
START_TIMEOUT = 600.0
"""Seconds within which all spawned processes must have connected."""
POLL_INTERVAL = 0.2
"""Seconds between two checks of the spawned processes."""


@dataclass(frozen=True)
class RankInfo:
    """Rank, world size and local rank of this process as a launcher assigned them."""

    rank: int
    size: int
    local_rank: int


def detect_launcher() -> RankInfo | None:
    """Return the rank that torchrun, accelerate or SLURM assigned to this process; None if none of them started it.

    Under SLURM, MASTER_ADDR and MASTER_PORT are set too, as `torch.distributed` reads them.
    """
    env = os.environ
    if int(env.get("WORLD_SIZE", "1")) > 1 and "RANK" in env:
        return RankInfo(int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", "0")))
    if int(env.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in env:
        env["MASTER_ADDR"] = env.get("MASTER_ADDR") or resolve_first_host(env["SLURM_STEP_NODELIST"])
        # The job's number gives all of its processes the same port, and two jobs on a node different ones.
        env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
        return RankInfo(int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"]))
    return None


def resolve_first_host(nodelist: str) -> str:
    """Return the first host of a SLURM node list such as gpu[03-04,07]. Raise UserError if scontrol fails."""
    try:
        result = subprocess.run(["scontrol", "show", "hostnames", nodelist], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise UserError("launch: scontrol cannot list the hosts of this SLURM job; set MASTER_ADDR") from error
    return result.stdout.split()[0]


def count_processes(settings: LaunchSettings) -> int:
    """Return the number of processes to run on this machine: `launch.processes`, or one per visible GPU.

    Raise ConfigError if there are fewer GPUs than processes.
    """
    if settings.processes is not None:
        if should_use_gpu(settings) and settings.processes > torch.cuda.device_count():
            raise ConfigError(
                f"launch.processes: {settings.processes} is more than the {torch.cuda.device_count()} GPUs of this "
                "machine; lower it, or set launch.device=cpu"
            )
        return settings.processes
    return torch.cuda.device_count() if should_use_gpu(settings) else 1


# --- joining the process group ------------------------------------------------------------------------------


def run_under_launcher(settings: LaunchSettings, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(world, *arguments)` as the rank that a launcher assigned. Raise SystemExit if it fails."""
    info = detect_launcher()
    assert info is not None
    with report_errors(info.rank) as exit_status:
        if settings.processes not in (None, info.size):
            raise ConfigError(
                f"launch.processes: {settings.processes} is set, but {info.size} processes were started; leave it null"
            )
        world = join_world(settings, info.rank, info.size, info.local_rank, None)
        run_then_barrier(world, work, *arguments)
    if exit_status.code:
        sys.exit(exit_status.code)


def join_world(settings: LaunchSettings, rank: int, size: int, local_rank: int, port: int | None) -> World:
    """Connect to the other processes and return the world.

    `port` is that of the store on this machine (`spawn_processes`); None: the environment names the store.
    """
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if should_use_gpu(settings) else "gloo"
    timeout = timedelta(seconds=settings.timeout)
    if not dist.is_initialized():  # the jobs of a sweep share one process group
        if port is None:
            options: dict[str, Any] = {"init_method": "env://"}
        else:
            store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=timedelta(seconds=START_TIMEOUT))
            # Importing torch may take longer than launch.timeout, so START_TIMEOUT applies until all are connected.
            store.set(f"started {rank}", "")
            store.wait([f"started {number}" for number in range(size)])
            options = {"store": store}
        if should_use_gpu(settings):
            torch.cuda.set_device(local_rank)
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout, **options)
        atexit.register(leave_world)
    return World(rank, size, local_rank, dist.new_group(backend="gloo", timeout=timeout), settings.timeout)


def leave_world() -> None:
    """Destroy the process group, if there is one."""
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def run_then_barrier(world: World, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(world, *arguments)`, then wait until all ranks have finished or stopped."""
    try:
        work(world, *arguments)
    except RunStopped:
        world.barrier()
        raise
    world.barrier()


# --- spawning -----------------------------------------------------------------------------------------------


def spawn_processes(settings: LaunchSettings, count: int, work: Callable[..., None], *arguments: Any) -> None:
    """Run `work(world, *arguments)` in `count` new processes on this machine and wait for them.

    SIGTERM and SIGINT are forwarded, so that the processes save and end by themselves; a second signal kills them. If
    a process fails, the others are terminated and SystemExit with its status is raised. `work` and its arguments are
    pickled.
    """
    import torch.distributed as dist
    import torch.multiprocessing as multiprocessing

    store = dist.TCPStore("127.0.0.1", 0, count, is_master=True, wait_for_workers=False)
    context = multiprocessing.start_processes(
        run_child, (settings, count, store.port, work, arguments), nprocs=count, join=False, start_method="spawn"
    )
    with forward_signals(context.processes):
        try:
            while not context.join(timeout=POLL_INTERVAL, grace_period=TERMINATION_GRACE):
                pass
        except multiprocessing.ProcessExitedException as error:
            if error.exit_code < 0:
                print(
                    f"rank {error.error_index} was killed by {error.signal_name}; the run ends",
                    file=sys.stderr, flush=True,
                )  # fmt: skip
            raise SystemExit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code) from None


@contextmanager
def forward_signals(processes: list[Any]) -> Iterator[None]:
    """Forward SIGTERM and SIGINT to the processes; from the second signal on, kill them."""
    received = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received += 1
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number if received == 1 else signal.SIGKILL)

    previous = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_child(
    rank: int, settings: LaunchSettings, count: int, port: int, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    """Run `work` in one spawned process and exit.

    The process leaves the terminal's process group, so that its parent alone forwards Ctrl-C.
    """
    os.setpgid(0, 0)
    if settings.threads is None and not should_use_gpu(settings):
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // count))
    with report_errors(rank) as exit_status:
        world = join_world(settings, rank, count, rank, port)
        run_then_barrier(world, work, *arguments)
    sys.exit(exit_status.code)


# --- output and errors --------------------------------------------------------------------------------------


@dataclass
class ExitStatus:
    """Exit status of this process; 0 unless an error ended its work."""

    code: int = 0


@contextmanager
def report_errors(rank: int) -> Iterator[ExitStatus]:
    """Print the error that ends the block and set the exit status; an error that all ranks share is printed by rank 0.

    Errors go to the terminal, the stderr from before `redirect_output`.
    """
    exit_status, terminal = ExitStatus(), os.fdopen(os.dup(2), "w")
    try:
        yield exit_status
    except (RankTimeout, RunStopped) as error:
        print_to_terminal(terminal if rank == 0 else sys.stderr, f"apa-train: {error}")
        exit_status.code = error.status
    except RankLost as error:
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        time.sleep(REPORT_DELAY)
        exit_status.code = error.status
    except UserError as error:
        if rank > 0:
            time.sleep(REPORT_DELAY)
        print_to_terminal(terminal, f"apa-train: {error}")
        exit_status.code = error.status
    except KeyboardInterrupt as error:
        if rank == 0:
            print_to_terminal(terminal, f"apa-train: {describe_interruption('apa-train', error)}")
        exit_status.code = getattr(error, "status", 128 + signal.SIGINT)
    except Exception:
        print_to_terminal(terminal, f"rank {rank}:\n{traceback.format_exc()}")
        exit_status.code = 1


def print_to_terminal(terminal: TextIO, text: str) -> None:
    """Print `text` to the terminal and, if stderr is redirected to this rank's log, to the log too."""
    print(text, file=terminal, flush=True)
    if os.fstat(terminal.fileno()).st_ino != os.fstat(2).st_ino:
        print(text, file=sys.stderr, flush=True)


def redirect_output(world: World, folder: Path) -> None:
    """Redirect stdout and stderr of ranks other than 0 to `folder`/rank_N.log."""
    if world.is_main:
        return
    folder.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    with (folder / f"rank_{world.rank}.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
