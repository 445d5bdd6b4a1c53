"""apa-bench: the time and memory of an iteration's phases, against the roofline."""

from __future__ import annotations

from apa_cli.cli.app import Job, run_command


def bench(job: Job) -> None:
    """Run the benchmark in the job's directory."""
    from apa_cli.bench.benchmark import start_bench

    start_bench(job.config, job.directory)


def main() -> None:
    """Run apa-bench."""
    run_command("apa-bench", bench)
