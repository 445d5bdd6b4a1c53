"""Runs in a fork of the test's process, which saves the start-up, and their end at a chosen call."""

import contextlib
import itertools
import os
import signal
import sys
from collections.abc import Callable


def fork_silently(work: Callable[[], object]) -> int:
    """Run `work` in a fork of this process, without output, and return its process id.

    The fork ends with status 0 if `work` returns, and 1 if it raises.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    with contextlib.suppress(BaseException):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        work()
        status = 0
    os._exit(status)


def kill_at_call(owner: object, name: str, number: int, after: bool = True) -> None:
    """Let this process kill itself after, or instead of, the given call of a function or method, counted from 1."""
    original, calls = getattr(owner, name), itertools.count(1)

    def call(*arguments, **keywords):
        is_last = next(calls) == number
        if is_last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if is_last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, name, call)
