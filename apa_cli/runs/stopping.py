"""Ending a run early and in order: signals, and the time that a queue allows."""

from __future__ import annotations

import os
import re
import signal
import time
from types import FrameType

from apa_cli.errors import UserError

STARTED = time.monotonic()
"""When the command began: this module is imported before anything heavy."""

UNITS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
OUT_OF_TIME = 75
"""Exit status of a run that `stop_after` ended (EX_TEMPFAIL): not finished, to be run again."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def seconds(text: str) -> float:
    """The seconds of a time such as 90s, 45m, 3h50m or 1d. ValueError for anything else."""
    found = re.fullmatch("".join(rf"(?:(\d+){unit})?" for unit in UNITS), text.replace(" ", ""))
    if not found or not any(found.groups()):
        raise ValueError(f"{text!r} is not a time such as 90s, 45m, 3h50m or 1d")
    return sum(int(part or 0) * size for part, size in zip(found.groups(), UNITS.values(), strict=True))


class Stopped(UserError):
    """A run that ended before its last iteration because it was asked to; its state is saved."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


class Interrupted(KeyboardInterrupt):
    """A signal that arrived while there was nothing to finish and to save."""

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name} before there was anything to save")
        self.status = 128 + number


class Stopping:
    """Listens for SIGTERM and Ctrl-C while it is entered, and knows when `stop_after` seconds will have passed.

    Before `listen` a signal ends the program at once, by `Interrupted`. After it the first is kept in `requested`,
    for the training loop to ask `reason` between two iterations, and a second one kills.
    """

    def __init__(self, stop_after: str | None = None):
        self.deadline = None if stop_after is None else STARTED + seconds(stop_after)
        self.stop_after = stop_after
        self.requested: str | None = None
        """The name of the signal that asked the run to end."""
        self.listening = False
        self.longest_iteration = 0.0
        """Seconds, evaluation included."""
        self.longest_save: float | None = None
        """Seconds; None before the first."""
        self._before: dict[int, object] = {}

    def __enter__(self) -> Stopping:
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def listen(self) -> None:
        """From here on there is something to save."""
        self.listening = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.listening:
            raise Interrupted(number)
        self.requested = signal.Signals(number).name
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        text = f"\n{self.requested}: the step will be finished and saved first; a second signal stops at once\n"
        os.write(2, text.encode())  # print may be what was interrupted

    @property
    def out_of_time(self) -> bool:
        """Whether one more iteration, as long as the longest so far, and saving might end after the deadline.

        Before anything was saved, saving is taken to last as long as an iteration.
        """
        save = self.longest_iteration if self.longest_save is None else self.longest_save
        return self.deadline is not None and time.monotonic() + self.longest_iteration + save > self.deadline

    def reason(self) -> str | None:
        """Why the run is to end now: the signal's name, or stop_after=…; None where it may go on."""
        if self.requested is None and self.out_of_time:
            return f"stop_after={self.stop_after}"
        return self.requested

    def status(self) -> int:
        """The exit status that goes with `reason`."""
        return OUT_OF_TIME if self.requested is None else 128 + signal.Signals[self.requested]
