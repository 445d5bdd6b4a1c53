"""A run's directory: claimed once, its config, environment, metrics and samples."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from apa_cli.trust import without_secrets
from apa_cli.types import ConfigError, UserError

MAY_DIFFER = (
    "name", "resume", "plan", "iterations", "eval_every", "checkpoint_every",
    "tracking", "evaluation", "checkpoint", "guard", "stop_at_kl", "launch", "run", "evaluate", "export", "chat",
)  # fmt: skip
"""Top-level keys in which a resumed run may differ from the one it continues."""


class RunDirectory:
    """The files of one run. Two runs never share a directory; only a resume continues in one."""

    def __init__(self, path: Path):
        self.path = path
        self.metrics = path / "metrics.jsonl"
        self.samples = path / "samples.jsonl"
        self.checkpoints = path / "checkpoints"

    def claim(self, config: dict[str, Any]) -> None:
        """Takes a fresh directory by creating its config.yaml. UserError if a run is there already."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            with (self.path / "config.yaml").open("x") as handle:
                yaml.safe_dump(config, handle, sort_keys=False, allow_unicode=True)
        except FileExistsError as error:
            raise UserError(
                f"name: {self.path} holds a run already; give another name=, or resume={self.path}"
            ) from error
        except OSError as error:
            raise UserError(f"{self.path}: cannot write there ({error.strerror})") from error

    def check_resume(self, config: dict[str, Any]) -> None:
        """ConfigError if the configuration is not the run's own, save in what may differ. Changes nothing."""
        try:
            before = yaml.safe_load((self.path / "config.yaml").read_text())
        except (OSError, yaml.YAMLError) as error:
            raise UserError(f"resume: {self.path} has no readable config.yaml") from error
        differing = differences(before, config)
        if differing:
            shown = ", ".join(f"{key}: {old!r} → {new!r}" for key, old, new in differing[:5])
            raise ConfigError(
                f"resume: the configuration differs from the run's: {shown}; give the words it was started with"
            )

    def cut_back(self, config: dict[str, Any], iteration: int) -> None:
        """Drops the records after `iteration`, and takes over what the resumed run's configuration changed."""
        for file in (self.metrics, self.samples):
            if file.is_file():
                rows = [line for line in file.read_text().splitlines() if json.loads(line)["iteration"] <= iteration]
                replace_text(file, "".join(f"{row}\n" for row in rows))
        name = yaml.safe_load((self.path / "config.yaml").read_text())["name"]
        text = yaml.safe_dump({**config, "name": name, "resume": None}, sort_keys=False, allow_unicode=True)
        replace_text(self.path / "config.yaml", text)

    def release(self) -> None:
        """Gives the directory's name back after a run that failed before it recorded anything."""
        if not self.metrics.exists():
            for name in ("config.yaml", "environment.json", "run.log"):
                (self.path / name).unlink(missing_ok=True)
            if not any(self.path.iterdir()):
                self.path.rmdir()

    def record(self, file: Path, rows: list[dict[str, Any]]) -> None:
        with file.open("a") as handle:
            handle.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def write_environment(self, **facts: Any) -> None:
        (self.path / "environment.json").write_text(json.dumps({**environment(), **facts}, indent=2) + "\n")


def located_run(name: str) -> tuple[Path, Path | None]:
    """The directory of the run that run=NAME names, and the checkpoint if NAME is one. ConfigError for any other."""
    path = Path(name).expanduser()
    is_checkpoint = path.parent.name == "checkpoints" and (path / "state.json").is_file()
    directory = path.parent.parent if is_checkpoint else path
    for file in ("config.yaml", "environment.json", "metrics.jsonl"):
        if not (directory / file).is_file():
            raise ConfigError(f"run: {path} is no run of apa-train and no checkpoint of one (there is no {file})")
    return directory, path if is_checkpoint else None


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
    """Writes a file beside its place and moves it there."""
    beside = file.with_name(f".{file.name}.new")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two configurations differ, save in what may."""
    found = []
    for key in dict.fromkeys([*old, *new]):
        if not prefix and key in MAY_DIFFER:
            continue
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{prefix}{key}.")
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
