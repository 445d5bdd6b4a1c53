"""Start, continuation and end of a run of apa-train, apa-sft or apa-reward in its directory."""

from __future__ import annotations

import gc
import itertools
import json
import shlex
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apa_cli.datasets.source import HUB_NAME
from apa_cli.distributed.spawn import (
    count_processes,
    detect_launcher,
    redirect_output,
    run_under_launcher,
    spawn_processes,
)
from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.errors import ConfigError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.loading import resolve_model_source
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory, replace_text
from apa_cli.runs.files import read_config, read_result, read_state
from apa_cli.runs.resume import (
    AUTO,
    FORK,
    INPUTS,
    RESUME,
    build_resume_overrides,
    find_differences,
    format_override_value,
)
from apa_cli.runs.stopping import GracefulStop, RunInterrupted, RunStopped
from apa_cli.settings import Config, LRScheduler
from apa_cli.stages.cache import find_or_train_sft_model
from apa_cli.stages.fitting import StageContext
from apa_cli.stages.reward_model import train_reward_model
from apa_cli.stages.sft import train_sft_model
from apa_cli.training.build import build_trainer, make_stage_reporter, set_up_device
from apa_cli.training.dry_run import describe_run
from apa_cli.training.examples import load_examples
from apa_cli.training.input_digests import STAGE_SECTIONS, compare_inputs, digest_inputs
from apa_cli.training.models import check_training_options
from apa_cli.training.progress import check_pools
from apa_cli.training.trainer import Trainer
from apa_cli.training.updater import compute_lr_factor
from apa_cli.types import Example

LR_STEPS = 1000
"""Steps per iteration in which a schedule is compared; any large number gives the same shares."""

# --- apa-train ----------------------------------------------------------------------------------------------


def start_training(config: Config, path: Path, sweep: str | None) -> None:
    """Run one apa-train job in `path`, or continue the run that `config.run.resume` names in its own directory.

    `sweep` is the name of the sweep that the job belongs to. Raise `RunStopped` if a signal or `stop_after` ends the
    run before its last iteration.
    """
    if config.run.dry_run:
        check_run(config)
        print("\n".join(describe_run(config)))
        remove_if_empty(path)
        return
    if detect_launcher():
        run_under_launcher(config.launch, run_job, config, path, sweep)
    elif (count := count_processes(config.launch)) > 1:
        check_minibatch_divides(config, count)
        spawn_processes(config.launch, count, run_job, config, path, sweep)
    else:
        run_job(SINGLE_PROCESS, config, path, sweep)


def check_run(config: Config) -> None:
    """Raise UserError for what a run refuses after its start: options that exclude each other, data and guide missing.

    A data set or model on the hub is not downloaded for it.
    """
    check_training_options(config)
    if config.guide.path is not None:
        resolve_model_source(config.guide.path, "guide.path")
    path = getattr(config.dataset, "path", None)
    is_on_hub = isinstance(path, str) and HUB_NAME.fullmatch(path) and not Path(path).expanduser().exists()
    if not is_on_hub or Path(str(path)).suffix:
        load_examples(config, print)


def run_job(world: World, config: Config, path: Path, sweep: str | None) -> None:
    """Run one job on this rank; if the job is stopped, the error names the command that continues it."""
    check_minibatch_divides(config, world.size)
    with GracefulStop(config.run.stop_after) as stopping:
        if stopping.is_out_of_time:
            remove_if_empty(path)
            raise RunStopped(f"stop_after={config.run.stop_after}: no time is left to start", stopping.exit_status)
        try:
            train_in_directory(world, config, path, sweep, stopping)
        except RunStopped as stopped:
            run_path = resolve_directory(config, path, sweep)
            command = format_sweep_command(sweep) if sweep else format_resume_command("apa-train", config, run_path)
            raise RunStopped(f"{stopped}; continue with: {command}", stopped.status) from None
        except RunInterrupted as error:
            if sweep:
                error.advice = f"continue with: {format_sweep_command(sweep)}"
            raise
        if sweep and stopping.signal_name:
            raise RunStopped(
                f"stopped by {stopping.signal_name} between two runs of the sweep; continue with: "
                f"{format_sweep_command(sweep)}",
                stopping.exit_status,
            )


def train_in_directory(
    world: World, config: Config, requested_path: Path, sweep: str | None, stopping: GracefulStop
) -> None:
    """Claim the run's directory, build its trainer, restore a checkpoint if there is one, and train to the end."""
    with ExitStack() as stack:
        claim = partial(claim_directory, stack, config, requested_path, sweep, describe_if_trained)
        path, candidates, finished = world.broadcast_from_main(claim)
        if path != requested_path:
            remove_if_empty(requested_path)  # its name is a timestamp, in which ranks may differ
        if finished:
            return
        redirect_output(world, path / "logs")
        directory, trainer = RunDirectory(path), None
        with Console(path / "run.log" if world.is_main else None, config.run.iterations) as console:
            with directory.record_failure(console) if world.is_main else nullcontext():
                try:
                    checkpoint = world.broadcast_from_main(partial(select_checkpoint, candidates, console))
                    describe = partial(describe_if_nothing_left, config, directory, checkpoint)
                    if description := world.broadcast_from_main(describe):
                        console.say(description)
                        return
                    trainer = build_trainer(config, path, sweep, checkpoint, console, world)
                    trainer.stopping = stopping
                    if checkpoint is not None:
                        world.broadcast_from_main(partial(restore_records, trainer, checkpoint.parent.parent))
                    trainer.train()
                except BaseException as error:
                    if trainer is not None:
                        trainer.tracker.finish(failed=not isinstance(error, RunStopped))
                    raise
            trainer.tracker.finish()
    del trainer
    release_memory()


def check_minibatch_divides(config: Config, world_size: int) -> None:
    """Raise ConfigError unless every rank gets the same number of sequences of a minibatch."""
    if config.run.minibatch_size % world_size:
        raise ConfigError(
            f"minibatch_size: {config.run.minibatch_size} is not a multiple of the number of processes, {world_size}"
        )


def describe_if_trained(config: Config, directory: RunDirectory) -> str | None:
    """Return a short description of the run in the directory if it has done all its iterations, else None."""
    done = directory.final_iteration
    return f"finished ({done} iterations)" if done is not None and done >= config.run.iterations else None


def describe_if_nothing_left(config: Config, directory: RunDirectory, checkpoint: Path | None) -> str | None:
    """Return a line if the checkpoint is the end of a finished run, whose results are written, else None."""
    result = read_result(directory.path) or {}
    if checkpoint is None or checkpoint.parent.parent.resolve() != directory.path.resolve():
        return None
    if result.get("iteration") != (done := checkpoints.parse_iteration(checkpoint)):
        return None
    if not (directory.path / "model" / "config.json").is_file() or not is_at_end(config, checkpoint):
        return None
    return f"{directory.path}: finished ({done} iterations); nothing is left to do; a higher iterations= continues it"


def is_at_end(config: Config, checkpoint: Path) -> bool:
    """Return True if a run has no iteration to do after this checkpoint: the last, or the one that reached the KL."""
    limit, done = config.run.stop_at_kl, checkpoints.parse_iteration(checkpoint)
    return done >= config.run.iterations or (limit is not None and read_state(checkpoint)["kl"] >= limit)


def check_fork(config: Config, checkpoint: Path) -> None:
    """Raise ConfigError if a fork from this checkpoint would have nothing to do."""
    if is_at_end(config, checkpoint):
        done = checkpoints.parse_iteration(checkpoint)
        limit = f", stop_at_kl {config.run.stop_at_kl:g}" if config.run.stop_at_kl is not None else ""
        raise ConfigError(
            f"fork: nothing is left to do after iteration {done} with iterations {config.run.iterations}{limit}; raise "
            "them, or name an earlier checkpoint, as fork=RUN/checkpoints/iteration_…"
        )


def describe_restart(recorded: dict[str, Any], config: Config, iteration: int) -> list[str]:
    """Return a line if the learning rate, of a schedule over the whole run, rises where the run continues."""
    try:
        scheduler = LRScheduler(recorded["optimizer"]["lr_scheduler"])
        before = replace(
            config.optimizer, lr_scheduler=scheduler, warmup_ratio=float(recorded["optimizer"]["warmup_ratio"])
        )
        shares = [
            compute_lr_factor(settings, iteration * LR_STEPS, max(1, iterations * LR_STEPS))
            for settings, iterations in ((before, recorded["iterations"]), (config.optimizer, config.run.iterations))
        ]
    except (KeyError, TypeError, ValueError):
        return []
    old, new = (f"{share * 100:.0f} %" for share in shares)
    if shares[1] <= shares[0] or old == new:
        return []
    return [
        f"optimizer.lr_scheduler={config.optimizer.lr_scheduler.value} spans the whole run: with iterations "
        f"{recorded['iterations']} → {config.run.iterations} the learning rate rises from {old} to {new} of its peak"
    ]


def restore_records(trainer: Trainer, source_path: Path) -> None:
    """Bring the records to the iteration that `trainer` was restored to.

    The run's own records are truncated; for a fork, the records of the forked run are copied.
    """
    config, directory, iteration = trainer.config, trainer.directory, trainer.progress.iteration
    source = RunDirectory(source_path)
    recorded = read_config(source.path)
    changes = [f"{key} {old!r} → {new!r}" for key, old, new in find_differences(recorded, config.raw)]
    if source.path == directory.path:
        truncate_run(directory, config, iteration)
        trainer.console.say(f"continues after iteration {iteration}")
    else:
        directory.copy_records(source, iteration)
        trainer.console.say(f"forked from {source.path} after iteration {iteration}")
    if changes:
        trainer.console.say(f"from iteration {iteration + 1} on: {', '.join(changes)}")
    elif source.path != directory.path:
        trainer.console.say("all settings but those of length, evaluation and output are that run's")
    for line in describe_restart(recorded, config, iteration):
        trainer.console.say(line)


# --- a run's directory --------------------------------------------------------------------------------------


def claim_directory(
    stack: ExitStack,
    config: Config,
    requested_path: Path,
    sweep: str | None,
    describe_if_finished: Callable[[Config, RunDirectory], str | None],
) -> tuple[Path, list[Path], bool]:
    """Lock the run's directory until `stack` closes, and claim it for a new run or check that its run can continue.

    Return the directory, the checkpoints to continue from (oldest first, empty for a new run), and True if resume=auto
    finds the run finished. Raise UserError if the directory is in use, ConfigError if the configuration differs from
    the run's.
    """
    path = resolve_directory(config, requested_path, sweep)
    sources: list[Path] = []
    if config.run.fork is not None and not list_resume_candidates(config, path):
        sources = checkpoints.locate_checkpoints(config.run.fork)[1]
        check_fork(config, sources[-1])
    directory = RunDirectory(path)
    stack.enter_context(directory.lock())
    candidates = list_resume_candidates(config, path)
    if config.run.resume == AUTO and (description := describe_if_finished(config, directory)):
        print(f"{path}: {description}; nothing is left to do", flush=True)
        return path, candidates, True
    if candidates:
        directory.check_resume(config.raw)
        return path, candidates, False
    if config.run.resume == AUTO and not directory.result.exists():
        if done := directory.count_iterations():
            print(f"{path}: {done} iterations without a checkpoint are run again", flush=True)
        directory.clear()
    directory.claim(config.raw)
    return path, sources, False


def resolve_directory(config: Config, path: Path, sweep: str | None) -> Path:
    """Return `path`, or the directory of the run that resume=PATH names. Raise UserError if it has no checkpoint."""
    resume = config.run.resume
    if resume in (None, AUTO):
        return path
    if sweep is not None:
        raise ConfigError(f"resume: a sweep is resumed as a whole; repeat its overrides with resume={AUTO}")
    return checkpoints.locate_checkpoints(resume)[0]


def list_resume_candidates(config: Config, path: Path) -> list[Path]:
    """Return the checkpoints in `path` that the run can continue from, oldest first; none for a new run."""
    resume = config.run.resume
    if resume is None:
        return []
    if resume == AUTO:
        return checkpoints.list_checkpoints(path / "checkpoints")
    return checkpoints.locate_checkpoints(resume)[1]


def select_checkpoint(candidates: list[Path], console: Console) -> Path | None:
    """Return the latest intact checkpoint; None for an empty list."""
    return checkpoints.select_latest_intact(candidates, console.say, check_pools) if candidates else None


def truncate_run(directory: RunDirectory, config: Config, iteration: int) -> None:
    """Delete the checkpoints and records of a run after `iteration`, from which it continues."""
    checkpoints.remove_later_checkpoints(directory.checkpoints, iteration)
    directory.truncate_records(config.raw, iteration)


def format_resume_command(command: str, config: Config, path: Path) -> str:
    """Return the command that continues the run in `path`."""
    overrides = build_resume_overrides(config.raw, path)
    words = [part for word in sys.argv for part in (word.split("=", 1) if word.startswith("--config-dir=") else [word])]
    folders = [value for flag, value in itertools.pairwise(words) if flag in ("--config-dir", "-cd")]
    return shlex.join([command, *overrides, *(["--config-dir", folders[0]] if folders else [])])


def format_sweep_command(sweep: str) -> str:
    """Return the command that continues the sweep of this command line; `sweep` is the sweep's name."""
    words = [word for word in sys.argv[1:] if not word.startswith(f"{RESUME}=")]
    name = [] if any(word.startswith("name=") for word in words) else [f"name={format_override_value(sweep)}"]
    return shlex.join(["apa-train", *words, *name, f"{RESUME}={AUTO}"])


def remove_if_empty(path: Path) -> None:
    """Remove the directory if it is empty, as Hydra creates it before each job of a sweep."""
    if path.is_dir() and not any(path.iterdir()):
        path.rmdir()


def release_memory() -> None:
    """Free the memory of a finished job, since the next job of a sweep runs in the same process."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --- apa-sft, apa-reward ------------------------------------------------------------------------------------


def start_sft(config: Config, path: Path) -> None:
    """Fine-tune `model.path`, or a new model of `model.architecture` (apa-sft)."""
    run_stage("apa-sft", config, path, train_sft_model, "SFT", "model.path", lambda config, *_: config)


def start_reward(config: Config, path: Path) -> None:
    """Train a reward model on the trunk of `model.path`, or of the SFT stage's model (apa-reward)."""

    def fill_path(config: Config, train: list[Example], held_out: list[Example], context: StageContext) -> Config:
        start = find_or_train_sft_model(config, train, held_out, context.device, context.say, context.report_progress)
        return replace(config, model=replace(config.model, path=start))

    run_stage("apa-reward", config, path, train_reward_model, "reward model", "reward.path", fill_path)


def run_stage(
    command: str,
    config: Config,
    path: Path,
    train_model: Callable[..., dict[str, float]],
    name: str,
    key: str,
    fill_path: Callable[..., Config],
) -> None:
    """Run a stage as a command of its own; `train_model` trains and saves the model and returns its figures.

    `fill_path(config, train, held_out, context)` returns the configuration with the model that the stage starts from.

    The directory gets model/, result.json, and the files of every run; metrics.jsonl has a line per evaluation, with
    the optimizer step as its `iteration`. Messages name the stage `name`; `key` is the configuration key for its model.
    """
    for option in (FORK, "stop_after", "dry_run"):
        if getattr(config.run, option) not in (None, False):
            raise ConfigError(f"{option}: only apa-train takes it; leave it out")
    with GracefulStop(None) as stopping, ExitStack() as stack:
        path, candidates, finished = claim_directory(stack, config, path, None, describe_if_fitted)
        if finished:
            return
        directory = RunDirectory(path)
        try:
            with Console(path / "run.log", 0) as console, directory.record_failure(console):
                checkpoint = select_checkpoint(candidates, console)
                context = make_stage_context(config, directory, console, name, checkpoint, stopping)
                train, held_out = load_examples(config, console.say)
                config = fill_path(config, train, held_out, context)
                inputs = digest_inputs(config, train, held_out, STAGE_SECTIONS)
                if checkpoint is not None:
                    recorded = read_state(checkpoint).get(INPUTS)
                    compare_inputs(recorded, inputs, config.run.resume_changed, False, console.say)
                    truncate_run(directory, config, checkpoints.parse_iteration(checkpoint))
                context = replace(context, inputs=inputs)
                result = train_model(config, train, held_out, config.run.seed, context)
                replace_text(directory.result, json.dumps(result, indent=2) + "\n")
                console.say(f"the model is in {path / 'model'}; use it with {key}={path / 'model'}")
        except RunStopped as stopped:
            raise RunStopped(
                f"{stopped}; continue with: {format_resume_command(command, config, path)}", stopped.status
            ) from None


def describe_if_fitted(config: Config, directory: RunDirectory) -> str | None:
    """Return a short description of the stage in the directory if it has finished, else None."""
    return "finished" if directory.result.is_file() else None


def make_stage_context(
    config: Config,
    directory: RunDirectory,
    console: Console,
    name: str,
    checkpoint: Path | None,
    stopping: GracefulStop,
) -> StageContext:
    """Set up the device, write environment.json, and return what the stage's training loop needs."""
    device = set_up_device(config.launch)
    directory.write_environment(
        device=str(device), threads=torch.get_num_threads(), matmul=matmul.get_active_matmul().value
    )
    return StageContext(
        device=device,
        model_folder=directory.path / "model",
        say=console.say,
        report_progress=make_stage_reporter(console, name),
        record=lambda row: directory.append_rows(directory.metrics, [row]),
        checkpoint_folder=directory.checkpoints,
        resume_from=checkpoint,
        stopping=stopping,
    )
