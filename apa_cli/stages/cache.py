"""The cache of stage models: each is trained once, named after its inputs, and shared by all runs."""

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
from apa_cli.file_modes import apply_umask
from apa_cli.hashing import hash_chat_template, hash_examples, hash_model, hash_tokenizer
from apa_cli.settings import Config
from apa_cli.stages.fitting import ProgressFunction, SayFunction, StageContext
from apa_cli.stages.reward_model import train_reward_model
from apa_cli.stages.sft import train_sft_model
from apa_cli.types import Example


def fill_model_paths(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    device: torch.device,
    say: SayFunction,
    report_progress: ProgressFunction,
) -> Config:
    """Return the configuration with `model.path` and the reward's model filled in, running the stages that are missing.

    The stages depend on the model, the data, their own settings and `stages.seed`, never on the run's seed.
    """
    path = find_or_train_sft_model(config, train, held_out, device, say, report_progress)
    config = replace(config, model=replace(config.model, path=path))
    if config.reward.needs_trained_model:
        reward_path = find_or_train_reward_model(config, train, held_out, device, say, report_progress)
        config = replace(config, reward=config.reward.use_trained_model(reward_path))
    return config


def find_or_train_sft_model(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    device: torch.device,
    say: SayFunction,
    report_progress: ProgressFunction,
) -> str:
    """Return `model.path`, or if that is null the folder of the SFT stage's model."""
    if config.model.path is not None:
        return config.model.path

    def build(folder: Path) -> dict[str, float]:
        say("training the SFT model (once; later runs load it from the cache)")
        context = StageContext(device, folder, say, report_progress)
        return train_sft_model(config, train, held_out, config.stages.seed, context)

    key = {
        "model": _unwrap_enums(asdict(config.model)),
        "lora": asdict(config.lora),
        "form": config.dataset.prompt_style.value,
        "settings": _unwrap_enums(asdict(config.sft)),
    }
    return str(find_or_build(config, "sft", key, [train, held_out], build, say))


def find_or_train_reward_model(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    device: torch.device,
    say: SayFunction,
    report_progress: ProgressFunction,
) -> str:
    """Return the folder of the reward stage's model, which has the trunk of `model.path`."""

    def build(folder: Path) -> dict[str, float]:
        say("training the reward model (once; later runs load it from the cache)")
        context = StageContext(device, folder, say, report_progress)
        return train_reward_model(config, train, held_out, config.stages.seed, context)

    key = {
        "model": identify_model(config.model.resolved_path),
        "options": _unwrap_enums(asdict(replace(config.model, path=None))),
        "lora": asdict(config.lora),
        "settings": _unwrap_enums(asdict(config.reward_model)),
    }
    return str(find_or_build(config, "reward", key, [train, held_out], build, say))


def find_or_build(
    config: Config,
    stage: str,
    key: dict[str, Any],
    data: list[list[Example]],
    build: Callable[[Path], dict[str, float]],
    say: SayFunction,
) -> Path:
    """Return the folder of a stage's model: the cached one with the same key, or a new one.

    `build(folder)` fills a new folder and returns the stage's metrics. The folder gets its final name once it is
    complete, and a file lock keeps concurrent runs from building the same model twice.
    """
    root = Path(config.stages.cache_dir).expanduser()
    key = {**key, "seed": config.stages.seed, "data": hash_examples(*data), "code": hash_code()}
    text = json.dumps(key, sort_keys=True)
    folder = root / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if (folder / "stage.json").is_file():
            result = json.loads((folder / "stage.json").read_text())["result"]
            metrics = ", ".join(f"{name} {value:.3g}" for name, value in result.items())
            say(f"{stage} model from the cache: {folder} ({metrics})")
            return folder
        unfinished = Path(tempfile.mkdtemp(dir=root, prefix=f"{folder.name}-"))
        try:
            result = build(unfinished)
            (unfinished / "stage.json").write_text(json.dumps({"key": key, "result": result}, indent=2) + "\n")
            apply_umask(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        say(f"{stage} model saved in the cache: {folder}")
    return folder


def identify_model(path: str) -> list[str | None]:
    """Return the digests of a model's weights, tokenizer and chat template, or a hub id, which may not be cached."""
    is_folder = Path(path).expanduser().is_dir()
    return [hash_model(path), hash_tokenizer(path), hash_chat_template(path)] if is_folder else [path]


def hash_code() -> str:
    """Return a digest of the modules that determine a stage's model, this module excluded."""
    digest = hashlib.sha256()
    for package in (models, stages):
        for file in sorted(Path(str(package.__file__)).parent.glob("*.py")):
            if file.name != Path(__file__).name:
                digest.update(file.read_bytes())
    return digest.hexdigest()


def _unwrap_enums(values: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in values.items()}
