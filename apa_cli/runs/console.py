"""Output of a run: messages, progress, tables and responses, on the screen and in run.log.

On a terminal the progress is one live bar with the latest figures under it. Anywhere else (a pipe, a batch
system's log) it is one aligned line per iteration, the same line that run.log always gets.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from apa_cli.errors import find_details
from apa_cli.runs.formatting import (
    format_duration,
    format_evaluation,
    format_iteration,
    format_responses,
    format_table,
    format_training_figures,
    strip_control_characters,
)
from apa_cli.runs.stopping import RunStopped
from apa_cli.secrets import redact_secrets

LOG_WIDTH = 100
"""Columns to which responses are wrapped if there is no terminal."""
MAX_WIDTH = 120
"""Columns to which responses are wrapped at most."""


class Console:
    """Screen and run.log of one run.

    `run_log` is the file to append to (None: no file), `iterations` the number of the last iteration. `live` turns the
    live display on or off (None: on if stdout is a terminal). `quiet` shows nothing on the screen (ranks other than 0)
    and still writes run.log if one is given. As a context manager the console closes itself.
    """

    def __init__(self, run_log: Path | None, iterations: int, live: bool | None = None, quiet: bool = False):
        self._file = open(run_log, "a", encoding="utf-8") if run_log else None  # noqa: SIM115
        self._iterations = iterations
        self._quiet = quiet
        self._start_time = time.monotonic()
        self._start_iteration: int | None = None
        self._last_evaluation = ""
        live = sys.stdout.isatty() if live is None else live
        self._live = _LiveDisplay(iterations) if live and not quiet else None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def say(self, text: str) -> None:
        """Show one message, of one or more lines."""
        self._show(text, sys.stdout)
        self._log(text)

    def warn(self, text: str) -> None:
        """Show one warning, on stderr unless the live display is on."""
        self._show(f"warning: {text}", sys.stderr, style="yellow")
        self._log(f"warning: {text}")

    def log_failure(self, error: BaseException) -> None:
        """Write an error that ends the run to run.log, with the traceback, which the screen does not get.

        A stop on request has no traceback.
        """
        self._log(f"ended by {type(error).__name__}: {error}")
        if not isinstance(error, RunStopped | KeyboardInterrupt):
            self._log(redact_secrets(find_details(error) or "".join(traceback.format_exception(error))))

    def show_iteration(self, metrics: dict[str, float]) -> None:
        """Show the figures of one iteration, named as in metrics.jsonl; missing figures are left out."""
        iteration = int(metrics["iteration"])
        seconds_left = self._estimate_seconds_left(iteration)
        line = format_iteration(metrics, self._iterations, seconds_left)
        self._log(line)
        if self._live is None:
            self._show(line, sys.stdout)
            return
        evaluation = format_evaluation(metrics)
        if evaluation:
            self._last_evaluation = evaluation
            self._show(line, sys.stdout)  # evaluations are few, so their lines stay above the bar
        self._live.update(iteration, seconds_left, "  ".join(format_training_figures(metrics)), self._last_evaluation)

    def show_samples(self, title: str, rows: list[dict[str, Any]]) -> None:
        """Show responses to the same prompts at different times, prompt by prompt; long texts are cut.

        `rows` are rows of samples.jsonl (iteration, prompt, response, score, kl, ending) from any iterations, such as
        the first and the last evaluation. A row may have a `label` instead of an iteration.
        """
        width = shutil.get_terminal_size((LOG_WIDTH, 24)).columns if self._live else LOG_WIDTH
        self.say("\n" + "\n".join([title, *format_responses(rows, min(width, MAX_WIDTH))]))

    def show_table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show a small table; columns that contain only numbers are aligned on the right."""
        self.say("\n" + "\n".join(([title] if title else []) + format_table(header, rows)))

    def close(self) -> None:
        """End the live display and close run.log. Nothing may be shown afterwards; a second call has no effect."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._file is not None:
            self._close_file()

    def _estimate_seconds_left(self, iteration: int) -> float | None:
        """Return the seconds to the last iteration at the rate so far; None until one iteration has been timed.

        Timing starts at the end of iteration 0 (the evaluation before training) if that is shown, else at the time when
        this console was created.
        """
        if self._start_iteration is None:
            self._start_iteration = max(iteration - 1, 0)
            if iteration == 0:
                self._start_time = time.monotonic()
        done = iteration - self._start_iteration
        if done <= 0:
            return None
        return (time.monotonic() - self._start_time) / done * max(self._iterations - iteration, 0)

    def _show(self, text: str, stream: TextIO, style: str | None = None) -> None:
        if self._quiet:
            return
        text = strip_control_characters(text)
        if self._live is not None:
            self._live.print(text, style)
            return
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:  # a terminal without Unicode must not end a run
            encoding = stream.encoding or "ascii"
            print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)
        except BrokenPipeError:  # the reader has closed the pipe; the run continues with run.log alone
            self._quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())

    def _log(self, text: str) -> None:
        if self._file is not None:
            try:
                self._file.write(strip_control_characters(text) + "\n")
                self._file.flush()
            except OSError as error:  # the run continues without run.log
                self._close_file()
                self._show(f"warning: run.log: cannot be written ({error.strerror})", sys.stderr, style="yellow")

    def _close_file(self) -> None:
        """Close run.log; text that a full disk did not take is dropped."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None


class _LiveDisplay:
    """A progress bar with a line of figures under it, at the bottom of a terminal."""

    def __init__(self, iterations: int):
        from rich.console import Group
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
        from rich.text import Text

        self._progress = Progress(
            TextColumn("iteration"), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("elapsed"),
            TimeElapsedColumn(), TextColumn("left {task.fields[left]}"), expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=iterations, left="?")
        self._figures = Text("waiting for the first iteration", style="dim", overflow="fold")
        self._live = Live(Group(self._progress, self._figures), refresh_per_second=4)
        self._live.start()

    def update(self, iteration: int, seconds_left: float | None, figures: str, evaluation: str) -> None:
        left = "?" if seconds_left is None else format_duration(seconds_left)
        self._progress.update(self._task, completed=iteration, left=left)
        self._figures.style = ""
        self._figures.plain = "   ".join(part for part in (figures, evaluation) if part)

    def print(self, text: str, style: str | None) -> None:
        from rich.text import Text

        self._live.console.print(Text(text, style=style or ""), soft_wrap=True)

    def stop(self) -> None:
        self._live.stop()
