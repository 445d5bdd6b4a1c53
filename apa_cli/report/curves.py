"""curves.png: plots of one run's reward and KL."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from apa_cli.report.formatting import format_lambda
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

TRAINING, EVALUATION = "#7fa8d1", "#c2410c"
"""Colors of measurements on rollouts and on held-out prompts."""


def plot_curves(directory: Path) -> Path:
    """Write curves.png to a run's directory from its metrics so far, and return the file's path.

    The plots are reward against samples, KL against samples, and reward against KL. Raise UserError if `directory`
    holds no run, or a run without metrics.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    run = RecordedRun.read(directory)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(16, 4.8), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
        figure.suptitle(escape_mathtext(_format_title(run)), fontsize=13)
        reward, kl, frontier = figure.subplots(1, 3)
        plot_reward(reward, run)
        plot_kl(kl, run)
        plot_frontier(frontier, run)
        path = run.directory / "curves.png"
        save_figure(figure, path)
    return path


def _format_title(run: RecordedRun) -> str:
    parts = [run.label]
    if run.lambda_ is not None:
        parts.append(f"λ = {format_lambda(run.lambda_, run.lambda_meaning)}")
    if run.seed is not None:
        parts.append(f"seed {run.seed}")
    return f"{run.name}:  {', '.join(parts)}"


def plot_reward(axes: Axes, run: RecordedRun) -> None:
    """Plot training reward and held-out reward, the latter with 95 % intervals, against samples."""
    _plot_training(axes, run.get_series("reward/mean"), "training (rollout batches)")
    evaluations = run.evaluations
    if evaluations:
        axes.errorbar(
            [row["samples"] for row in evaluations],
            [row["eval/reward_mean"] for row in evaluations],
            yerr=[row.get("eval/reward_ci") or 0 for row in evaluations],
            fmt="o",
            color=EVALUATION,
            markersize=5,
            capsize=3,
            zorder=3,
            label="held-out prompts, with interval",
        )
    if run.sft is not None:
        axes.axhline(run.sft["eval/reward_mean"], color=SFT_COLOR, linestyle="--", linewidth=1, label="SFT model")
    _finish_plot(axes, "Reward against samples", SAMPLES_LABEL, REWARD_LABEL)


def plot_kl(axes: Axes, run: RecordedRun) -> None:
    """Plot the KL estimate of training and the exact KL on held-out prompts, in nats per response, against samples."""
    _plot_training(axes, run.get_series("kl/sequence"), "training (kl/sequence, estimate)")
    exact = run.get_series("eval/kl_exact")
    if exact:
        axes.plot(list(exact), list(exact.values()), "o", color=EVALUATION, markersize=5, zorder=3,
                  label="held-out prompts (eval/kl_exact)")  # fmt: skip
    _finish_plot(axes, "KL against samples", SAMPLES_LABEL, KL_LABEL)


def plot_frontier(axes: Axes, run: RecordedRun) -> None:
    """Plot held-out reward against exact KL, the evaluations joined in order."""
    points = [row for row in run.evaluations if row.get("eval/kl_exact") is not None]
    kl = [row["eval/kl_exact"] for row in points]
    reward = [row["eval/reward_mean"] for row in points]
    if points:
        axes.plot(kl, reward, "-o", color=EVALUATION, markersize=5, label="evaluations, in order")
        axes.plot(kl[-1:], reward[-1:], "*", color=EVALUATION, markersize=15, label="last evaluation")
    if points and points[0]["iteration"] == 0:
        axes.plot(kl[:1], reward[:1], "o", color="white", markeredgecolor=SFT_COLOR, markersize=9, zorder=4,
                  label="SFT model")  # fmt: skip
    _finish_plot(axes, "Reward against KL", KL_LABEL, REWARD_LABEL)


def _plot_training(axes: Axes, series: dict[int, float], label: str) -> None:
    if series:
        marker = "." if len(series) == 1 else ""
        axes.plot(list(series), list(series.values()), color=TRAINING, marker=marker, linewidth=1.8, label=label)


def _finish_plot(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Label a plot; put the legend below it, or a remark inside if nothing was plotted."""
    label_axes(axes, title, x_label, y_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    else:
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color="#71717a")
