"""Early stop of a run, with its state saved: on a signal, or before a time limit."""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import Any

from apa_cli.errors import UserError

START_TIME = time.monotonic()
"""Start of the command, in seconds of the monotonic clock; this module is imported before torch."""

SECONDS_PER_UNIT = {"d": 86400, "h": 3600, "m": 60, "s": 1}
"""Unit of a duration → seconds, largest first."""
OUT_OF_TIME = 75
"""Exit status of a run that `stop_after` ended (EX_TEMPFAIL): not finished, start it again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as 90s, 45m, 3h50m or 1d. Raise ValueError for any other text."""
    match = re.fullmatch("".join(rf"(?:(\d+){unit})?" for unit in SECONDS_PER_UNIT), text.replace(" ", ""))
    if not match or not any(match.groups()):
        raise ValueError(f"{text!r} is not a time such as 90s, 45m, 3h50m or 1d")
    return sum(int(count or 0) * size for count, size in zip(match.groups(), SECONDS_PER_UNIT.values(), strict=True))


class RunStopped(UserError):
    """End of a run before its last iteration, on request, with its state saved. `status` is the exit status."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class RunInterrupted(KeyboardInterrupt):
    """Signal that arrived before there was anything to save. `status` is the exit status."""

    advice = ""
    """The command to give next; "": the same command again."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name} before there was anything to save")
        self.status = 128 + number


def format_command(command: str, overrides: Sequence[str] = ()) -> str:
    """Return the command line of this program for a shell, with further overrides at its end."""
    return shlex.join([command, *sys.argv[1:], *overrides])


def describe_interruption(command: str, error: KeyboardInterrupt) -> str:
    """Return the line for a signal before there was anything to save: the command line that starts again."""
    advice = getattr(error, "advice", "") or f"start again with: {format_command(command)}"
    return f"{error or 'stopped by SIGINT'}; {advice}"


class GracefulStop:
    """Context manager that handles SIGTERM and Ctrl-C, and the time limit `stop_after`.

    Before `listen` a signal ends the program at once, by raising `RunInterrupted`. After `listen` the first signal is
    only recorded, so that the training loop reads `reason` between two iterations; a second signal kills the process.
    """

    def __init__(self, stop_after: str | None = None):
        self.deadline = None if stop_after is None else START_TIME + parse_duration(stop_after)
        """End of the time limit, in seconds of the monotonic clock; None without a limit."""
        self.stop_after = stop_after
        self.signal_name: str | None = None
        """Name of the signal that asked the run to end; None without a signal."""
        self.listening = False
        self.longest_iteration = 0.0
        """Seconds, evaluation included."""
        self.longest_save: float | None = None
        """Seconds; None before the first checkpoint."""
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> GracefulStop:
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """Record signals from now on instead of ending the program, since there is a state to save."""
        self.listening = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.listening:
            raise RunInterrupted(number)
        self.signal_name = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        text = f"\n{self.signal_name}: finishing and saving the current step; a second signal ends the run at once\n"
        os.write(2, text.encode())  # not print: the signal may have interrupted one

    @property
    def is_out_of_time(self) -> bool:
        """True if another iteration as long as the longest so far, and a save, might end after the deadline.

        Before the first save, a save is assumed to take as long as an iteration.
        """
        save = self.longest_iteration if self.longest_save is None else self.longest_save
        return self.deadline is not None and time.monotonic() + self.longest_iteration + save > self.deadline

    @property
    def reason(self) -> str | None:
        """The reason to end the run now: a signal's name, or stop_after=…; None if there is none."""
        if self.signal_name is None and self.is_out_of_time:
            return f"stop_after={self.stop_after}"
        return self.signal_name

    @property
    def exit_status(self) -> int:
        """The exit status that goes with `reason`."""
        return OUT_OF_TIME if self.signal_name is None else 128 + signal.Signals[self.signal_name]
