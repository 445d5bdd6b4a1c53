"""Recorded runs: a run's directory, or one checkpoint in it, as one object."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.files import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    SAMPLES,
    STATE,
    list_checkpoints,
    read_config,
    read_object,
    read_result,
    read_rows,
    read_state,
)
from apa_cli.runs.old_names import translate_old_names
from apa_cli.runs.resume import INPUTS


@dataclass(frozen=True)
class RecordedRun:
    """Reader of a run's directory, and optionally of one checkpoint in it.

    Each file is read once, on first use; values are shared, so copy a value before changing it.
    """

    directory: Path
    checkpoint: Path | None = None

    @classmethod
    def find(cls, name: str) -> RecordedRun:
        """Return the run of apa-train, or the checkpoint of such a run, that `run=NAME` names.

        Raise ConfigError, with the nearest folder, if NAME is neither, or if the configuration cannot be read.
        """
        path = Path(name).expanduser()
        is_checkpoint = path.parent.name == "checkpoints" and (path / STATE).is_file()
        run = cls(path.parent.parent, path) if is_checkpoint else cls(path)
        for file in (CONFIG, ENVIRONMENT, METRICS):
            if not (run.directory / file).is_file():
                raise ConfigError(
                    f"run: {path} is neither a run of apa-train nor its checkpoint ({_explain_missing(file, path)})"
                )
        run.check_trained()
        return run

    @classmethod
    def read(cls, directory: Path) -> RecordedRun:
        """Return the run in `directory`, its configuration and metrics read.

        Raise UserError, naming the file, if a file is missing or cannot be read.
        """
        run = cls(Path(directory))
        for name in (CONFIG, METRICS):
            if not (run.directory / name).is_file():
                raise UserError(f"{run.directory}: not a run (it has no {name})")
        _ = run.config_yaml, run.environment, run.metrics
        return run

    def check_trained(self) -> None:
        """Raise ConfigError unless config.yaml and environment.json are readable and belong to a run of apa-train."""
        try:
            is_trained = "policy" in self.environment
            _ = self.config_yaml["model"]["path"], dict(self.config_yaml["reward"])
        except (UserError, KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"run: {CONFIG} or {ENVIRONMENT} of {self.directory} cannot be read") from error
        if not is_trained:
            model = self.directory / "model"
            raise ConfigError(f"run: {self.directory} is not a run of apa-train; give model.path={model} instead")

    # --- files ----------------------------------------------------------------------------------------------

    @cached_property
    def config_yaml(self) -> dict[str, Any]:
        """config.yaml with the current key names. Raises UserError if it cannot be read."""
        return translate_old_names(read_config(self.directory))

    @cached_property
    def config(self) -> dict[str, Any]:
        """`config_yaml` with the paths of the stages' models, which environment.json records, filled in."""
        config = copy.deepcopy(self.config_yaml)
        model, reward = config["model"], config["reward"]
        model["path"] = model["path"] or self.environment["policy"]
        if "path" in reward:
            reward["path"] = reward["path"] or self.environment["reward"]
        return config

    @cached_property
    def environment(self) -> dict[str, Any]:
        """environment.json; empty if there is none. Raises UserError if it cannot be read."""
        file = self.directory / ENVIRONMENT
        return read_object(file) if file.is_file() else {}

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of metrics.jsonl, one per iteration, in order. Raises UserError if there is no row or one is unreadable.

        If a resumed run repeated an iteration, the later row counts.
        """
        file = self.directory / METRICS
        rows = {row["iteration"]: row for row in read_rows(file, ("iteration", "samples"))}
        if not rows:
            raise UserError(f"{file}: nothing recorded yet")
        return [rows[iteration] for iteration in sorted(rows)]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl: the responses to the evaluation prompts, one evaluation after the other."""
        return read_rows(self.directory / SAMPLES)

    @cached_property
    def result(self) -> dict[str, Any] | None:
        """result.json, the last figures of a finished run; None if the run has not finished."""
        return read_result(self.directory)

    @property
    def model_folder(self) -> Path:
        """The trained model, which a run writes at its end. Raises UserError if the run has not finished."""
        folder = self.directory / "model"
        if not (folder / "config.json").is_file():
            raise UserError(
                f"run: {self.directory} has not finished, so it has no model/; name one of its checkpoints instead"
            )
        return folder

    @property
    def iteration(self) -> int:
        """The iteration that produced the policy: the checkpoint's, or the last one recorded."""
        last = self.metrics[-1] if self.checkpoint is None else read_state(self.checkpoint)
        return int(last["iteration"])

    @property
    def wandb_id(self) -> str | None:
        """The id of the run's wandb run, as the last checkpoint records it; None if there is none."""
        checkpoints = list_checkpoints(self.directory / "checkpoints")
        return read_state(checkpoints[-1])["wandb_id"] if checkpoints else None

    @property
    def inputs(self) -> dict[str, str] | None:
        """Digests of the run's inputs, as the checkpoint, or else the last one, records them; None if none does."""
        checkpoints = [self.checkpoint] if self.checkpoint else list_checkpoints(self.directory / "checkpoints")
        return read_state(checkpoints[-1]).get(INPUTS) if checkpoints else None

    # --- configuration --------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.config_yaml.get("name") or self.directory.name)

    @property
    def seed(self) -> int | None:
        return self.config_yaml.get("seed")

    @property
    def lambda_(self) -> float | None:
        """λ; None for an algorithm without it."""
        return self.config_yaml.get("lambda")

    @property
    def lambda_meaning(self) -> str | None:
        """The meaning of λ in the run's algorithm, as environment.json records it, else None."""
        return self._algorithm.get("lambda_meaning")

    @property
    def label(self) -> str:
        """The algorithm's label, or else the name of its class; "?" if the configuration has none."""
        section = self.config_yaml.get("algo")
        target = section.get("_target_") if isinstance(section, dict) else None
        return self._algorithm.get("label") or (str(target).rpartition(".")[2] if target else "?")

    @property
    def color(self) -> str | None:
        """The algorithm's color in plots, as environment.json records it, else None."""
        return self._algorithm.get("color")

    @property
    def _algorithm(self) -> dict[str, Any]:
        section = self.environment.get("algorithm")
        return section if isinstance(section, dict) else {}

    # --- metrics --------------------------------------------------------------------------------------------

    @property
    def evaluations(self) -> list[dict[str, Any]]:
        """Rows of the iterations after which there was an evaluation; iteration 0 is the SFT model's."""
        return [row for row in self.metrics if row.get("eval/reward_mean") is not None]

    @property
    def sft(self) -> dict[str, Any] | None:
        """The evaluation of the SFT model, before any update; None if there was none."""
        return next((row for row in self.evaluations if row["iteration"] == 0), None)

    @property
    def final(self) -> dict[str, Any] | None:
        """The last evaluation; None if there was none."""
        return self.evaluations[-1] if self.evaluations else None

    @property
    def sample_count(self) -> int:
        """Total number of sampled responses."""
        return int(self.metrics[-1]["samples"])

    @property
    def minutes(self) -> float | None:
        """Total minutes of sampling, scoring and updates; None if no times were recorded."""
        keys = ("time/rollout_s", "time/score_s", "time/update_s")
        times = [row[key] for row in self.metrics for key in keys if row.get(key) is not None]
        return sum(times) / 60 if times else None

    def get_series(self, key: str) -> dict[int, float]:
        """Return the recorded values of one metric, by the number of responses sampled so far."""
        return {int(row["samples"]): row[key] for row in self.metrics if row.get(key) is not None}

    def get_last(self, key: str) -> float | None:
        """Return the last recorded value of a metric; None if there is none."""
        return next((row[key] for row in reversed(self.metrics) if row.get(key) is not None), None)


# --- search -------------------------------------------------------------------------------------------------


def is_run(directory: Path) -> bool:
    """Return True if `directory` has the two files that make it a run."""
    return (directory / CONFIG).is_file() and (directory / METRICS).is_file()


def find_runs(directory: Path) -> list[Path]:
    """Return `directory` if it is a run, else the runs anywhere in it, sorted. Raise UserError if there is none."""
    if not directory.is_dir():
        raise UserError(f"{directory}: no such folder")
    if is_run(directory):
        return [directory]
    runs = sorted(path.parent for path in directory.rglob(METRICS) if is_run(path.parent))
    if not runs:
        raise UserError(f"{directory}: no run in it (a run has {CONFIG} and {METRICS})")
    return runs


def suggest_nearest(path: Path) -> str:
    """Return "; did you mean …?" with the nearest name among the folders next to the missing `path`, else ""."""
    if path.exists() or not path.parent.is_dir():
        return ""
    folders = sorted(each.name for each in path.parent.iterdir() if each.is_dir())
    close = difflib.get_close_matches(path.name, folders, 1)
    return f"; did you mean {path.parent / close[0]}?" if close else ""


def _explain_missing(file: str, path: Path) -> str:
    """Return the reason why `path`, whose run lacks `file`, is not a run."""
    if not any((path / name).is_file() for name in ("config.json", "adapter_config.json")):
        return f"there is no {file}{suggest_nearest(path)}"
    reason = f"for a model alone give model.path={path}"
    return f"its run is {path.parent}, and {reason}" if (path.parent / METRICS).is_file() else reason
