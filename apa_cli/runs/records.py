"""A run's files, read back."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from apa_cli.errors import ConfigError, UserError


def located_run(name: str) -> tuple[Path, Path | None]:
    """The directory of the run that run=NAME names, and the checkpoint if NAME is one. ConfigError for any other."""
    path = Path(name).expanduser()
    is_checkpoint = path.parent.name == "checkpoints" and (path / "state.json").is_file()
    directory = path.parent.parent if is_checkpoint else path
    for file in ("config.yaml", "environment.json", "metrics.jsonl"):
        if not (directory / file).is_file():
            why = f"there is no {file}{nearest(path)}"
            if any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
                why = f"a model alone is given by model.path={path}"
                if (path.parent / "metrics.jsonl").is_file():
                    why = f"its run is {path.parent}, and {why}"
            raise ConfigError(f"run: {path} is no run of apa-train and no checkpoint of one ({why})")
    return directory, path if is_checkpoint else None


def nearest(path: Path) -> str:
    """The folder beside one that is missing whose name is most like its own, as the end of a message; else nothing."""
    if path.exists() or not path.parent.is_dir():
        return ""
    beside = sorted(each.name for each in path.parent.iterdir() if each.is_dir())
    close = difflib.get_close_matches(path.name, beside, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def recorded_config(directory: Path) -> dict[str, Any]:
    """A run's configuration with the models that its stages made filled in. ConfigError if it cannot be read."""
    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        made = json.loads((directory / "environment.json").read_text(encoding="utf-8"))
        model, reward = config["model"], config["reward"]
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        raise ConfigError(f"run: config.yaml or environment.json of {directory} cannot be read") from error
    if "policy" not in made:
        model = directory / "model"
        raise ConfigError(f"run: {directory} is no run of apa-train; give model.path={model} instead of it")
    model["path"] = model["path"] or made["policy"]
    if "path" in reward:
        reward["path"] = reward["path"] or made["reward"]
    return config


def rows_until(file: Path, iteration: int) -> list[str]:
    """The lines of a .jsonl file up to an iteration; a last one that was half-written is none of them.

    UserError where any other cannot be read.
    """
    *lines, _ = file.read_bytes().split(b"\n")  # what follows the last line end is half a line, or nothing
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["iteration"] <= iteration:
                rows.append(line.decode())
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"resume: line {number} of {file} cannot be read") from error
    return rows


def records(file: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file; a reply may hold other line ends than its own."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]


@dataclass(frozen=True)
class Run:
    """One run: its directory, its resolved configuration and its metrics, one dict per iteration in order."""

    directory: Path
    config: dict
    metrics: list[dict]

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.directory.name)

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def algorithm(self) -> str:
        """The algorithm as its class is spelt, for example "APA"; "?" where the configuration has none."""
        section = self.config.get("algo")
        target = section.get("_target_") if isinstance(section, dict) else None
        return str(target).rpartition(".")[2] if target else "?"

    @property
    def lambda_(self) -> float | None:
        """λ, or None for an algorithm without one."""
        return self.config.get("lambda")

    @property
    def evaluations(self) -> list[dict]:
        """The iterations after which there was an evaluation; iteration 0 is the SFT model's."""
        return [line for line in self.metrics if line.get("eval/reward_mean") is not None]

    @property
    def sft(self) -> dict | None:
        """The evaluation of the SFT model, before any update; None where there was none."""
        return next((line for line in self.evaluations if line["iteration"] == 0), None)

    @property
    def final(self) -> dict | None:
        """The last evaluation; None where there was none."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def samples(self) -> int:
        """Responses seen in all."""
        return int(self.metrics[-1]["samples"])

    @property
    def minutes(self) -> float | None:
        """Minutes of sampling, scoring and updating together; None where times were not recorded."""
        keys = ("time/rollout_s", "time/score_s", "time/update_s")
        times = [line[key] for line in self.metrics for key in keys if line.get(key) is not None]
        return sum(times) / 60 if times else None

    def series(self, key: str) -> dict[int, float]:
        """The values of one metric by samples, where it was recorded."""
        return {int(line["samples"]): line[key] for line in self.metrics if line.get(key) is not None}

    def last(self, key: str) -> float | None:
        """The last recorded value of a metric."""
        return next((line[key] for line in reversed(self.metrics) if line.get(key) is not None), None)


def is_run(directory: Path) -> bool:
    """Whether `directory` has the two files that make it a run."""
    return (directory / "config.yaml").is_file() and (directory / "metrics.jsonl").is_file()


def find_runs(directory: Path) -> list[Path]:
    """`directory` itself if it is a run, else the runs anywhere in it, sorted; UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    if is_run(directory):
        return [directory]
    found = sorted(path.parent for path in directory.rglob("metrics.jsonl") if is_run(path.parent))
    if not found:
        raise UserError(f"{directory}: no run in it (a run has config.yaml and metrics.jsonl)")
    return found


def read_run(directory: Path) -> Run:
    """The run in `directory`; UserError, with the path, if it is no run or cannot be read."""
    directory = Path(directory)
    for name in ("config.yaml", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise UserError(f"{directory}: not a run, it has no {name}")
    return Run(directory, _read_config(directory / "config.yaml"), _read_metrics(directory / "metrics.jsonl"))


def _read_config(path: Path) -> dict:
    import yaml

    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: not readable as YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a configuration")
    return config


def _read_metrics(path: Path) -> list[dict]:
    """The lines of metrics.jsonl in order of iteration.

    Of an iteration that a resumed run repeated the later line counts. A last line cut short (the run is
    being written, or was killed) is left out.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable ({error})") from error
    by_iteration = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            metrics = json.loads(line)
            iteration, _ = int(metrics["iteration"]), int(metrics["samples"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):
                break
            raise UserError(f'{path}, line {number}: not JSON with "iteration" and "samples"') from error
        by_iteration[iteration] = metrics
    if not by_iteration:
        raise UserError(f"{path}: nothing recorded yet")
    return [by_iteration[iteration] for iteration in sorted(by_iteration)]
