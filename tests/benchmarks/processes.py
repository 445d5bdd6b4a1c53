"""One process against several: samples per second and memory of the runs of a sweep over launch.processes.

    apa-train -m launch.processes=1,2 iterations=8 name=bench_processes
    python tests/benchmarks/processes.py outputs/sweeps/bench_processes

Medians over the iterations after the first; memory is that of the largest process. Each run has all cores: threads are
divided among its processes.
"""

import argparse
import json
import statistics
from pathlib import Path

from apa_cli.runs.formatting import format_table

HEADER = ("processes", "samples/s", "rollout s", "update s", "GiB of the largest")
KEYS = ("throughput/samples_per_s", "time/rollout_s", "time/update_s", "memory/peak_gib")


def read(directory: Path) -> tuple[str, ...]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    iterations = [row for row in map(json.loads, lines) if KEYS[0] in row][1:]
    processes = json.loads((directory / "environment.json").read_text())["processes"]
    return str(processes), *(statistics.median(row[key] for row in iterations) for key in KEYS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep", type=Path)
    arguments = parser.parse_args()
    runs = sorted(file.parent for file in arguments.sweep.glob("*/metrics.jsonl"))
    if not runs:
        parser.error(f"{arguments.sweep} holds no runs")
    print("\n".join(format_table(HEADER, [read(run) for run in runs])))


if __name__ == "__main__":
    main()
