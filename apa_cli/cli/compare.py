"""apa-compare: many runs as one table, one figure and one HTML page."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from apa_cli.errors import UserError
from apa_cli.runs.records import RecordedRun, find_runs, is_run

DESCRIPTION = """\
Compare training runs by held-out reward and by KL from the SFT model.

Runs that differ only in their seed are joined into one row, with the spread over the seeds.
The table is printed, and three files are written:

  comparison.csv    the table, in full precision
  comparison.png    reward against KL, and reward and KL against samples
  comparison.html   both on one page that needs no other file and no network
"""

EPILOG = """\
examples:
  apa-compare outputs/sweeps/lambda               every run of a sweep
  apa-compare outputs/first outputs/second        two runs; files go to the current folder
  apa-compare outputs/sweeps/lambda --out report  files go to report/

lambda has a different meaning in each algorithm; the table names it.
Compare algorithms at equal KL, not at equal lambda.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run apa-compare and return its exit status: 0, or 2 with one line on stderr."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode gets ? for λ and ±
    options = build_parser().parse_args(arguments)
    try:
        _compare(options.directories, options.out)
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (UserError, OSError) as error:
        print(f"apa-compare: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="apa-compare",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "directories",
        metavar="DIR",
        nargs="+",
        type=Path,
        help="a run's directory (outputs/NAME), or a folder with runs anywhere in it",
    )
    parser.add_argument(
        "--out",
        metavar="DIR",
        type=Path,
        default=None,
        help="folder for the files, created if missing (default: the first DIR if it is a folder of "
        "several runs, else the current folder)",
    )
    parser.add_argument("--version", action="version", version=f"apa-cli {metadata.version('apa-cli')}")
    return parser


def _compare(directories: Sequence[Path], out: Path | None) -> None:
    runs = read_runs(directories)
    out = out or choose_output_folder(directories[0])

    from apa_cli.report.compare import compare_runs

    for line in compare_runs(runs, out):
        print(line)
    print("\n" + "\n".join(f"wrote {out / f'comparison.{suffix}'}" for suffix in ("csv", "png", "html")))


def read_runs(directories: Sequence[Path]) -> list[RecordedRun]:
    """Return the runs in `directories`, each once.

    Raise UserError if a run that is itself an entry of `directories` cannot be read, or if no run can. A run inside
    an entry that cannot be read (a sweep's job that failed at once) is left out, with a line on stderr.
    """
    runs: dict[Path, RecordedRun] = {}
    for directory in directories:
        for path in find_runs(directory):
            try:
                runs.setdefault(path.resolve(), RecordedRun.read(path))
            except UserError as error:
                if path == directory:
                    raise
                print(f"apa-compare: left out: {error}", file=sys.stderr)
    if not runs:
        raise UserError(f"{', '.join(map(str, directories))}: no run could be read")
    return list(runs.values())


def choose_output_folder(first: Path) -> Path:
    """Return `first` if it is a folder of several runs, else the current folder."""
    return Path(".") if is_run(first) or len(find_runs(first)) < 2 else first


if __name__ == "__main__":
    sys.exit(main())
