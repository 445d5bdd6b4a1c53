"""Starting, continuing and ending one run of a command in its directory."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from apa_cli import checkpoint as checkpoints
from apa_cli.assembly import build_trainer, launch, load_examples, stage_progress
from apa_cli.console import Console
from apa_cli.plan import run_plan
from apa_cli.processes import ALONE, World, given, keep_log, started, take_part, wanted
from apa_cli.run_directory import RunDirectory
from apa_cli.settings import Config
from apa_cli.stages.cache import sft_model
from apa_cli.stages.fitting import Workplace
from apa_cli.stages.reward_model import run_reward
from apa_cli.stages.sft import run_sft
from apa_cli.types import ConfigError


def start(config: Config, path: Path, sweep: str | None) -> None:
    """apa-train: runs one job in `path`, or continues the run that `config.run.resume` names in its own directory."""
    if config.run.plan:
        print("\n".join(run_plan(config)))
        remove_if_empty(path)
        return
    if given():
        take_part(config.launch, run, config, path, sweep)
    elif (count := wanted(config.launch)) > 1:
        check_shares(config, count)
        started(config.launch, count, run, config, path, sweep)
    else:
        run(ALONE, config, path, sweep)


def run(world: World, config: Config, own: Path, sweep: str | None) -> None:
    """The part of a run that one of its processes does; `own` is the directory that it was given."""
    check_shares(config, world.size)
    path, resume = world.from_main(lambda: prepared(config, own, sweep))
    if path != own:
        remove_if_empty(own)  # named by the clock, which another process read a second later
    keep_log(world, path / "logs")
    directory = RunDirectory(path)
    trainer = None
    with Console(path / "run.log" if world.is_main else None, config.run.iterations) as console:
        try:
            trainer = build_trainer(config, path, sweep, resume, console, world)
            if resume is not None and world.is_main:
                directory.cut_back(config.raw, trainer.progress.iteration)
            trainer.train()
        except BaseException:
            if trainer is not None:
                trainer.tracker.finish(failed=True)
            if resume is None and world.is_main:
                directory.release()
            raise
        trainer.tracker.finish()
    # The next job of a sweep runs in this process: leave it nothing.
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def prepared(config: Config, path: Path, sweep: str | None) -> tuple[Path, Path | None]:
    """The run's directory, taken, and the checkpoint to go on from."""
    if config.run.resume is None:
        RunDirectory(path).claim(config.raw)
        return path, None
    if sweep is not None:
        raise ConfigError("resume: a sweep cannot be resumed as one; resume its runs by themselves")
    path, resume = checkpoints.located(config.run.resume)
    RunDirectory(path).check_resume(config.raw)
    return path, resume


def check_shares(config: Config, processes: int) -> None:
    """Each process gets as many sequences of a minibatch. ConfigError naming the numbers."""
    if config.run.minibatch % processes:
        raise ConfigError(f"minibatch: {config.run.minibatch} is not a multiple of the {processes} processes")


def start_sft(config: Config, path: Path) -> None:
    """apa-sft: fine-tunes `model.path`, or a new model of `model.architecture`."""

    def build(place: Workplace) -> dict[str, float]:
        return run_sft(config, *load_examples(config, place.say), config.run.seed, place)

    run_stage(config, path, build, "SFT", "model.path")


def start_reward(config: Config, path: Path) -> None:
    """apa-reward: trains on the trunk of `model.path`, or of the SFT stage's model."""

    def build(place: Workplace) -> dict[str, float]:
        data = load_examples(config, place.say)
        start = sft_model(config, *data, place.device, place.say, place.progress)
        return run_reward(replace(config, model=replace(config.model, path=start)), *data, config.run.seed, place)

    run_stage(config, path, build, "reward model", "reward.path")


def run_stage(config: Config, path: Path, build: Callable[[Workplace], dict[str, float]], name: str, key: str) -> None:
    """Runs a stage as a command of its own: model/, result.json, and what every run's directory holds.

    metrics.jsonl has a line per evaluation, its `iteration` the optimiser step.
    """
    resume = None
    if config.run.resume is not None:
        path, resume = checkpoints.located(config.run.resume)
    directory = RunDirectory(path)
    if resume is None:
        directory.claim(config.raw)
    else:
        directory.check_resume(config.raw)
        directory.cut_back(config.raw, int(resume.name.rpartition("_")[2]))
    try:
        with Console(path / "run.log", 0) as console:
            device = launch(config.launch)
            directory.write_environment(device=str(device), threads=torch.get_num_threads())
            place = Workplace(
                device=device,
                folder=path / "model",
                say=console.say,
                progress=stage_progress(console, name),
                record=lambda row: directory.record(directory.metrics, [row]),
                checkpoints=directory.checkpoints,
                resume=resume,
            )
            result = build(place)
            (path / "result.json").write_text(json.dumps(result, indent=2) + "\n")
            console.say(f"the model is in {path / 'model'}; use it with {key}={path / 'model'}")
    except BaseException:
        if resume is None and not directory.checkpoints.exists():
            directory.release()
        raise


def remove_if_empty(path: Path) -> None:
    """Hydra made the directory before it was known that nothing will be written to it."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
