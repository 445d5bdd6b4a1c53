"""HTML page of a comparison: table, notes, figure and list of runs in one self-contained file."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from apa_cli.report.groups import Group, describe_truncation

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


def write_page(
    groups: Sequence[Group],
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: Sequence[str],
    image: Path,
    path: Path,
) -> None:
    """Write the page to `path`, with the PNG file `image` embedded."""
    runs = [run for group in groups for run in group.runs]
    listed = [
        [run.name, run.label, str(run.seed), str(run.sample_count), describe_truncation(run.config_yaml) or "none",
         str(run.directory)]
        for run in runs
    ]  # fmt: skip
    page = PAGE.format(
        title=f"Comparison of {len(runs)} run{'' if len(runs) == 1 else 's'}",
        table=_html_table(header, rows),
        notes="\n".join(f"<li>{html.escape(note)}</li>" for note in notes),
        image=base64.b64encode(image.read_bytes()).decode("ascii"),
        runs=_html_table(["run", "algorithm", "seed", "samples", "truncation", "directory"], listed),
    )
    path.write_text(page, encoding="utf-8")


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    lines = [row(header, "th"), *[row(cells, "td") for cells in rows]]
    return "<table>\n" + "\n".join(lines) + "\n</table>"
