"""How the C library's allocator treats large blocks, on Linux with glibc; elsewhere nothing is changed."""

from __future__ import annotations

import ctypes
import os

M_TRIM_THRESHOLD = -1
M_MMAP_MAX = -4
"""Names and numbers of /usr/include/malloc.h."""
LARGEST = 2**31 - 1
"""The largest number that mallopt takes, here of bytes."""


def keep_freed_blocks() -> bool:
    """Freed blocks stay with the process. True where this could be said, and MALLOC_* variables say nothing else.

    By default a tensor of more than 32 MiB is a mapping of its own, which the kernel clears page by page each time
    that one is made: a fifth of a training run on a CPU.
    """
    library = glibc()
    if library is None or any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ):
        return False
    return bool(library.mallopt(M_MMAP_MAX, 0)) and bool(library.mallopt(M_TRIM_THRESHOLD, LARGEST))


def give_back_freed_blocks() -> None:
    """Freed blocks go back to the system, so that what the process holds is what it uses."""
    library = glibc()
    if library is not None:
        library.malloc_trim(0)


def glibc() -> ctypes.CDLL | None:
    library = ctypes.CDLL(None) if os.name == "posix" else None
    return library if hasattr(library, "gnu_get_libc_version") else None
