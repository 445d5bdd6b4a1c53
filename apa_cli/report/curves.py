"""curves.png: one run's reward and KL at a glance."""

from __future__ import annotations

import os
from pathlib import Path

from apa_cli.report.groups import lambda_text
from apa_cli.runs.records import Run, read_run

SAMPLES_LABEL = "samples (responses seen)"
REWARD_LABEL = "reward (score per response)"
KL_LABEL = "KL(policy ‖ SFT) (nats per response)"
TRAINING, EVALUATION = "#7fa8d1", "#c2410c"
"""Colours of what is measured on rollouts and of what is measured on held-out prompts."""

STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "axes.grid": True,
    "grid.color": "#e4e4e7",
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "legend.fontsize": 10,
}


def draw_curves(run_dir: Path) -> Path:
    """Draw `run_dir`/curves.png from the run's metrics so far and return its path.

    Reward against samples, KL against samples, reward against KL. The file is replaced in one step, so
    that a viewer never meets half of it. Raises UserError where there is no run or no line of metrics.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    run = read_run(run_dir)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(16, 4.8), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
        figure.suptitle(plain(_title(run)), fontsize=13)
        reward, kl, frontier = figure.subplots(1, 3)
        _draw_reward(reward, run)
        _draw_kl(kl, run)
        _draw_frontier(frontier, run)
        path = Path(run_dir) / "curves.png"
        save_figure(figure, path)
    return path


def save_figure(figure, path: Path) -> None:
    """Write a matplotlib figure as PNG to `path`, in one step."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        FigureCanvasAgg(figure).print_png(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def plain(text: str) -> str:
    """`text` with nothing that matplotlib would take for mathematics."""
    return text.replace("$", r"\$")


def _title(run: Run) -> str:
    parts = [run.algorithm]
    if run.lambda_ is not None:
        parts.append(f"λ = {lambda_text(run.algorithm, run.lambda_)}")
    if run.seed is not None:
        parts.append(f"seed {run.seed}")
    return f"{run.name}:  {', '.join(parts)}"


def _draw_reward(axes, run: Run) -> None:
    _draw_training(axes, run.series("reward/mean"), "training (rollout batches)")
    evaluations = run.evaluations
    if evaluations:
        axes.errorbar(
            [line["samples"] for line in evaluations],
            [line["eval/reward_mean"] for line in evaluations],
            yerr=[line.get("eval/reward_ci") or 0 for line in evaluations],
            fmt="o",
            color=EVALUATION,
            markersize=5,
            capsize=3,
            zorder=3,
            label="held-out prompts, with interval",
        )
    if run.sft is not None:
        axes.axhline(run.sft["eval/reward_mean"], color="#52525b", linestyle="--", linewidth=1, label="SFT model")
    _finish(axes, "Reward against samples", SAMPLES_LABEL, REWARD_LABEL)


def _draw_kl(axes, run: Run) -> None:
    _draw_training(axes, run.series("kl/sequence"), "training (kl/sequence, estimate)")
    exact = run.series("eval/kl_exact")
    if exact:
        axes.plot(list(exact), list(exact.values()), "o", color=EVALUATION, markersize=5, zorder=3,
                  label="held-out prompts (eval/kl_exact)")  # fmt: skip
    _finish(axes, "KL against samples", SAMPLES_LABEL, KL_LABEL)


def _draw_frontier(axes, run: Run) -> None:
    points = [line for line in run.evaluations if line.get("eval/kl_exact") is not None]
    kl = [line["eval/kl_exact"] for line in points]
    reward = [line["eval/reward_mean"] for line in points]
    if points:
        axes.plot(kl, reward, "-o", color=EVALUATION, markersize=5, label="evaluations, in order")
        axes.plot(kl[-1:], reward[-1:], "*", color=EVALUATION, markersize=15, label="last evaluation")
    if points and points[0]["iteration"] == 0:
        axes.plot(kl[:1], reward[:1], "o", color="white", markeredgecolor="#52525b", markersize=9, zorder=4,
                  label="SFT model")  # fmt: skip
    _finish(axes, "Reward against KL", KL_LABEL, REWARD_LABEL)


def _draw_training(axes, series: dict[int, float], label: str) -> None:
    if series:
        marker = "." if len(series) == 1 else ""
        axes.plot(list(series), list(series.values()), color=TRAINING, marker=marker, linewidth=1.8, label=label)


def _finish(axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    else:
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color="#71717a")
