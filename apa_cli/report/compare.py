"""Many runs side by side: one table, the reward-against-KL frontier, curves with seed bands.

Everything is per group of runs that differ in nothing but their seed. Reward is compared with the KL it
cost, never by λ, for λ means something else in each algorithm.
"""

from __future__ import annotations

import base64
import csv
import html
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apa_cli.errors import UserError
from apa_cli.report.curves import KL_LABEL, REWARD_LABEL, SAMPLES_LABEL, STYLE, plain, save_figure
from apa_cli.report.groups import LAMBDA_MEANING, Group, group_runs, lambda_text, value_text
from apa_cli.runs.records import Run

FURTHER_REWARDS = "eval/reward_mean/"
"""Evaluation by a reward that was not trained against is recorded under this and the reward's name."""

HUES = {"apa": "Blues", "ppo": "Oranges", "awr": "Greens"}
"""matplotlib's colour map per algorithm; others take the next of OTHER_HUES."""
OTHER_HUES = ("Purples", "Reds", "Greys")
FRONTIER_TITLE = """Held-out reward against the KL it cost
(mean over seeds; large marker: last evaluation, bars: all seeds)"""
MARKERS = "osD^vPXph<>"
LINES = {"apa": "-", "ppo": "--", "awr": "-."}


@dataclass(frozen=True)
class Statistic:
    """A number over the seeds of a group: mean, and sample standard deviation (None with one seed)."""

    mean: float
    std: float | None

    def text(self, digits: int) -> str:
        text = f"{self.mean:.{digits}f}"
        return text if self.std is None else f"{text} ± {self.std:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A figure of the comparison: heading, name in the CSV, decimals shown, and its value for one run."""

    heading: str
    name: str
    digits: int
    value: Callable[[Run], float | None]


def _final(key: str) -> Callable[[Run], float | None]:
    return lambda run: run.final.get(key) if run.final else None


def _gain(run: Run) -> float | None:
    """Score gained over the SFT model on the same prompts."""
    if run.final is None or run.sft is None:
        return None
    return run.final["eval/reward_mean"] - run.sft["eval/reward_mean"]


COLUMNS = (
    Column("reward", "eval/reward_mean", 3, _final("eval/reward_mean")),
    Column("gain over SFT", "gain_over_sft", 3, _gain),
    Column("KL (nats)", "eval/kl_exact", 2, _final("eval/kl_exact")),
    Column("entropy", "eval/entropy", 2, _final("eval/entropy")),
    Column("length", "eval/length", 1, _final("eval/length")),
    Column("ended by EOS", "response/eos_rate", 2, lambda run: run.last("response/eos_rate")),
    Column("win rate", "eval/win_rate_sft", 2, _final("eval/win_rate_sft")),
    Column("minutes", "minutes", 1, lambda run: run.minutes),
)
"""Figures at the last evaluation of each run (the share ended by EOS: of its last rollout batch)."""


def compare(runs: Sequence[Run], out: Path) -> list[str]:
    """Write comparison.csv, .png and .html to the folder `out`; return the table as lines of text.

    Raises UserError where no run has been evaluated: there is nothing to compare then.
    """
    if not any(run.evaluations for run in runs):
        raise UserError("none of these runs has an evaluation (eval/reward_mean) to compare")
    groups = group_runs(runs)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(groups, out / "comparison.csv")
    draw_comparison(groups, out / "comparison.png")
    header, rows = table(groups)
    write_html(groups, header, rows, out / "comparison.png", out / "comparison.html")
    return [*_text_table(header, rows), "", *notes(groups)]


def statistic(runs: Sequence[Run], value: Callable[[Run], float | None]) -> Statistic | None:
    """Mean and standard deviation of a value over the runs that have it; None where none has."""
    values = [number for run in runs if (number := value(run)) is not None]
    if not values:
        return None
    return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def columns_of(groups: Sequence[Group]) -> list[Column]:
    """The columns that at least one run fills, with one for each further reward that was evaluated."""
    runs = [run for group in groups for run in group.runs]
    further = sorted({key for run in runs if run.final for key in run.final if key.startswith(FURTHER_REWARDS)})
    columns = list(COLUMNS)
    columns[2:2] = [Column(f"reward {key.removeprefix(FURTHER_REWARDS)}", key, 3, _final(key)) for key in further]
    return [column for column in columns if any(column.value(run) is not None for run in runs)]


def table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison, as texts."""
    columns = columns_of(groups)
    varying = list(groups[0].varying)
    header = [
        "algorithm",
        "λ (its meaning)",
        *varying,
        "seeds",
        *[column.heading for column in columns],
        "samples",
    ]
    rows = []
    for group in groups:
        figures = [statistic(group.runs, column.value) for column in columns]
        rows.append([
            group.algorithm,
            "–" if group.lambda_ is None else lambda_text(group.algorithm, group.lambda_),
            *[value_text(value) for value in group.varying.values()],
            ", ".join(map(str, group.seeds)),
            *["–" if figure is None else figure.text(column.digits)
              for figure, column in zip(figures, columns, strict=True)],
            _samples_text(group),
        ])  # fmt: skip
    return header, rows


def _samples_text(group: Group) -> str:
    samples = [run.samples for run in group.runs]
    return str(samples[0]) if min(samples) == max(samples) else f"{min(samples)} to {max(samples)}"


def notes(groups: Sequence[Group]) -> list[str]:
    """What a reader must know to read the table and the figure, one sentence or two each."""
    present = dict.fromkeys(group.algorithm for group in groups if group.lambda_ is not None)
    meanings = [f"{name}: {LAMBDA_MEANING[name.lower()]}" for name in present if name.lower() in LAMBDA_MEANING]
    lines = []
    if meanings:
        lines.append(
            f"λ means something else in each algorithm ({'; '.join(meanings)}): "
            "compare algorithms at equal KL, not at equal λ."
        )
    lines.append(
        "Figures are those of each run's last evaluation on held-out prompts: mean ± standard deviation over "
        "seeds (no ± where there is one seed). KL is exact, in nats per response, against the SFT model."
    )
    for group in groups:
        samples = [run.samples for run in group.runs]
        if min(samples) != max(samples):
            lines.append(
                f"The runs of {group.label} stopped at different numbers of samples "
                f"({_samples_text(group)}); its curves end where the first of them stopped."
            )
        if len(set(group.seeds)) < len(group.seeds):
            lines.append(f"{group.label} has the same seed more than once: its ± is too small.")
        unevaluated = [run.name for run in group.runs if run.final is None]
        if unevaluated:
            lines.append(f"Not evaluated, so not in the means: {', '.join(unevaluated)} ({group.label}).")
    return lines


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """One row per group; a figure has two columns, NAME (its mean) and NAME_std (empty with one seed)."""
    columns = columns_of(groups)
    varying = list(groups[0].varying)
    header = ["algorithm", "lambda", "lambda_meaning", *varying, "seeds", "runs"]
    for column in columns:
        header += [column.name, f"{column.name}_std"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "samples_min", "samples_max"])
        for group in groups:
            row = [group.algorithm, group.lambda_, LAMBDA_MEANING.get(group.algorithm.lower(), "")]
            row += [*group.varying.values(), " ".join(map(str, group.seeds)), len(group.runs)]
            for column in columns:
                figure = statistic(group.runs, column.value)
                row += [figure.mean, figure.std] if figure else [None, None]
            samples = [run.samples for run in group.runs]
            writer.writerow([*row, min(samples), max(samples)])


def _text_table(header: list[str], rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def band(runs: Sequence[Run], key: str) -> dict[int, list[float]]:
    """The values of a metric over the seeds, by samples, at the samples where every run has one."""
    series = [run.series(key) for run in runs]
    shared = set.intersection(*[set(one) for one in series])
    return {samples: [one[samples] for one in series] for samples in sorted(shared)}


def draw_comparison(groups: Sequence[Group], path: Path) -> None:
    """Draw comparison.png: the frontier large, beside it reward and KL against samples."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    legend_rows = -(-len(groups) // 2)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(15, 8 + 0.28 * legend_rows), layout="constrained")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
        axes = figure.subplot_mosaic([["frontier", "reward"], ["frontier", "kl"]], width_ratios=[1.35, 1])
        looks = _looks(groups)
        for group, look in zip(groups, looks, strict=True):
            _draw_path(axes["frontier"], group, look)
            _draw_band(axes["reward"], band(group.runs, "reward/mean"), look)
            _draw_band(axes["kl"], band(group.runs, "kl/sequence"), look)
        _draw_sft(axes["frontier"], groups)
        _label(
            axes["frontier"],
            FRONTIER_TITLE,
            KL_LABEL,
            REWARD_LABEL,
        )
        _label(axes["reward"], "Training reward (band: all seeds)", SAMPLES_LABEL, REWARD_LABEL)
        _label(axes["kl"], "Training KL estimate (band: all seeds)", SAMPLES_LABEL, KL_LABEL)
        figure.legend(handles=_legend(groups, looks), loc="outside lower center", ncols=2, handlelength=4)
        save_figure(figure, path)


def _looks(groups: Sequence[Group]) -> list[dict]:
    """How each group is drawn: a hue and a line style per algorithm, a shade and a marker within it."""
    from matplotlib import colormaps

    algorithms = list(dict.fromkeys(group.algorithm.lower() for group in groups))
    unknown = [name for name in algorithms if name not in HUES]
    looks = []
    for group in groups:
        name = group.algorithm.lower()
        family = [other for other in groups if other.algorithm.lower() == name]
        place = family.index(group)
        hue = HUES.get(name) or OTHER_HUES[unknown.index(name) % len(OTHER_HUES)]
        shade = 0.75 if len(family) == 1 else 0.45 + 0.5 * place / (len(family) - 1)
        looks.append({
            "color": colormaps[hue](shade),
            "marker": MARKERS[place % len(MARKERS)],
            "linestyle": LINES.get(name, ":"),
        })  # fmt: skip
    return looks


def _draw_path(axes, group: Group, look: dict) -> None:
    """Seed-mean points of one group joined in order; the last one large, with the range over seeds."""
    kl, reward = band(group.runs, "eval/kl_exact"), band(group.runs, "eval/reward_mean")
    shared = [samples for samples in kl if samples in reward]
    if not shared:
        return
    x = [statistics.fmean(kl[samples]) for samples in shared]
    y = [statistics.fmean(reward[samples]) for samples in shared]
    axes.plot(x, y, **look, markersize=4, linewidth=1.5, alpha=0.85)
    last = shared[-1]
    axes.errorbar(
        x[-1],
        y[-1],
        xerr=_range(kl[last]),
        yerr=_range(reward[last]),
        color=look["color"],
        marker=look["marker"],
        markersize=11,
        markeredgecolor="black",
        capsize=3,
        elinewidth=1.2,
        zorder=4,
    )


def _range(values: Sequence[float]) -> list[list[float]] | None:
    """Distances from the mean down to the least and up to the greatest value; None for one value."""
    mean = statistics.fmean(values)
    return [[mean - min(values)], [max(values) - mean]] if len(values) > 1 else None


def _draw_band(axes, values: dict[int, list[float]], look: dict) -> None:
    """The mean over seeds as a line, from the least to the greatest seed as a band."""
    if not values:
        return
    samples = list(values)
    color, linestyle = look["color"], look["linestyle"]
    means = [statistics.fmean(at) for at in values.values()]
    axes.plot(samples, means, color=color, linestyle=linestyle, linewidth=1.6)
    if len(next(iter(values.values()))) > 1:
        low, high = [min(at) for at in values.values()], [max(at) for at in values.values()]
        axes.fill_between(samples, low, high, color=color, alpha=0.18, linewidth=0)


def _draw_sft(axes, groups: Sequence[Group]) -> None:
    """The SFT model's score as a line, one for each score there is (other models, other rewards)."""
    scores = {round(run.sft["eval/reward_mean"], 6) for group in groups for run in group.runs if run.sft}
    for score in scores:
        axes.axhline(score, color="#52525b", linestyle="--", linewidth=1)


def _legend(groups: Sequence[Group], looks: Sequence[dict]) -> list:
    from matplotlib.lines import Line2D

    lines = [
        Line2D(
            [],
            [],
            **look,
            markersize=7,
            label=plain(f"{group.label}  [{len(group.runs)} seed{_plural(group)}]"),
        )
        for group, look in zip(groups, looks, strict=True)
    ]
    return [*lines, Line2D([], [], color="#52525b", linestyle="--", linewidth=1, label="SFT model")]


def _plural(group: Group) -> str:
    return "" if len(group.runs) == 1 else "s"


def _label(axes, title: str, x_label: str, y_label: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)


PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; color: #18181b; background: #fff; margin: 2rem auto; 
  max-width: 80rem; padding: 0 1rem; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.1rem; margin-top: 2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: .3rem .8rem; border-bottom: 1px solid #e4e4e7; white-space: nowrap; }}
th {{ border-bottom: 2px solid #a1a1aa; }}
img {{ max-width: 100%; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="wide">{table}</div>
<ul>
{notes}
</ul>
<h2>Reward against KL, and both against samples</h2>
<img alt="Reward against KL for each group of runs, and reward and KL against samples"
  src="data:image/png;base64,{image}">
<h2>Runs</h2>
<div class="wide">{runs}</div>
</body>
</html>
"""


def write_html(
    groups: Sequence[Group], header: Sequence[str], rows: Sequence[Sequence[str]], image: Path, path: Path
) -> None:
    """Write one page that needs no other file and no network: table, notes, figure, list of runs."""
    runs = [run for group in groups for run in group.runs]
    listed = [[run.name, run.algorithm, str(run.seed), str(run.samples), str(run.directory)] for run in runs]
    page = PAGE.format(
        title=f"Comparison of {len(runs)} run{'' if len(runs) == 1 else 's'}",
        table=_html_table(header, rows),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in notes(groups)),
        image=base64.b64encode(image.read_bytes()).decode("ascii"),
        runs=_html_table(["run", "algorithm", "seed", "samples", "directory"], listed),
    )
    path.write_text(page, encoding="utf-8")


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(header, "th"), *[row(cells, "td") for cells in rows]]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
