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
from apa_cli.hashing import hash_path, hash_target, split_target
from apa_cli.runs.console import Console
from apa_cli.runs.environment import collect_environment
from apa_cli.runs.files import (
    CONFIG,
    ENVIRONMENT,
    METRICS,
    POOLS,
    RESULT,
    SAMPLES,
    list_checkpoints,
    read_config,
    read_lines,
    read_result,
    read_rows,
)
from apa_cli.runs.records import RecordedRun
from apa_cli.runs.resume import AUTO, RESUME, find_differences, is_within
from apa_cli.secrets import iterate_leaves

LOCK_FILE = ".lock"
"""File that a live run keeps locked; the lock ends with the process."""

RUN_LOG = "run.log"

RESULTS = (RESULT, "eval.json", "bench.json", "model")
"""What finished runs of the commands leave."""

WRITTEN = (
    CONFIG, ENVIRONMENT, METRICS, SAMPLES, RESULT, RUN_LOG, "curves.png", "bench.json", "eval.json",
    "eval_iteration_*.json", ".*.new", "checkpoints", POOLS, "model", "critic", "faults", "logs", "export",
    "export_iteration_*", "wandb", "tensorboard",
)  # fmt: skip
"""Names of all that a run, and the commands that look at it, write to its directory."""

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
        self.pools = path / POOLS
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
        """Claim the directory for a new run by writing its config.yaml.

        With `overwrite` the files of a run in it are removed first; without, those of a run that ended before its
        first iteration, and a line says so. Raise UserError if it contains any other run.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if config.get("overwrite"):
                self.remove_run(config)
            elif self.has_run():
                self._check_unused()
                print(f"{self.path}: a run that ended before its first iteration is replaced", flush=True)
                self.clear()
            self._write_config(config)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written to ({error.strerror})") from error

    def has_run(self) -> bool:
        """Return True if the directory has one of the files by which a run is known."""
        return any((self.path / name).exists() for name in (CONFIG, METRICS, *RESULTS)) or self.checkpoints.exists()

    def count_iterations(self) -> int:
        """Return the last iteration, or optimizer step, in metrics.jsonl. Raise UserError if it cannot be read."""
        rows = read_rows(self.metrics) if self.metrics.is_file() else []
        return max((row["iteration"] for row in rows), default=0)

    def _check_unused(self) -> None:
        """Raise UserError unless the run in the directory ended before its first iteration and left no result."""
        has_results = any((self.path / name).exists() for name in RESULTS)
        if has_results or list_checkpoints(self.checkpoints):
            advice = f"give another name=, {RESUME}={AUTO} to continue it, or overwrite=true to remove it"
            raise UserError(f"name: {self.path} already contains a run; {advice}")
        if done := self.count_iterations():
            raise UserError(
                f"name: {self.path} already contains a run that ended after {done} iterations without a checkpoint; "
                f"give another name=, or overwrite=true to remove it"
            )

    def remove_run(self, config: dict[str, Any]) -> None:
        """Remove what a run wrote to the directory, and nothing else; links are removed, never followed.

        Raise ConfigError if there is something else than a run, or if the configuration `config` reads from it.
        """
        others = [path for path in self.path.iterdir() if path.name != LOCK_FILE]
        if not self.has_run() and all(is_written(path) for path in others):  # a run that could not start left run.log
            return
        if self.path.is_symlink():
            raise ConfigError(f"overwrite: {self.path} is a link, whose target is left alone; give another name=")
        if not self._looks_like_run():
            raise ConfigError(f"overwrite: {self.path} is not the directory of a run; give another name=")
        for key, value in iterate_leaves(config):
            file = value.rpartition(":")[0] or value if isinstance(value, str) and key.endswith("target") else value
            if isinstance(file, str) and "/" in file and is_inside(Path(file), self.path):
                raise ConfigError(f"overwrite: {key} is in {self.path}, which would be removed; give another name=")
        for path in others:
            if is_written(path) and path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif is_written(path):
                path.unlink()
        print(f"{self.path}: the run in it is removed (overwrite=true)", flush=True)

    def _looks_like_run(self) -> bool:
        """Return True if config.yaml is that of a run."""
        try:
            return {"name", "seed", "algo", "model", "dataset"} <= read_config(self.path).keys()
        except UserError:
            return False

    @contextmanager
    def record_failure(self, console: Console) -> Iterator[None]:
        """Write an error that ends the block to run.log, and undo the claim if no checkpoint exists.

        run.log stays, so that a traceback is not lost, unless the error has none: a wrong configuration, a signal.
        """
        try:
            yield
        except BaseException as error:
            console.log_failure(error)
            if not self.checkpoints.exists():
                has_traceback = not isinstance(error, UserError | KeyboardInterrupt) or error.__cause__ is not None
                self.release(keep_log=has_traceback and not isinstance(error, ConfigError))
            if (self.path / RUN_LOG).is_file():
                error.add_note(f"the traceback is in {self.path / RUN_LOG}")
            raise

    def release(self, keep_log: bool = False) -> None:
        """Undo the claim of a run that failed before it recorded anything, so that its name is free again."""
        if not self.metrics.exists():
            for name in (CONFIG, ENVIRONMENT, LOCK_FILE, *(() if keep_log else (RUN_LOG,))):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def clear(self) -> None:
        """Remove the records of a run that was killed before its first checkpoint, so that it can start again."""
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
            if not any(is_within(key, section) for section in changeable) and not self._is_copy(key, old, new)
        ]
        if refused:
            shown = ", ".join(f"{key}: {old!r} → {new!r}" for key, old, new in refused[:SHOWN_DIFFERENCES])
            keys = ",".join(key for key, _, _ in refused)
            raise ConfigError(
                f"resume: the configuration differs from the run's: {shown}; leave these overrides out, or give "
                f"'resume_changed=[{keys}]' to continue with them"
            )

    def _is_copy(self, key: str, old: Any, value: Any) -> bool:
        """Return True if `value` is another place of the same model, file or function as the run's `old` of `key`."""
        try:
            digest = (RecordedRun(self.path).inputs or {}).get(key)
        except UserError:
            return False
        if digest is None or not isinstance(value, str):
            return False
        is_same_name = split_target(str(old))[1] == split_target(value)[1]  # the digest is of the whole file
        return digest == hash_path(value) or (digest == hash_target(value) and is_same_name)

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


def is_written(path: Path) -> bool:
    """Return True if a path in a run's directory has a name of WRITTEN."""
    return any(path.match(pattern) for pattern in WRITTEN)


def is_inside(path: Path, folder: Path) -> bool:
    """Return True if an existing path is in the folder, links resolved."""
    path = path.expanduser()
    return path.exists() and path.resolve().is_relative_to(folder.resolve())


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
