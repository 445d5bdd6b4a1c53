"""Comparison of many runs, grouped over their seeds: one table, one figure, one HTML page.

Reward is compared at equal KL, never at equal λ, because λ has a different meaning in each algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apa_cli.errors import UserError
from apa_cli.report.figure import plot_comparison
from apa_cli.report.groups import group_runs
from apa_cli.report.page import write_page
from apa_cli.report.table import align_columns, build_notes, build_table, write_csv
from apa_cli.runs.records import RecordedRun


def compare_runs(runs: Sequence[RecordedRun], out: Path) -> list[str]:
    """Write comparison.csv, .png and .html to the folder `out`; return the table as lines of text.

    Raise UserError if no run has been evaluated.
    """
    if not any(run.evaluations for run in runs):
        names = ", ".join(str(run.directory) for run in runs)
        raise UserError(f"{names}: no evaluation (eval/reward_mean) to compare")
    groups = group_runs(runs)
    header, rows = build_table(groups)
    notes = build_notes(groups)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(groups, out / "comparison.csv")
    plot_comparison(groups, out / "comparison.png")
    write_page(groups, header, rows, notes, out / "comparison.png", out / "comparison.html")
    return [*align_columns(header, rows), "", *notes]
