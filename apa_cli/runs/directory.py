"""A run's directory: its lock, its claim by one run, and the writing of its files."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from apa_cli.errors import ConfigError, UserError
from apa_cli.hashing import hash_code, hash_path
from apa_cli.runs.environment import collect_environment
from apa_cli.runs.files import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    RESULT,
    SAMPLES,
    list_checkpoints,
    read_config,
    read_lines,
    read_result,
    read_state,
)
from apa_cli.runs.resume import AUTO, INPUTS, RESUME, find_differences, is_within

LOCK_FILE = ".lock"
"""File that a live run keeps locked; the lock ends with the process."""

SHOWN_DIFFERENCES = 5
"""Number of differences named in the message that refuses a resume."""


class RunDirectory:
    """Writer of one run's files; `RecordedRun` reads them.

    Two runs never share a directory; only a resume continues in one.
    """

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / METRICS
        self.samples = path / SAMPLES
        self.result = path / RESULT
        """The last figures; written when the run finishes."""
        self.checkpoints = path / "checkpoints"
        self.pools = path / "pools"
        """Files of the pools in the training state, of which each checkpoint stores the length."""

    # --- claiming -------------------------------------------------------------------------------------------

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Create the directory if it is missing, and lock it until the block, or the process, ends.

        Raise UserError if another live run has locked it, or if it is not writable.
        """
        lock = FileLock(self.path / LOCK_FILE, timeout=0)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise UserError(f"{self.path}: in use by another run; give another name=") from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from error
        try:
            yield
        finally:
            lock.release()

    def claim(self, config: dict[str, Any]) -> None:
        """Claim a fresh directory by writing its config.yaml. Raise UserError if it contains a run."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / CONFIG).exists():
                raise UserError(f"name: {self.path} already contains a run; give another name=, or {RESUME}={AUTO}")
            self._write_config(config)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from error

    def release(self) -> None:
        """Undo the claim of a run that failed before it recorded anything, so that its name is free again."""
        if not self.metrics.exists():
            for name in (CONFIG, ENVIRONMENT, "run.log", LOCK_FILE):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def clear(self) -> None:
        """Remove the files of a run that was killed before its first checkpoint, so that it can start again."""
        for name in (CONFIG, ENVIRONMENT, METRICS, SAMPLES, RESULT):
            (self.path / name).unlink(missing_ok=True)
        shutil.rmtree(self.pools, ignore_errors=True)

    # --- resuming -------------------------------------------------------------------------------------------

    @property
    def final_iteration(self) -> int | None:
        """The last iteration of a finished run; None if the run has not finished."""
        return (read_result(self.path) or {}).get("iteration")

    def check_resume(self, config: dict[str, Any]) -> None:
        """Raise ConfigError if `config` differs from the run's configuration in settings that may not change."""
        changeable = config.get("resume_changed") or []
        refused = [
            (key, old, new)
            for key, old, new in find_differences(read_config(self.path), config)
            if not any(is_within(key, section) for section in changeable) and not self._is_copy(key, new)
        ]
        if refused:
            shown = ", ".join(f"{key}: {old!r} → {new!r}" for key, old, new in refused[:SHOWN_DIFFERENCES])
            keys = ",".join(key for key, _, _ in refused)
            raise ConfigError(
                f"resume: the configuration differs from the run's: {shown}; leave these overrides out, or give "
                f"'resume_changed=[{keys}]' to continue with them"
            )

    def _is_copy(self, key: str, value: Any) -> bool:
        """Return True if `value` is another place of the same model, file or function that the run had under `key`."""
        try:
            saved = list_checkpoints(self.checkpoints)
            digest = (read_state(saved[-1]).get(INPUTS) or {}).get(key) if saved else None
        except UserError:
            return False
        return digest is not None and isinstance(value, str) and digest in (hash_path(value), hash_code(value))

    def truncate_records(self, config: dict[str, Any], iteration: int) -> None:
        """Remove the records after `iteration`, and write the configuration of the resumed run."""
        self.result.unlink(missing_ok=True)
        for file in (self.metrics, self.samples):
            if file.is_file():
                self._write_lines(file, read_lines(file, iteration))
        unchanged = {"name": read_config(self.path)["name"], "resume": None, "resume_changed": [], "stop_after": None}
        self._write_config({**config, **unchanged})

    def copy_records(self, source: RunDirectory, iteration: int) -> None:
        """Copy another run's metrics and samples up to `iteration`."""
        self._write_lines(self.metrics, read_lines(source.metrics, iteration))
        self._write_lines(self.samples, read_lines(source.samples, iteration))

    # --- writing --------------------------------------------------------------------------------------------

    def append_rows(self, file: Path, rows: list[dict[str, Any]]) -> None:
        """Append rows to a .jsonl file. Raise UserError if they cannot be written."""
        try:
            with file.open("a", encoding="utf-8") as handle:
                handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        except OSError as error:
            raise UserError(f"{file}: cannot be written ({error.strerror}); checkpoints are intact") from error

    def write_environment(self, **facts: Any) -> None:
        """Write environment.json: versions, machine and command, with `facts` of this run added."""
        replace_text(self.path / ENVIRONMENT, json.dumps({**collect_environment(), **facts}, indent=2) + "\n")

    def _write_config(self, config: dict[str, Any]) -> None:
        replace_text(self.path / CONFIG, yaml.safe_dump(config, sort_keys=False, allow_unicode=True))

    @staticmethod
    def _write_lines(file: Path, lines: list[str]) -> None:
        replace_text(file, "".join(f"{line}\n" for line in lines))


def replace_text(file: Path, text: str) -> None:
    """Write a file atomically: flush a temporary file to disk, then rename it. Raise UserError if that fails."""
    temporary = file.with_name(f".{file.name}.new")
    try:
        with temporary.open("w", encoding="utf-8") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{file}: cannot be written ({error.strerror})") from error
