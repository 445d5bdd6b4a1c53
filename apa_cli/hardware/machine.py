"""What the machine can do, measured: the rate of matrix products, of copies; memory free and used."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from apa_cli.hardware.allocator import give_back_freed_blocks

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices that are multiplied."""
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Bytes that are copied at once: more than a cache holds."""
MEASURED_SECONDS = 0.2
"""For how long each of the two is repeated."""
KERNEL_STATUS = Path("/proc/self/status")
PEAK_RESET = Path("/proc/self/clear_refs")


def fastest(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of several runs of `work`, after one that is not counted."""

    def seconds() -> float:
        wait(device)
        begun = time.perf_counter()
        work()
        wait(device)
        return time.perf_counter() - begun

    seconds()
    times: list[float] = []
    while sum(times) < MEASURED_SECONDS:
        times.append(seconds())
    return min(times)


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a product of two square matrices."""
    size = MATRIX_SIZE[device.type]
    first, second = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / fastest(lambda: torch.mm(first, second), device)


@torch.no_grad()
def copy_rate(device: torch.device) -> float:
    """Bytes per second of a copy, those read and those written counted."""
    source = torch.ones(COPY_BYTES[device.type], device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * source.numel() / fastest(lambda: target.copy_(source), device)


def free_memory(device: torch.device) -> float:
    """Bytes that are free on the device, or for this process in the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reset_peak(device: torch.device) -> None:
    """From here on `peak_bytes` measures anew. Where a system cannot do that for a process it goes on as before."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    give_back_freed_blocks()
    try:
        PEAK_RESET.write_text("5")
    except OSError:
        return


def peak_bytes(device: torch.device) -> int:
    """The most that was allocated on the device, or held by this process, since `reset_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in KERNEL_STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
