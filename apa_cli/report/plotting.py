"""Style, axis labels and file writing shared by the plots of one run and of a comparison."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SAMPLES_LABEL = "samples (responses seen)"
REWARD_LABEL = "reward (score per response)"
KL_LABEL = "KL(policy ‖ SFT) (nats per response)"
SFT_COLOR = "#52525b"
"""Color of everything measured on the SFT model."""

STYLE: dict[Any, Any] = {
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
"""matplotlib's rc parameters for every plot; font sizes in points."""


def label_axes(axes: Axes, title: str, x_label: str, y_label: str) -> None:
    """Set the title and the axis labels of one plot."""
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


def escape_mathtext(text: str) -> str:
    """Return `text` with its dollar signs escaped, which matplotlib would read as the start of a formula."""
    return text.replace("$", r"\$")


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as PNG to `path` atomically, so that no reader sees half a file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        FigureCanvasAgg(figure).print_png(str(unfinished))
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
