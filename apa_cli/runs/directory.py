"""A run's directory: claimed once, its config, environment, metrics and samples."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from apa_cli.errors import ConfigError, UserError
from apa_cli.runs.environment import environment
from apa_cli.runs.records import rows_until
from apa_cli.runs.resume import AUTO, RESUME, covers, differences

LOCK = ".lock"
"""The file that a live run holds locked; the lock ends with the process."""


class RunDirectory:
    """The files of one run. Two runs never share a directory; only a resume continues in one."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.result = path / "result.json"
        """The last figures; there when the run has finished."""
        self.checkpoints = path / "checkpoints"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keeps the directory, made where it is not there, for this process until the block or the process ends.

        UserError if another live run holds it, or if nothing can be written there.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.path}: in use by another live run") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot write there ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    def claim(self, config: dict[str, Any]) -> None:
        """Takes a fresh directory by creating its config.yaml. UserError if a run is there already."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / "config.yaml").exists():
                raise UserError(f"name: {self.path} holds a run already; give another name=, or {RESUME}={AUTO}")
            replace_text(self.path / "config.yaml", as_yaml(config))
        except OSError as error:
            raise UserError(f"{self.path}: cannot write there ({error.strerror})") from error

    def check_resume(self, config: dict[str, Any]) -> None:
        """ConfigError if the configuration is not the run's own, save in what may differ. Changes nothing."""
        differing = differences(self.recorded(), config)
        named = config.get("resume_changed") or []
        refused = [part for part in differing if not any(covers(key, part[0]) for key in named)]
        if refused:
            shown = ", ".join(f"{key}: {old!r} → {new!r}" for key, old, new in refused[:5])
            keys = ",".join(key for key, _, _ in refused)
            raise ConfigError(
                f"resume: the configuration differs from the run's: {shown}; leave these words out, or give "
                f"resume_changed=[{keys}] if the run is to go on with them"
            )

    def recorded(self) -> dict[str, Any]:
        """What is in config.yaml. UserError where it cannot be read."""
        try:
            config = yaml.safe_load((self.path / "config.yaml").read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UserError(f"resume: {self.path} has no readable config.yaml") from error
        if not isinstance(config, dict):
            raise UserError(f"resume: {self.path} has no readable config.yaml")
        return config

    def cut_back(self, config: dict[str, Any], iteration: int) -> None:
        """Drops the records after `iteration`, and takes over what the resumed run's configuration changed."""
        self.result.unlink(missing_ok=True)
        for file in (self.metrics, self.samples):
            if file.is_file():
                replace_text(file, "".join(f"{row}\n" for row in rows_until(file, iteration)))
        kept = {"name": self.recorded()["name"], "resume": None, "resume_changed": [], "stop_after": None}
        replace_text(self.path / "config.yaml", as_yaml({**config, **kept}))

    def copy_records(self, source: RunDirectory, iteration: int) -> None:
        """Takes over another run's metrics and samples up to `iteration`."""
        for own, other in ((self.metrics, source.metrics), (self.samples, source.samples)):
            replace_text(own, "".join(f"{row}\n" for row in rows_until(other, iteration)))

    def clear(self) -> None:
        """Removes what a run left that was killed before its first checkpoint, so that it can begin anew."""
        for name in ("config.yaml", "environment.json", "metrics.jsonl", "samples.jsonl", "result.json"):
            (self.path / name).unlink(missing_ok=True)

    def iterations_done(self) -> int | None:
        """The iterations that a finished run had; None where it has not finished."""
        try:
            return json.loads(self.result.read_text(encoding="utf-8"))["iteration"]
        except (OSError, ValueError, KeyError):
            return None

    def release(self) -> None:
        """Gives the directory's name back after a run that failed before it recorded anything."""
        if not self.metrics.exists():
            for name in ("config.yaml", "environment.json", "run.log", LOCK):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def record(self, file: Path, rows: list[dict[str, Any]]) -> None:
        """Adds lines to a file. UserError where they cannot be written."""
        try:
            with file.open("a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); checkpoints are intact") from error

    def write_environment(self, **facts: Any) -> None:
        replace_text(self.path / "environment.json", json.dumps({**environment(), **facts}, indent=2) + "\n")


def replace_text(file: Path, text: str) -> None:
    """Writes a file beside its place, so that it is on disk, and moves it there. UserError where that fails."""
    beside = file.with_name(f".{file.name}.new")
    try:
        with beside.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(file)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error


def as_yaml(config: dict[str, Any]) -> str:
    return yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
