"""What a run shows: messages, its progress, tables, replies side by side; all of it also in run.log.

On a terminal the progress is one live bar with the latest figures under it. Anywhere else (a pipe, a batch
system's log) it is one aligned line per iteration, the same line that run.log always gets.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

FIGURES = (
    ("reward", "reward/mean", "{:7.3f}"),
    ("KL", "kl/sequence", "{:7.3f}"),
    ("entropy", "policy/entropy", "{:6.3f}"),
    ("length", "response/length", "{:6.1f}"),
    ("samples/s", "throughput/samples_per_s", "{:7.1f}"),
)
"""The figures of an iteration line: label, metric, format. KL in nats per response, entropy in nats per
token, length in tokens."""

LOG_WIDTH = 100
"""Columns to which replies are wrapped where there is no terminal."""


class Console:
    """Screen and run.log of one run.

    `run_log` is the file to append to (None: no file), `iterations` the number of the last iteration.
    `live` None means a live display where stdout is a terminal; True and False force the answer. `quiet`
    shows nothing (processes other than the first; run.log is still written where one is given). As a
    context manager it closes itself.
    """

    def __init__(self, run_log: Path | None, iterations: int, live: bool | None = None, quiet: bool = False):
        self._file = open(run_log, "a", encoding="utf-8") if run_log else None  # noqa: SIM115
        self._iterations = iterations
        self._quiet = quiet
        self._start, self._start_iteration = time.monotonic(), None
        self._last_evaluation = ""
        live = sys.stdout.isatty() if live is None else live
        self._live = _LiveDisplay(iterations) if live and not quiet else None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def say(self, text: str) -> None:
        """One message (of one or more lines)."""
        self._show(text, sys.stdout)
        self._record(text)

    def warn(self, text: str) -> None:
        """One warning; on stderr unless the live display is on."""
        self._show(f"warning: {text}", sys.stderr, style="yellow")
        self._record(f"warning: {text}")

    def iteration(self, metrics: dict[str, float]) -> None:
        """The figures of one iteration, named as in metrics.jsonl; those missing are left out."""
        iteration = int(metrics["iteration"])
        left = self._seconds_left(iteration)
        line = iteration_line(metrics, self._iterations, left)
        self._record(line)
        if self._live is None:
            self._show(line, sys.stdout)
            return
        evaluation = evaluation_figures(metrics)
        if evaluation:
            self._last_evaluation = evaluation
            self._show(line, sys.stdout)  # evaluations are few: they stay above the bar
        self._live.update(iteration, left, "  ".join(training_figures(metrics)), self._last_evaluation)

    def samples(self, title: str, rows: list[dict]) -> None:
        """Replies to the same prompts at different times, prompt by prompt.

        `rows` are those of samples.jsonl (iteration, prompt, response, score, kl, ending), of any
        iterations: for example the first evaluation's and the last's. A row may have a `label` of its own
        instead of an iteration. Long texts are cut.
        """
        width = shutil.get_terminal_size((LOG_WIDTH, 24)).columns if self._live else LOG_WIDTH
        self.say("\n" + "\n".join([title, *replies_text(rows, min(width, 120))]))

    def table(self, title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A small table; columns that hold only numbers are aligned on the right."""
        self.say("\n" + "\n".join(([title] if title else []) + table_lines(header, rows)))

    def close(self) -> None:
        """End the live display and run.log. Nothing may be shown afterwards; a second call does nothing."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        if self._file is not None:
            self._close_file()

    def _seconds_left(self, iteration: int) -> float | None:
        """Seconds to the last iteration at the pace so far; None until there is a pace.

        The clock starts with the first iteration shown: at its end if it is iteration 0 (the evaluation
        before training), else at its beginning, taken as the time this console was made.
        """
        if self._start_iteration is None:
            self._start_iteration = max(iteration - 1, 0)
            if iteration == 0:
                self._start = time.monotonic()
        done = iteration - self._start_iteration
        if done <= 0:
            return None
        return (time.monotonic() - self._start) / done * max(self._iterations - iteration, 0)

    def _show(self, text: str, stream: TextIO, style: str | None = None) -> None:
        if self._quiet:
            return
        text = printable(text)
        if self._live is not None:
            self._live.print(text, style)
            return
        try:
            print(text, file=stream, flush=True)
        except UnicodeEncodeError:  # a terminal without Unicode must not end a run
            encoding = stream.encoding or "ascii"
            print(text.encode(encoding, "replace").decode(encoding), file=stream, flush=True)

    def _record(self, text: str) -> None:
        if self._file is not None:
            try:
                self._file.write(printable(text) + "\n")
                self._file.flush()
            except OSError as error:  # a run goes on without it
                self._close_file()
                self._show(f"warning: run.log cannot be written ({error.strerror})", sys.stderr, style="yellow")

    def _close_file(self) -> None:
        """Closes run.log; what a full disk did not take is dropped."""
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

    def update(self, iteration: int, left: float | None, figures: str, evaluation: str) -> None:
        self._progress.update(self._task, completed=iteration, left="?" if left is None else duration(left))
        self._figures.style = ""
        self._figures.plain = "   ".join(part for part in (figures, evaluation) if part)

    def print(self, text: str, style: str | None) -> None:
        from rich.text import Text

        self._live.console.print(Text(text, style=style or ""), soft_wrap=True)

    def stop(self) -> None:
        self._live.stop()


def iteration_line(metrics: dict[str, float], iterations: int, seconds_left: float | None) -> str:
    """One iteration on one line: its number, samples, training figures, evaluation, time left."""
    width = len(str(iterations))
    parts = [f"iteration {int(metrics['iteration']):>{width}}/{iterations}"]
    if "samples" in metrics:
        parts.append(f"samples {int(metrics['samples']):>7}")
    parts += training_figures(metrics)
    evaluation = evaluation_figures(metrics)
    if evaluation:
        parts.append(evaluation)
    if seconds_left is not None:
        parts.append(f"left {duration(seconds_left)}")
    return "  ".join(parts)


def training_figures(metrics: dict[str, float]) -> list[str]:
    """The figures of FIGURES that `metrics` has, each as "label value"."""
    return [f"{label} {form.format(metrics[key])}" for label, key, form in FIGURES if metrics.get(key) is not None]


def evaluation_figures(metrics: dict[str, float]) -> str:
    """The evaluation in `metrics` as "eval reward 0.71 ± 0.02 at KL 4.1"; "" where there was none."""
    if metrics.get("eval/reward_mean") is None:
        return ""
    text = f"eval reward {metrics['eval/reward_mean']:.3f}"
    if metrics.get("eval/reward_ci") is not None:
        text += f" ± {metrics['eval/reward_ci']:.3f}"
    if metrics.get("eval/kl_exact") is not None:
        text += f" at KL {metrics['eval/kl_exact']:.3f}"
    return text


def duration(seconds: float) -> str:
    """`seconds` as "45s", "3m 05s", "2h 07m" or "3d 04h"."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"


def replies_text(rows: list[dict], width: int) -> list[str]:
    """The lines of `Console.samples`: each prompt once, then its replies, earliest first."""
    iterations = sorted({row["iteration"] for row in rows if "iteration" in row})
    lines = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        lines += ["", *_labelled("prompt", _last_lines(prompt, 4), width)]
        replies = sorted((row for row in rows if row["prompt"] == prompt), key=lambda row: row.get("iteration", 0))
        for row in replies:
            label = row["label"] if "label" in row else _when(row["iteration"], iterations)
            lines += _labelled(label, _first_lines(row["response"], 12), width)
            lines.append(" " * 16 + _outcome(row))
    return lines


def _when(iteration: int, iterations: list[int]) -> str:
    """ "before" and "after" where there are two iterations to tell apart, else the iteration's number."""
    if len(iterations) == 2:
        return "before" if iteration == iterations[0] else "after"
    return f"iteration {iteration}"


def _outcome(row: dict) -> str:
    parts = [f"iteration {row['iteration']}"] if "iteration" in row else []
    if row.get("score") is not None:
        parts.append(f"score {row['score']:.3f}")
    if row.get("kl") is not None:
        parts.append(f"KL {row['kl']:.2f} nats")
    if row.get("ending"):
        parts.append(f"ended by {row['ending']}")
    return f"[{', '.join(parts)}]"


def _labelled(label: str, text: str, width: int) -> list[str]:
    """`text` wrapped to `width` columns, beside `label` in the margin."""
    lines = []
    for line in printable(text).split("\n"):
        lines += textwrap.wrap(line, max(width - 16, 20)) or [""]
    return [f"  {label if number == 0 else '':<12}| {line}".rstrip() for number, line in enumerate(lines)]


def _first_lines(text: str, count: int) -> str:
    lines = text.strip().split("\n")
    return _cut("\n".join(lines[:count] + (["…"] if len(lines) > count else [])), 1200)


def _last_lines(text: str, count: int) -> str:
    lines = text.strip().split("\n")
    text = "\n".join((["…"] if len(lines) > count else []) + lines[-count:])
    return text if len(text) <= 600 else "… " + text[-600:]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[:length] + " …"


def table_lines(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """A plain text table: header, rule, rows; columns that hold only numbers are aligned on the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [bool(rows) and all(_is_number(row[place]) for row in rows) for place in range(len(header))]

    def line(texts: Sequence[str]) -> str:
        aligned = zip(texts, widths, right, strict=True)
        return "  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in aligned).rstrip()

    return [line(header), "  ".join("-" * width for width in widths), *map(line, cells)]


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def printable(text: str) -> str:
    """`text` without control characters: a model's output must not steer the terminal."""
    return "".join(char if char == "\n" or char.isprintable() else " " for char in text)
