"""apa-bench: where the time and the memory of an iteration go, against what the machine could do."""

from __future__ import annotations

from apa_cli.cli.app import command, run_directory
from apa_cli.settings import Config


def bench(config: Config) -> None:
    """One benchmark in a directory of its own."""
    from apa_cli.bench.benchmark import start_bench

    start_bench(config, run_directory(config))


def main() -> None:
    command("apa-bench", bench)
