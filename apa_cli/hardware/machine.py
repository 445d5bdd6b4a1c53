"""Measurements of the machine: rates of matrix products and of copies, free memory and peak memory."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from apa_cli.hardware.allocator import release_freed_blocks

MATRIX_SIZE = {"cpu": 1024, "cuda": 8192}
"""Rows and columns of the matrices multiplied by `measure_matrix_rate`, by device type."""
COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
"""Bytes copied at once by `measure_copy_rate`, by device type: more than the caches hold."""
MEASUREMENT_SECONDS = 0.2
"""Seconds for which a measurement is repeated."""
PROCESS_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def time_fastest(work: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of the fastest of several runs of `work`, after a warm-up run."""

    def time_once() -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    time_once()
    times: list[float] = []
    while sum(times) < MEASUREMENT_SECONDS:
        times.append(time_once())
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of two square matrices."""
    size = MATRIX_SIZE[device.type]
    first, second = (torch.full((size, size), 0.5, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / time_fastest(lambda: torch.mm(first, second), device)


@torch.no_grad()
def measure_copy_rate(device: torch.device) -> float:
    """Return the memory traffic of a copy in bytes per second, bytes read and bytes written both counted."""
    source = torch.ones(COPY_BYTES[device.type], device=device, dtype=torch.uint8)
    target = torch.zeros_like(source)
    return 2 * source.numel() / time_fastest(lambda: target.copy_(source), device)


def read_free_memory(device: torch.device) -> float:
    """Return the free memory in bytes: of the GPU, or of the machine for a CPU device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def reset_peak_memory(device: torch.device) -> None:
    """Restart the peak that `read_peak_memory` returns; without effect on a CPU unless the system is Linux."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    release_freed_blocks()
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return


def read_peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes since `reset_peak_memory`: allocated on the GPU, or resident for a CPU device."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        lines = dict(line.split(":", 1) for line in PROCESS_STATUS.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
