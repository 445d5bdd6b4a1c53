"""Iterations, tables and responses as lines of text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

FIGURES = (
    ("reward", "reward/mean", "{:z7.3f}"),
    ("KL", "kl/sequence", "{:z7.3f}"),
    ("entropy", "policy/entropy", "{:z6.3f}"),
    ("length", "response/length", "{:6.1f}"),
    ("samples/s", "throughput/samples_per_s", "{:7.1f}"),
)
"""Figures in an iteration's line: label, metric, format (z: no minus before 0.000). KL in nats per response, entropy in
nats per token, length in tokens."""

MARGIN = 16
"""Columns to the left of a wrapped text, for its label."""
PROMPT_LINES, PROMPT_CHARACTERS = 4, 600
"""The last lines and characters of a prompt that are shown."""
QUOTED_CHARACTERS = 600
"""Characters that are shown of a text in quotes."""
RESPONSE_LINES, RESPONSE_CHARACTERS = 12, 1200
"""The first lines and characters of a response that are shown."""


def format_iteration(metrics: dict[str, float], iterations: int, seconds_left: float | None) -> str:
    """Return one iteration as one line: its number, samples, training figures, evaluation, time left."""
    width = len(str(iterations))
    parts = [f"iteration {int(metrics['iteration']):>{width}}/{iterations}"]
    if "samples" in metrics:
        parts.append(f"samples {int(metrics['samples']):>7}")
    parts += format_training_figures(metrics)
    evaluation = format_evaluation(metrics)
    if evaluation:
        parts.append(evaluation)
    if seconds_left is not None:
        parts.append(f"left {format_duration(seconds_left)}")
    return "  ".join(parts)


def format_training_figures(metrics: dict[str, float]) -> list[str]:
    """Return the FIGURES that `metrics` contains, each as "label value"."""
    return [f"{label} {form.format(metrics[key])}" for label, key, form in FIGURES if metrics.get(key) is not None]


def format_evaluation(metrics: dict[str, float]) -> str:
    """Return the evaluation in `metrics` as "eval reward 0.71 ± 0.02 at KL 4.1"; "" if there is none."""
    if metrics.get("eval/reward_mean") is None:
        return ""
    text = f"eval reward {metrics['eval/reward_mean']:z.3f}"
    if metrics.get("eval/reward_ci") is not None:
        text += f" ± {metrics['eval/reward_ci']:.3f}"
    if metrics.get("eval/kl_exact") is not None:
        text += f" at KL {metrics['eval/kl_exact']:z.3f}"
    return text


def format_duration(seconds: float) -> str:
    """Return `seconds` as "45s", "3m 05s", "2h 07m" or "3d 04h"."""
    seconds = round(seconds)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86400
    if days:
        return f"{days}d {hours % 24:02d}h"
    if hours:
        return f"{hours}h {minutes % 60:02d}m"
    return f"{minutes}m {seconds % 60:02d}s" if minutes else f"{seconds}s"


# --- responses ----------------------------------------------------------------------------------------------


def format_responses(rows: list[dict[str, Any]], width: int) -> list[str]:
    """Return the lines of `Console.show_samples`: each prompt once, then its responses, earliest first."""
    iterations = sorted({row["iteration"] for row in rows if "iteration" in row})
    lines = []
    for prompt in dict.fromkeys(row["prompt"] for row in rows):
        lines += ["", *_wrap("prompt", _shorten_prompt(prompt), width)]
        responses = sorted((row for row in rows if row["prompt"] == prompt), key=lambda row: row.get("iteration", 0))
        for row in responses:
            label = row["label"] if "label" in row else _label_iteration(row["iteration"], iterations)
            lines += _wrap(label, _shorten_response(row["response"]), width)
            lines.append(" " * MARGIN + _format_outcome(row))
    return lines


def _label_iteration(iteration: int, iterations: list[int]) -> str:
    """Return "before" or "after" if there are two iterations to tell apart, else the iteration's number."""
    if len(iterations) == 2:
        return "before" if iteration == iterations[0] else "after"
    return f"iteration {iteration}"


def _format_outcome(row: dict[str, Any]) -> str:
    parts = [f"iteration {row['iteration']}"] if "iteration" in row else []
    if row.get("score") is not None:
        parts.append(f"score {row['score']:z.3f}")
    if row.get("kl") is not None:
        parts.append(f"KL {row['kl']:z.2f} nats")
    if row.get("ending"):
        parts.append(f"ended by {row['ending']}")
    return f"[{', '.join(parts)}]"


def _wrap(label: str, text: str, width: int) -> list[str]:
    """Return `text` wrapped to `width` columns, with `label` in the margin."""
    lines = []
    for line in strip_control_characters(text).split("\n"):
        lines += textwrap.wrap(line, max(width - MARGIN, 20)) or [""]
    return [f"  {label if number == 0 else '':<12}| {line}".rstrip() for number, line in enumerate(lines)]


def _shorten_response(text: str) -> str:
    lines = text.strip().split("\n")
    text = "\n".join(lines[:RESPONSE_LINES] + (["…"] if len(lines) > RESPONSE_LINES else []))
    return text if len(text) <= RESPONSE_CHARACTERS else text[:RESPONSE_CHARACTERS] + " …"


def _shorten_prompt(text: str) -> str:
    lines = text.strip().split("\n")
    text = "\n".join((["…"] if len(lines) > PROMPT_LINES else []) + lines[-PROMPT_LINES:])
    return text if len(text) <= PROMPT_CHARACTERS else "… " + text[-PROMPT_CHARACTERS:]


# --- tables -------------------------------------------------------------------------------------------------


def format_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    """Return a plain text table: header, rule, rows; columns that contain only numbers are aligned on the right."""
    cells = [[_format_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    numeric = [bool(rows) and all(_is_number(row[place]) for row in rows) for place in range(len(header))]

    def align(texts: Sequence[str]) -> str:
        columns = zip(texts, widths, numeric, strict=True)
        return "  ".join(text.rjust(width) if number else text.ljust(width) for text, width, number in columns).rstrip()

    return [align(header), "  ".join("-" * width for width in widths), *map(align, cells)]


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _format_cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quote_text(text: str) -> str:
    """Return a text in quotes on one line, with line breaks as \\n; of a long one the first and the last characters."""
    half, rest = QUOTED_CHARACTERS // 2, len(text) - QUOTED_CHARACTERS
    return repr(text) if rest <= 0 else f"{text[:half]!r} … {rest} characters … {text[-half:]!r}"


def strip_control_characters(text: str) -> str:
    """Return `text` with control characters replaced by spaces: a model's output must not control the terminal."""
    return "".join(char if char == "\n" or char.isprintable() else " " for char in text)
