"""The command apa-compare: many runs as one table, one figure and one HTML page."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from apa_cli.errors import UserError
from apa_cli.runs.records import Run, find_runs, is_run, read_run

DESCRIPTION = """\
Compare training runs: how much reward each gained, and how much KL it paid for it.

Runs that differ in nothing but their seed are joined into one row, with the spread over the seeds.
The table is printed, and three files are written:

  comparison.csv    the table, in full precision
  comparison.png    reward against KL, and reward and KL against samples
  comparison.html   both on one page that needs no other file and no network
"""

EXAMPLES = """\
examples:
  apa-compare outputs/sweeps/lambda               every run of a sweep
  apa-compare outputs/first outputs/second        two runs; files go to the current folder
  apa-compare outputs/sweeps/lambda --out report  files go to report/

lambda means something else in each algorithm (APA: temperature and pull; AWR: step size;
PPO: price of KL), so compare algorithms at equal KL, not at equal lambda.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run apa-compare and return its exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="apa-compare",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="a run's directory (outputs/NAME), or a folder with runs somewhere in it",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=None,
        help="where to write the files; made if missing (default: the first DIR if it is a folder of "
        "several runs, else the current folder)",
    )
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets ? for λ and ±
    options = parser.parse_args(arguments)
    try:
        _compare(options.directories, options.out)
    except (UserError, OSError) as error:
        print(f"apa-compare: {error}", file=sys.stderr)
        return 2
    return 0


def _compare(directories: Sequence[Path], out: Path | None) -> None:
    runs = read_runs(directories)
    out = out or default_out(directories[0])

    from apa_cli.report.compare import compare  # imports matplotlib's world only now

    for line in compare(runs, out):
        print(line)
    print("\n" + "\n".join(f"wrote {out / f'comparison.{kind}'}" for kind in ("csv", "png", "html")))


def read_runs(directories: Sequence[Path]) -> list[Run]:
    """The runs in `directories`, each once.

    A run that is named itself must be readable (UserError); one that is found in a folder and is not
    (a job of a sweep that failed at once) is left out, with a line on stderr.
    """
    runs: dict[Path, Run] = {}
    for directory in directories:
        for found in find_runs(directory):
            try:
                runs.setdefault(found.resolve(), read_run(found))
            except UserError as error:
                if found == directory:
                    raise
                print(f"apa-compare: left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError("no run could be read")
    return list(runs.values())


def default_out(first: Path) -> Path:
    """Where the files go by default: `first` if it is a folder of several runs, else the current folder."""
    return Path(".") if is_run(first) or len(find_runs(first)) < 2 else first


if __name__ == "__main__":
    sys.exit(main())
