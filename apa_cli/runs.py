"""Starting, continuing and ending one run of a command in its directory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import torch

from apa_cli import checkpoint as checkpoints
from apa_cli.assembly import build_trainer, launch, load_examples, stage_progress
from apa_cli.console import Console
from apa_cli.plan import run_plan
from apa_cli.run_directory import RunDirectory
from apa_cli.settings import Config
from apa_cli.stages.cache import sft_model
from apa_cli.stages.reward_model import run_reward
from apa_cli.stages.sft import run_sft
from apa_cli.types import ConfigError


def start(config: Config, path: Path, sweep: str | None) -> None:
    """apa-train: runs one job in `path`, or continues the run that `config.run.resume` names in its own directory."""
    if config.run.plan:
        print("\n".join(run_plan(config)))
        remove_if_empty(path)
        return
    resume = None
    if config.run.resume is not None:
        if sweep is not None:
            raise ConfigError("resume: a sweep cannot be resumed as one; resume its runs by themselves")
        path, resume = checkpoints.located(config.run.resume)
    directory = RunDirectory(path)
    if resume is None:
        directory.claim(config.raw)
    else:
        directory.check_resume(config.raw)
    trainer = None
    with Console(path / "run.log", config.run.iterations) as console:
        try:
            trainer = build_trainer(config, path, sweep, resume, console)
            if resume is not None:
                directory.cut_back(config.raw, trainer.progress.iteration)
            trainer.train()
        except BaseException:
            if trainer is not None:
                trainer.tracker.finish(failed=True)
            if resume is None:
                directory.release()
            raise
        trainer.tracker.finish()
    # The next job of a sweep runs in this process: leave it nothing.
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def start_sft(config: Config, path: Path) -> None:
    """apa-sft: fine-tunes `model.path`, or a new model of `model.architecture`."""

    def build(folder: Path, device: torch.device, console: Console) -> dict[str, float]:
        data = load_examples(config, console.say)
        progress = stage_progress(console, "SFT")
        return run_sft(config.model, config.sft, *data, config.run.seed, device, folder, console.say, progress)

    run_stage(config, path, build, "model.path")


def start_reward(config: Config, path: Path) -> None:
    """apa-reward: trains on the trunk of `model.path`, or of the SFT stage's model."""

    def build(folder: Path, device: torch.device, console: Console) -> dict[str, float]:
        train, held_out = load_examples(config, console.say)
        start = sft_model(config, train, held_out, device, console.say, stage_progress(console, "SFT"))
        return run_reward(
            config.model, start, config.reward_model, train, held_out, config.run.seed, device, folder, console.say,
            stage_progress(console, "reward model"),
        )  # fmt: skip

    run_stage(config, path, build, "reward.path")


def run_stage(
    config: Config, path: Path, build: Callable[[Path, torch.device, Console], dict[str, float]], key: str
) -> None:
    """Runs a stage as a command of its own: model/, result.json, config.yaml, environment.json, run.log."""
    directory = RunDirectory(path)
    directory.claim(config.raw)
    with Console(path / "run.log", 0) as console:
        device = launch(config.launch)
        directory.write_environment(device=str(device), threads=torch.get_num_threads())
        result = build(path / "model", device, console)
        (path / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        console.say(f"the model is in {path / 'model'}; use it with {key}={path / 'model'}")


def remove_if_empty(path: Path) -> None:
    """Hydra made the directory before it was known that nothing will be written to it."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
