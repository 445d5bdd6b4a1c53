"""Starting, continuing and ending one run of a command in its directory."""

from __future__ import annotations

import gc
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from apa_cli.distributed.spawn import given, keep_log, started, take_part, wanted
from apa_cli.distributed.world import ALONE, World
from apa_cli.errors import ConfigError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory, replace_text
from apa_cli.runs.resume import AUTO, FORK, RESUME, differences, resume_words
from apa_cli.runs.stopping import Stopped, Stopping
from apa_cli.settings import Config
from apa_cli.stages.cache import sft_model
from apa_cli.stages.fitting import Workplace
from apa_cli.stages.reward_model import run_reward
from apa_cli.stages.sft import run_sft
from apa_cli.training.build import build_trainer, launch, load_examples, stage_progress
from apa_cli.training.dry_run import run_plan
from apa_cli.training.trainer import Trainer

SWEEP_AGAIN = f"the same words and {RESUME}={AUTO}"


def start(config: Config, path: Path, sweep: str | None) -> None:
    """apa-train: runs one job in `path`, or continues the run that `config.run.resume` names in its own directory.

    Raises `Stopped` where a signal or `stop_after` ended it before its last iteration.
    """
    if config.run.dry_run:
        print("\n".join(run_plan(config)))
        remove_if_empty(path)
        return
    if given():
        take_part(config.launch, attend, config, path, sweep)
    elif (count := wanted(config.launch)) > 1:
        check_shares(config, count)
        started(config.launch, count, attend, config, path, sweep)
    else:
        attend(ALONE, config, path, sweep)


def attend(world: World, config: Config, path: Path, sweep: str | None) -> None:
    """A run as one of its processes lives it: it may be stopped, and then says how it goes on."""
    check_shares(config, world.size)
    with Stopping(config.run.stop_after) as stopping:
        if stopping.out_of_time:
            remove_if_empty(path)
            raise Stopped(f"stop_after={config.run.stop_after}: no time is left to begin", stopping.status())
        try:
            run(world, config, path, sweep, stopping)
        except Stopped as stopped:
            where = directory_of(config, path, sweep)
            how = SWEEP_AGAIN if sweep else resume_command("apa-train", config, where)
            raise Stopped(f"{stopped}; go on with: {how}", stopped.status) from None
        except KeyboardInterrupt as error:
            if sweep:
                error.args = (f"{error}; go on with: {SWEEP_AGAIN}",)
            raise
        if sweep and stopping.requested:
            raise Stopped(
                f"stopped by {stopping.requested} between two runs of the sweep; go on with: {SWEEP_AGAIN}",
                stopping.status(),
            )


def run(world: World, config: Config, given_path: Path, sweep: str | None, stopping: Stopping) -> None:
    """One job, from its directory to its results."""
    with ExitStack() as held:
        path, found, finished = world.from_main(lambda: taken(held, config, given_path, sweep))
        if path != given_path:
            remove_if_empty(given_path)  # named by the clock, which another process read a second later
        if finished:
            return
        keep_log(world, path / "logs")
        directory, trainer = RunDirectory(path), None
        with Console(path / "run.log" if world.is_main else None, config.run.iterations) as console:
            try:
                checkpoint = world.from_main(lambda: checkpoints.latest_good(found, console.say) if found else None)
                trainer = build_trainer(config, path, sweep, checkpoint, console, world)
                trainer.stopping = stopping
                if checkpoint is not None:
                    world.from_main(partial(take_over, trainer, checkpoint.parent.parent))
                trainer.train()
            except BaseException as error:
                if trainer is not None:
                    trainer.tracker.finish(failed=not isinstance(error, Stopped))
                if world.is_main and not directory.checkpoints.exists():
                    directory.release()
                raise
            trainer.tracker.finish()
    # The next job of a sweep runs in this process: leave it nothing.
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_shares(config: Config, processes: int) -> None:
    """Each process gets as many sequences of a minibatch. ConfigError naming the numbers."""
    if config.run.minibatch_size % processes:
        raise ConfigError(f"minibatch_size: {config.run.minibatch_size} is not a multiple of the {processes} processes")


def taken(held: ExitStack, config: Config, path: Path, sweep: str | None) -> tuple[Path, list[Path], bool]:
    """The run's directory, kept for this process while `held` lasts; the checkpoints it can go on from; whether it
    has finished."""
    path = directory_of(config, path, sweep)
    directory = RunDirectory(path)
    held.enter_context(directory.held())
    found = found_in(config, path)
    done = directory.iterations_done()
    if config.run.resume == AUTO and done is not None and done >= config.run.iterations:
        print(f"{path}: finished ({done} iterations), nothing is left to do", flush=True)
        return path, found, True
    begin(directory, config, found)
    if not found and config.run.fork is not None:
        found = checkpoints.located(config.run.fork)[1]
    return path, found, False


def directory_of(config: Config, path: Path, sweep: str | None) -> Path:
    """`path`, or the directory of the run that resume=PATH names. UserError where it has no checkpoint."""
    resume = config.run.resume
    if resume in (None, AUTO):
        return path
    if sweep is not None:
        raise ConfigError(f"resume: a sweep is resumed as one, with its own words and resume={AUTO}")
    return checkpoints.located(resume)[0]


def found_in(config: Config, path: Path) -> list[Path]:
    """The checkpoints in `path` that the run can go on from; none: it begins there."""
    resume = config.run.resume
    if resume is None:
        return []
    return checkpoints.all_in(path / "checkpoints") if resume == AUTO else checkpoints.located(resume)[1]


def begin(directory: RunDirectory, config: Config, found: list[Path]) -> None:
    """Takes a new directory, or makes sure that the run in it is the one that is to go on."""
    if found:
        directory.check_resume(config.raw)
        return
    if config.run.resume == AUTO and not directory.result.exists():
        directory.clear()
    directory.claim(config.raw)


def take_over(trainer: Trainer, source_path: Path) -> None:
    """The records up to where the state of `trainer` was saved: the run's own cut back, or another's copied."""
    config, directory, iteration = trainer.config, trainer.directory, trainer.progress.iteration
    source = RunDirectory(source_path)
    changed = [f"{key} {old!r} → {new!r}" for key, old, new in differences(source.recorded(), config.raw)]
    if source.path == directory.path:
        checkpoints.drop_after(directory.checkpoints, iteration)
        directory.cut_back(config.raw, iteration)
        trainer.console.say(f"goes on after iteration {iteration}")
    else:
        directory.copy_records(source, iteration)
        trainer.console.say(f"forked from {source.path} after iteration {iteration}")
    if changed:
        trainer.console.say(f"from iteration {iteration + 1} on: {', '.join(changed)}")


def resume_command(command: str, config: Config, path: Path) -> str:
    """The words with which the run in `path` goes on."""
    words = resume_words(config.raw, path)
    folder = [word for flag, word in itertools.pairwise(sys.argv) if flag in ("--config-dir", "-cd")]
    return shlex.join([command, *words, *(["--config-dir", folder[0]] if folder else [])])


def start_sft(config: Config, path: Path) -> None:
    """apa-sft: fine-tunes `model.path`, or a new model of `model.architecture`."""

    def build(place: Workplace) -> dict[str, float]:
        return run_sft(config, *load_examples(config, place.say), config.run.seed, place)

    run_stage("apa-sft", config, path, build, "SFT", "model.path")


def start_reward(config: Config, path: Path) -> None:
    """apa-reward: trains on the trunk of `model.path`, or of the SFT stage's model."""

    def build(place: Workplace) -> dict[str, float]:
        data = load_examples(config, place.say)
        start = sft_model(config, *data, place.device, place.say, place.progress)
        return run_reward(replace(config, model=replace(config.model, path=start)), *data, config.run.seed, place)

    run_stage("apa-reward", config, path, build, "reward model", "reward.path")


def run_stage(
    command: str, config: Config, path: Path, build: Callable[[Workplace], dict[str, float]], name: str, key: str
) -> None:
    """Runs a stage as a command of its own: model/, result.json, and what every run's directory holds.

    metrics.jsonl has a line per evaluation, its `iteration` the optimiser step.
    """
    for own in (FORK, "stop_after", "dry_run"):
        if getattr(config.run, own) not in (None, False):
            raise ConfigError(f"{own}: only apa-train takes it")
    path = directory_of(config, path, None)
    directory = RunDirectory(path)
    with Stopping(None) as stopping, directory.held():
        found = found_in(config, path)
        if config.run.resume == AUTO and directory.result.is_file():
            print(f"{path}: finished, nothing is left to do", flush=True)
            return
        begin(directory, config, found)
        try:
            with Console(path / "run.log", 0) as console:
                resume = checkpoints.latest_good(found, console.say) if found else None
                if resume is not None:
                    step = checkpoints.iteration_of(resume)
                    checkpoints.drop_after(directory.checkpoints, step)
                    directory.cut_back(config.raw, step)
                device = launch(config.launch)
                directory.write_environment(
                    device=str(device), threads=torch.get_num_threads(), matmul=matmul.used().value
                )
                place = Workplace(
                    device=device,
                    folder=path / "model",
                    say=console.say,
                    progress=stage_progress(console, name),
                    record=lambda row: directory.record(directory.metrics, [row]),
                    checkpoints=directory.checkpoints,
                    resume=resume,
                    stopping=stopping,
                )
                result = build(place)
                replace_text(directory.result, json.dumps(result, indent=2) + "\n")
                console.say(f"the model is in {path / 'model'}; use it with {key}={path / 'model'}")
        except Stopped as stopped:
            how = resume_command(command, config, path)
            raise Stopped(f"{stopped}; go on with: {how}", stopped.status) from None
        except BaseException:
            if not directory.checkpoints.exists():
                directory.release()
            raise


def remove_if_empty(path: Path) -> None:
    """Hydra made the directory before it was known that nothing will be written to it."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()
