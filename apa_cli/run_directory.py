"""A run's directory: claimed once, its config, environment, metrics and samples."""

from __future__ import annotations

import difflib
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from apa_cli.trust import without_secrets
from apa_cli.types import ConfigError, UserError

MAY_DIFFER = (
    "name", "resume", "resume_changed", "fork", "stop_after", "plan", "iterations", "eval_every", "checkpoint_every",
    "tracking", "evaluation", "checkpoint", "guard", "stop_at_kl", "launch", "run", "evaluate", "export", "chat",
    "bench",
)  # fmt: skip
"""Top-level keys in which a resumed run may differ from the one it continues."""

RESUME, FORK, AUTO = "resume", "fork", "auto"

CODE = ("target", "trust_remote_code")
"""Names of keys that make a run execute code of the user's; see `code_in`."""

WORDS_WITH_A_MEANING = {"null", "true", "false", "yes", "no", "on", "off", "inf", "nan"}
"""What the command line does not read as text unless it is quoted."""

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


def code_in(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every key by which a configuration runs code that is not the package's.

    A file in a run's directory must not make a command run code: these are asked for on the command line again.
    """
    found = []
    for key, value in config.items():
        inner = value if isinstance(value, list) else [value]
        parts = [part for part in inner if isinstance(part, dict)]
        if parts:
            within = [pair for part in parts for pair in code_in(part, f"{prefix}{key}.")]
            found += within if isinstance(value, dict) or not within else [(f"{prefix}{key}", value)]
        elif key in CODE and value:
            found.append((f"{prefix}{key}", value))
    return found


def resume_words(config: dict[str, Any], path: Path) -> list[str]:
    """The words with which the run in `path` goes on."""
    return [f"{RESUME}={path}", *(f"{key}={worded(value)}" for key, value in code_in(config))]


def worded(value: Any) -> str:
    """A value of a configuration as a word of the command line gives it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {worded(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(worded, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_/.][\w/.:-]*", value) and value.lower() not in WORDS_WITH_A_MEANING
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if plain else f"'{quoted}'"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def covers(key: str, dotted: str) -> bool:
    """Whether `key` is that dotted key, or a section it is in."""
    return dotted == key or dotted.startswith(f"{key}.")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two configurations differ, save in what may.

    Where `lambda` differs, the key of the algorithm that it sets does too, and is not counted again.
    """
    found = _differences(*({k: v for k, v in side.items() if k not in MAY_DIFFER} for side in (old, new)))
    pair = next(((before, after) for key, before, after in found if key == "lambda"), None)
    return [part for part in found if not (part[0].startswith("algo.") and part[1:] == pair)]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found


def environment() -> dict[str, Any]:
    """Versions, the package's git commit if it is a checkout, the machine, the words of the command."""
    packages = (
        "apa-cli",
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "hydra-core",
        "omegaconf",
        "accelerate",
        "peft",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": [Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    checkout = Path(__file__).resolve().parent.parent
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
