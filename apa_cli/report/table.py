"""Table of a comparison: one row per group of runs, as text and as CSV, with explanatory notes."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from apa_cli.report.formatting import format_lambda, format_value
from apa_cli.report.groups import TRUNCATION_MARK, Group
from apa_cli.runs.records import RecordedRun

FURTHER_REWARDS = "eval/reward_mean/"
"""Prefix, before the reward's name, of the metrics of `evaluation.rewards`."""


@dataclass(frozen=True)
class Statistic:
    """A number over the seeds of a group: mean, and sample standard deviation (None with one seed)."""

    mean: float
    std: float | None

    def format(self, digits: int) -> str:
        """Return "mean ± std" with this many decimals."""
        text = f"{self.mean:z.{digits}f}"
        return text if self.std is None else f"{text} ± {self.std:.{digits}f}"


@dataclass(frozen=True)
class Column:
    """A column of the comparison: heading, name in the CSV, number of decimals, and function of a run."""

    heading: str
    name: str
    digits: int
    value: Callable[[RecordedRun], float | None]


def _read_final(key: str) -> Callable[[RecordedRun], float | None]:
    """Return a function that reads this metric of a run's last evaluation."""
    return lambda run: run.final.get(key) if run.final else None


def _compute_gain(run: RecordedRun) -> float | None:
    """Return the score gained over the SFT model on the same prompts; None without both evaluations."""
    if run.final is None or run.sft is None:
        return None
    return run.final["eval/reward_mean"] - run.sft["eval/reward_mean"]


COLUMNS = (
    Column("reward", "eval/reward_mean", 3, _read_final("eval/reward_mean")),
    Column("gain over SFT", "gain_over_sft", 3, _compute_gain),
    Column("KL (nats)", "eval/kl_exact", 2, _read_final("eval/kl_exact")),
    Column("entropy", "eval/entropy", 2, _read_final("eval/entropy")),
    Column("length", "eval/length", 1, _read_final("eval/length")),
    Column("ended by EOS", "response/eos_rate", 2, lambda run: run.get_last("response/eos_rate")),
    Column("win rate", "eval/win_rate_sft", 2, _read_final("eval/win_rate_sft")),
    Column("minutes", "minutes", 1, lambda run: run.minutes),
)
"""Metrics of the last evaluation of each run, except the EOS share (last rollout batch) and the minutes (whole run)."""


TRUNCATED_COLUMNS = ("eval/kl_exact", "eval/entropy")
"""Metrics that are those of the truncated sampler if top_k or top_p truncates."""


def compute_statistic(runs: Sequence[RecordedRun], value: Callable[[RecordedRun], float | None]) -> Statistic | None:
    """Return mean and standard deviation of a value over the runs that have it; None if no run has it."""
    values = [number for run in runs if (number := value(run)) is not None]
    if not values:
        return None
    return Statistic(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def select_columns(groups: Sequence[Group]) -> list[Column]:
    """Return the columns for which at least one run has a value, with one for each further reward evaluated."""
    runs = [run for group in groups for run in group.runs]
    further = sorted({key for run in runs if run.final for key in run.final if key.startswith(FURTHER_REWARDS)})
    columns = list(COLUMNS)
    columns[2:2] = [Column(f"reward {key.removeprefix(FURTHER_REWARDS)}", key, 3, _read_final(key)) for key in further]
    return [column for column in columns if any(column.value(run) is not None for run in runs)]


def build_table(groups: Sequence[Group]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows of the comparison, as texts."""
    columns, varying = select_columns(groups), list(groups[0].varying)
    headings = [column.heading for column in columns]
    header = ["algorithm", "λ (its meaning)", *varying, "seeds", *headings, "samples"]
    rows = []
    for group in groups:
        results = [compute_statistic(group.runs, column.value) for column in columns]
        rows.append([
            group.algorithm,
            "–" if group.lambda_ is None else format_lambda(group.lambda_, group.lambda_meaning),
            *[format_value(value) for value in group.varying.values()],
            ", ".join(map(str, group.seeds)),
            *["–" if result is None else result.format(column.digits) + _mark_truncation(group, column)
              for result, column in zip(results, columns, strict=True)],
            _format_samples(group),
        ])  # fmt: skip
    return header, rows


def _mark_truncation(group: Group, column: Column) -> str:
    """Return the mark of a number that is the truncated sampler's, else ""."""
    return f" {TRUNCATION_MARK}" if group.truncation and column.name in TRUNCATED_COLUMNS else ""


def _format_samples(group: Group) -> str:
    samples = [run.sample_count for run in group.runs]
    return str(samples[0]) if min(samples) == max(samples) else f"{min(samples)} to {max(samples)}"


def align_columns(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table as lines of text, each column as wide as its longest cell."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [header, ["-" * width for width in widths], *rows]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def build_notes(groups: Sequence[Group]) -> list[str]:
    """Return explanatory notes on the table and the figure, one or two sentences each."""
    meanings = {group.algorithm: group.lambda_meaning for group in groups if group.lambda_ is not None}
    recorded = "; ".join(f"{algorithm}: {meaning}" for algorithm, meaning in meanings.items() if meaning)
    lines = []
    if meanings:
        lines.append(
            f"λ has a different meaning in each algorithm{f' ({recorded})' if recorded else ''}: "
            "compare algorithms at equal KL, not at equal λ."
        )
    lines.append(
        "Rewards and KL are those of each run's last evaluation on held-out prompts: mean ± standard deviation over "
        "seeds (no ± with one seed). KL is exact, in nats per response, against the SFT model."
    )
    truncated = [group for group in groups if group.truncation]
    if truncated:
        kinds = ", ".join(dict.fromkeys(group.truncation for group in truncated))
        lines.append(
            f"{TRUNCATION_MARK} Sampled with {kinds}: KL and entropy are those of the truncated sampler, whose KL is "
            "above 0 also for the SFT model; the training KL in the figure (kl/sequence) and a price of KL are of the "
            "whole distribution. Compare such runs with runs of the same truncation."
        )
    for group in groups:
        samples = [run.sample_count for run in group.runs]
        if min(samples) != max(samples):
            lines.append(
                f"The runs of {group.label} stopped at different numbers of samples ({_format_samples(group)}); "
                "the curves of this group end at the smallest of them."
            )
        if len(set(group.seeds)) < len(group.seeds):
            lines.append(f"{group.label} has the same seed more than once: its ± is too small.")
        unevaluated = [run.name for run in group.runs if run.final is None]
        if unevaluated:
            lines.append(f"Not evaluated, so not in the means: {', '.join(unevaluated)} ({group.label}).")
    return lines


def write_csv(groups: Sequence[Group], path: Path) -> None:
    """Write one row per group; a metric has two columns, NAME (its mean) and NAME_std (empty with one seed)."""
    columns = select_columns(groups)
    varying = list(groups[0].varying)
    header = ["algorithm", "lambda", "lambda_meaning", *varying, "truncation", "seeds", "runs"]
    for column in columns:
        header += [column.name, f"{column.name}_std"]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "samples_min", "samples_max"])
        for group in groups:
            row: list[object] = [group.algorithm, group.lambda_, group.lambda_meaning or ""]
            row += [*group.varying.values(), group.truncation, " ".join(map(str, group.seeds)), len(group.runs)]
            for column in columns:
                result = compute_statistic(group.runs, column.value)
                row += [result.mean, result.std] if result else [None, None]
            samples = [run.sample_count for run in group.runs]
            writer.writerow([*row, min(samples), max(samples)])
