"""Stage models on demand: built once, kept under a name made of what shapes them, shared by all runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from apa_cli import models, stages
from apa_cli.settings import Config
from apa_cli.stages.fitting import Workplace
from apa_cli.stages.reward_model import run_reward
from apa_cli.stages.sft import run_sft
from apa_cli.types import Example

Say = Callable[[str], None]
Progress = Callable[[int, int, float], None]


def resolved(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    device: torch.device,
    say: Say,
    progress: Progress,
) -> Config:
    """The configuration with `model.path` and the reward's model filled in, their stages run where needed.

    The stages depend on the model, the data, their own settings and `stages.seed`, never on the run's seed.
    """
    path = sft_model(config, train, held_out, device, say, progress)
    config = replace(config, model=replace(config.model, path=path))
    if config.reward.lacks_model:
        config = replace(
            config,
            reward=config.reward.with_model(reward_model(config, train, held_out, device, say, progress)),
        )
    return config


def sft_model(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    device: torch.device,
    say: Say,
    progress: Progress,
) -> str:
    """`model.path`, or the folder of the SFT stage's model."""
    if config.model.path is not None:
        return config.model.path

    def build(folder: Path) -> dict[str, float]:
        say("building the SFT model (once; later runs take it from the cache)")
        return run_sft(config, train, held_out, config.stages.seed, Workplace(device, folder, say, progress))

    key = {
        "model": _plain(asdict(config.model)),
        "lora": asdict(config.lora),
        "form": config.dataset.prompt_form.value,
        "settings": _plain(asdict(config.sft)),
    }
    return str(cached(config, "sft", key, [train, held_out], build, say))


def reward_model(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    device: torch.device,
    say: Say,
    progress: Progress,
) -> str:
    """The folder of the reward stage's model, on the trunk of `config.model.path`."""

    def build(folder: Path) -> dict[str, float]:
        say("training the reward model (once; later runs take it from the cache)")
        return run_reward(config, train, held_out, config.stages.seed, Workplace(device, folder, say, progress))

    key = {
        "model": identity(config.model.path),
        "options": _plain(asdict(replace(config.model, path=None))),
        "lora": asdict(config.lora),
        "settings": _plain(asdict(config.reward_model)),
    }
    return str(cached(config, "reward", key, [train, held_out], build, say))


def cached(
    config: Config,
    stage: str,
    key: dict[str, Any],
    data: list[list[Example]],
    build: Callable[[Path], dict[str, float]],
    say: Say,
) -> Path:
    """The folder of a stage's model: an earlier one with the same key, or a new one, put in place when complete."""
    root = Path(config.stages.cache_dir).expanduser()
    key = {**key, "seed": config.stages.seed, "data": digest_of_data(*data), "code": digest_of_code()}
    text = json.dumps(key, sort_keys=True)
    folder = root / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "stage.json").is_file():
            result = json.loads((folder / "stage.json").read_text())["result"]
            facts = ", ".join(f"{name} {value:.3g}" for name, value in result.items())
            say(f"{stage} model from the cache: {folder} ({facts})")
            return folder
        half_built = Path(tempfile.mkdtemp(dir=root, prefix=f"{folder.name}-"))
        try:
            result = build(half_built)
            (half_built / "stage.json").write_text(json.dumps({"key": key, "result": result}, indent=2) + "\n")
            half_built.rename(folder)
        finally:
            shutil.rmtree(half_built, ignore_errors=True)
        say(f"{stage} model kept in {folder}")
    return folder


def digest_of_data(*parts: list[Example]) -> str:
    """A digest of every prompt, as text and as messages, and reply."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(json.dumps([example.prompt, example.chosen, example.rejected, example.messages]).encode())
        digest.update(b"\0")
    return digest.hexdigest()


def identity(model: str) -> list[Any]:
    """What tells one version of a model from another: a hub id, or a folder's files with their sizes and times."""
    folder = Path(model).expanduser()
    files = sorted(file for file in folder.iterdir() if file.is_file()) if folder.is_dir() else []
    return [model, *([file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files)]


def digest_of_code() -> str:
    """A digest of the modules that shape a stage's model."""
    digest = hashlib.sha256()
    for package in (models, stages):
        for file in sorted(Path(package.__file__).parent.glob("*.py")):
            if file.name != Path(__file__).name:
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in values.items()}
