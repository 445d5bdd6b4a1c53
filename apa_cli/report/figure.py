"""Figure of a comparison: the reward-against-KL frontier, and curves with bands over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from apa_cli.report.groups import Group
from apa_cli.report.plotting import (
    KL_LABEL,
    REWARD_LABEL,
    SAMPLES_LABEL,
    SFT_COLOR,
    STYLE,
    escape_mathtext,
    label_axes,
    save_figure,
)
from apa_cli.runs.records import RecordedRun

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

FALLBACK_COLORS = ("#7e22ce", "#a16207", "#0e7490", "#be185d", "#3f3f46")
"""Colors, in order, of algorithms whose runs record no color, or the color of another algorithm."""
LIGHTEST, DARKEST = 0.45, -0.4
"""Shades of the first and the last group of an algorithm, as `shade_color` takes them."""
PLOT_MARKERS = "osD^vPXph<>"
LineStyle = Literal["-", "--", "-.", ":"]
LINE_STYLES: tuple[LineStyle, ...] = ("-", "--", "-.", ":")
FRONTIER_TITLE = """Held-out reward against the KL it cost
(mean over seeds; large marker: last evaluation, bars: all seeds)"""


@dataclass(frozen=True)
class GroupStyle:
    """Color "#rrggbb", marker and line style of one group's plots, in matplotlib's terms."""

    color: str
    marker: str
    linestyle: LineStyle


def plot_comparison(groups: Sequence[Group], path: Path) -> None:
    """Write a PNG with the frontier, and next to it reward and KL against samples."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    legend_rows = -(-len(groups) // 2)
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
        figure = Figure(figsize=(15, 8 + 0.28 * legend_rows), layout=layout)
        axes = figure.subplot_mosaic([["frontier", "reward"], ["frontier", "kl"]], width_ratios=[1.35, 1])
        styles = choose_styles(groups)
        for group, style in zip(groups, styles, strict=True):
            _plot_path(axes["frontier"], group, style)
            _plot_band(axes["reward"], align_series(group.runs, "reward/mean"), style)
            _plot_band(axes["kl"], align_series(group.runs, "kl/sequence"), style)
        _plot_sft_scores(axes["frontier"], groups)
        label_axes(axes["frontier"], FRONTIER_TITLE, KL_LABEL, REWARD_LABEL)
        label_axes(axes["reward"], "Training reward (band: all seeds)", SAMPLES_LABEL, REWARD_LABEL)
        label_axes(axes["kl"], "Training KL estimate (band: all seeds)", SAMPLES_LABEL, KL_LABEL)
        handles = _build_legend_handles(groups, styles)
        figure.legend(handles=handles, loc="outside lower center", ncols=2, handlelength=4)
        save_figure(figure, path)


# --- styles -------------------------------------------------------------------------------------------------


def choose_styles(groups: Sequence[Group]) -> list[GroupStyle]:
    """Return each group's style: color and line style by algorithm, shade and marker by group within the algorithm."""
    colors = choose_colors([run for group in groups for run in group.runs])
    line_styles = dict(zip(colors, cycle(LINE_STYLES), strict=False))
    styles = []
    for group in groups:
        family = [other for other in groups if other.algorithm == group.algorithm]
        position = family.index(group)
        amount = LIGHTEST + (DARKEST - LIGHTEST) * position / (len(family) - 1) if len(family) > 1 else 0.0
        styles.append(
            GroupStyle(
                shade_color(colors[group.algorithm], amount),
                PLOT_MARKERS[position % len(PLOT_MARKERS)],
                line_styles[group.algorithm],
            )
        )
    return styles


def choose_colors(runs: Iterable[RecordedRun]) -> dict[str, str]:
    """Return one color per algorithm, by label: as the runs record it, else the next of `FALLBACK_COLORS`.

    A recorded color that is unreadable, or is already an earlier algorithm's, is ignored.
    """
    from matplotlib.colors import is_color_like, to_hex

    colors: dict[str, str | None] = {}
    for run in runs:
        recorded = to_hex(run.color) if run.color and is_color_like(run.color) else None
        if not colors.get(run.label):
            colors[run.label] = recorded if recorded not in colors.values() else None
    fallbacks = cycle([color for color in FALLBACK_COLORS if color not in colors.values()] or FALLBACK_COLORS)
    return {algorithm: color or next(fallbacks) for algorithm, color in colors.items()}


def shade_color(color: str, amount: float) -> str:
    """Return a color mixed with `amount` of white (0 to 1), or with −`amount` of black (−1 to 0)."""
    from matplotlib.colors import to_hex, to_rgb

    target = 1.0 if amount > 0 else 0.0
    red, green, blue = (channel + abs(amount) * (target - channel) for channel in to_rgb(color))
    return to_hex((red, green, blue))


# --- plots --------------------------------------------------------------------------------------------------


def align_series(runs: Sequence[RecordedRun], key: str) -> dict[int, list[float]]:
    """Return number of samples → a metric's values over the seeds, for the numbers that all runs recorded."""
    series = [run.get_series(key) for run in runs]
    shared = set.intersection(*[set(values) for values in series])
    return {samples: [values[samples] for values in series] for samples in sorted(shared)}


def _plot_path(axes: Axes, group: Group, style: GroupStyle) -> None:
    """Plot the seed means of one group's evaluations in order; the last evaluation large, with the range over seeds."""
    kl, reward = align_series(group.runs, "eval/kl_exact"), align_series(group.runs, "eval/reward_mean")
    shared = [samples for samples in kl if samples in reward]
    if not shared:
        return
    x = [statistics.fmean(kl[samples]) for samples in shared]
    y = [statistics.fmean(reward[samples]) for samples in shared]
    axes.plot(
        x, y, color=style.color, marker=style.marker, linestyle=style.linestyle,
        markersize=4, linewidth=1.5, alpha=0.85,
    )  # fmt: skip
    last = shared[-1]
    axes.errorbar(
        x[-1], y[-1], xerr=_compute_error_range(kl[last]), yerr=_compute_error_range(reward[last]), color=style.color,
        marker=style.marker, markersize=11, markeredgecolor="black", capsize=3, elinewidth=1.2, zorder=4,
    )  # fmt: skip


def _compute_error_range(values: Sequence[float]) -> list[list[float]] | None:
    """Return the distances from the mean down to the minimum and up to the maximum; None for one value."""
    mean = statistics.fmean(values)
    return [[mean - min(values)], [max(values) - mean]] if len(values) > 1 else None


def _plot_band(axes: Axes, values: dict[int, list[float]], style: GroupStyle) -> None:
    """Plot the mean over seeds as a line, and the range over seeds as a band."""
    if not values:
        return
    samples = list(values)
    means = [statistics.fmean(numbers) for numbers in values.values()]
    axes.plot(samples, means, color=style.color, linestyle=style.linestyle, linewidth=1.6)
    if len(next(iter(values.values()))) > 1:
        low, high = [min(numbers) for numbers in values.values()], [max(numbers) for numbers in values.values()]
        axes.fill_between(samples, low, high, color=style.color, alpha=0.18, linewidth=0)


def _plot_sft_scores(axes: Axes, groups: Sequence[Group]) -> None:
    """Plot the SFT model's score as a horizontal line; several lines if models or rewards differ."""
    scores = {round(run.sft["eval/reward_mean"], 6) for group in groups for run in group.runs if run.sft}
    for score in scores:
        axes.axhline(score, color=SFT_COLOR, linestyle="--", linewidth=1)


def _build_legend_handles(groups: Sequence[Group], styles: Sequence[GroupStyle]) -> list[Line2D]:
    from matplotlib.lines import Line2D

    handles = []
    for group, style in zip(groups, styles, strict=True):
        seeds = "1 seed" if len(group.runs) == 1 else f"{len(group.runs)} seeds"
        label = escape_mathtext(f"{group.label}  [{seeds}]")
        handles.append(
            Line2D([], [], color=style.color, marker=style.marker, linestyle=style.linestyle, markersize=7, label=label)
        )
    return [*handles, Line2D([], [], color=SFT_COLOR, linestyle="--", linewidth=1, label="SFT model")]
