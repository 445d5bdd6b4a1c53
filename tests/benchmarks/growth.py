"""How time and memory grow: the bench.json of many benchmarks as one table.

    python tests/benchmarks/growth.py outputs/sweeps/bench_length outputs/sweeps/bench_batch …

Give sweeps of `apa-bench -m`, or single benchmarks. A row is a job; `times floor` is its seconds over the least that
the machine's measured rates allow. Where that rises along a sweep, something grows faster than its floor. With
`--out FILE` the rows are also written as JSON.
"""

import argparse
import json
from pathlib import Path

import yaml

from apa_cli.runs.formatting import format_table

HEADER = ("", "samples/s", "seconds", "floor s", "times floor", "peak GiB", "sampling ×", "update ×")


def jobs(folder: Path) -> list[Path]:
    """The directories under `folder`, or itself, that hold a benchmark."""
    return sorted(file.parent for file in folder.rglob("bench.json"))


def read(directory: Path) -> dict:
    result = json.loads((directory / "bench.json").read_text())
    config = yaml.safe_load((directory / "config.yaml").read_text())
    phases = {row["name"]: row["seconds"] / row["floor_s"] for row in result["phases"]}
    return {
        "model": config["model"]["path"] or config["model"]["architecture"]["model_type"],
        "dtype": config["model"]["dtype"],
        "rollout_batch_size": config["rollout_batch_size"],
        "microbatch_size": config["microbatch_size"],
        "max_new_tokens": config["sampling"]["max_new_tokens"],
        "samples_per_s": result["samples_per_s"],
        "seconds": result["seconds"],
        "floor_s": result["floor_s"],
        "times_floor": result["seconds"] / result["floor_s"],
        "peak_gib": result["peak_bytes"] / 2**30,
        "phases_times_floor": phases,
        "machine": result["machine"],
    }


def label(row: dict) -> str:
    return f"{row['model']} {row['dtype']}, {row['rollout_batch_size']} responses of {row['max_new_tokens']} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="a JSON file for the rows")
    arguments = parser.parse_args()
    written = []
    for folder in arguments.folders:
        found = jobs(folder)
        if not found:
            parser.error(f"{folder} holds no bench.json")
        rows = sorted(map(read, found), key=lambda row: row["floor_s"])
        written += rows
        shown = [
            (
                label(row), row["samples_per_s"], row["seconds"], row["floor_s"], row["times_floor"], row["peak_gib"],
                row["phases_times_floor"]["sampling"], row["phases_times_floor"]["update"],
            )
            for row in rows
        ]  # fmt: skip
        print("\n".join([f"\n{folder}", *format_table(HEADER, shown)]))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(written, indent=2) + "\n")
        print(f"\nwritten to {arguments.out}")


if __name__ == "__main__":
    main()
