"""Allocator: freed blocks are reused, unless environment variables set glibc's allocator."""

import os
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import resource
from apa_cli.hardware.allocator import keep_freed_blocks

def count_faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = b"x" * 2**26
    del block
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def count_faults_after_free():
    return count_faults() and count_faults()

print(count_faults_after_free(), keep_freed_blocks(), count_faults_after_free())
"""
"""Prints the page faults of a block of 64 MiB after one of that size was freed, before and after the call."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
@pytest.mark.parametrize("variable", [{}, {"MALLOC_ARENA_MAX": "1"}])
def test_a_freed_block_is_reused_unless_the_environment_sets_the_allocator(variable):
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment | variable, capture_output=True, text=True, check=True
    )
    before, accepted, after = result.stdout.split()
    # 64 MiB are 16,384 pages of 4 KiB; fewer if the kernel uses larger pages
    assert int(before) > 20
    assert accepted == str(not variable)
    assert (int(after) < 20) == (not variable)
