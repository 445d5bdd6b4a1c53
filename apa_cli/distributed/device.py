"""Selection of the GPU that a process computes on."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from apa_cli.distributed.world import World
from apa_cli.errors import UserError
from apa_cli.settings import Device, LaunchSettings

GPU_LOCKS: dict[int, FileLock] = {}
"""Lock of each GPU that this process has claimed, held until the process ends; the jobs of a sweep share the GPU."""


def should_use_gpu(settings: LaunchSettings) -> bool:
    """Return True if processes compute on GPUs. Raise UserError if `launch.device=cuda` and there is no GPU."""
    if settings.device is Device.cuda and not torch.cuda.is_available():
        raise UserError("launch.device: cuda is set, but PyTorch sees no GPU; use auto or cpu")
    return settings.device is not Device.cpu and torch.cuda.is_available()


def claim_gpu(settings: LaunchSettings, world: World) -> int:
    """Return the index of this process's GPU.

    With several processes the index is the local rank. A run in one process claims the first GPU that no other such
    run on this machine has locked, or GPU 0 if all are locked.
    """
    if world.size > 1 or settings.processes != 1:
        return world.local_rank
    if GPU_LOCKS:
        return next(iter(GPU_LOCKS))
    for index in range(torch.cuda.device_count()):
        lock = FileLock(Path(tempfile.gettempdir()) / f"apa-cli-gpu-{index}.lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            continue
        GPU_LOCKS[index] = lock
        return index
    return 0
