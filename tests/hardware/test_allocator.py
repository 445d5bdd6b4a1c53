"""Large blocks are not cleared anew by the kernel, unless the environment says otherwise."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from apa_cli.hardware.allocator import keep_freed_blocks

def pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 2**26
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def new_pages():
    return pages() and pages()

print(new_pages(), keep_freed_blocks(), new_pages())
"""
"""Prints the pages that the kernel made for a block of 64 MiB where one of that size has just been freed."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@pytest.mark.parametrize("variable", [{}, {"MALLOC_ARENA_MAX": "1"}])
def test_a_freed_block_is_used_again(variable):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | variable, capture_output=True, text=True, check=True
    )
    before, done, after = result.stdout.split()
    # 64 MiB are 16,384 pages of 4 KiB; fewer where the kernel makes larger ones
    assert int(before) > 20
    assert done == str(not variable)
    assert (int(after) < 20) == (not variable)
