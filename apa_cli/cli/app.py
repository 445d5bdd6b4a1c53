"""A command: its words checked, its task run once for each job, whatever goes wrong said in one line."""

from __future__ import annotations

import contextlib
import os
import sys
import typing
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from apa_cli.cli.help import print_help
from apa_cli.config.build import build
from apa_cli.config.compose import RUN, VERSION_BASE, compose, config_dir, expand, run_directory_name
from apa_cli.config.from_run import always, compose_again, compose_run, source_of
from apa_cli.errors import ConfigError, UserError, first_line
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.resume import FORK, RESUME
from apa_cli.settings import Config


def command(
    name: str,
    task: Callable[[Config], None],
    takes: tuple[str, ...] = (),
    scores: Callable[[DictConfig], bool] = always,
) -> None:
    """Runs one of the Hydra commands: checks all words, hands `task` a checked Config for each job.

    A UserError ends in one line on stderr and its exit status; --help, --cfg, --config-dir and -m are Hydra's.
    `takes` are the keys by which a command that looks at a model is told which, "run" and perhaps "model.path";
    `scores` is whether it then asks the run's reward, of which a function must be named on the command line. Jobs
    that take the settings of a run, with run=, resume= or fork=, are composed here without Hydra's own program.
    """
    parser = get_args_parser()
    parser.error = refuse_flag
    try:
        args = parser.parse_args()
        if args.help:
            with contextlib.suppress(BrokenPipeError):  # whoever reads it has seen enough
                print_help(name, config_dir(), args.overrides)
                sys.stdout.flush()
                return
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        jobs, again = [], False
        if not (args.hydra_help or args.info or args.shell_completion):
            jobs, again = checked_jobs(args.overrides, args.multirun, args.config_dir, takes, scores)
        if not again:
            _run_hydra(task, args.config_dir, told_apart(args.overrides) if args.multirun else [])
            return
        for cfg, config in jobs:
            if args.cfg:
                print(OmegaConf.to_yaml(cfg), end="")
            else:
                task(config)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt as error:
        print(f"{name}: {error or 'stopped by SIGINT'}", file=sys.stderr)
        sys.exit(getattr(error, "status", 130))


def refuse_flag(message: str) -> typing.NoReturn:
    """In place of argparse's own usage, which is Hydra's and of many lines."""
    raise ConfigError(f"{first_line(ValueError(message))}; --help lists the flags and keys")


def checked_jobs(
    overrides: list[str],
    multirun: bool,
    extra_dir: str | None,
    takes: tuple[str, ...],
    scores: Callable[[DictConfig], bool] = always,
) -> tuple[list[tuple[DictConfig, Config]], bool]:
    """Each job's configuration, and whether they take the settings of a run."""
    overrides = [_quoted(word) for word in overrides]
    try:
        jobs = expand(overrides) if multirun else [overrides]
    except HydraException as error:
        raise ConfigError(_no_sweep(error, overrides)) from error
    checked, again = [], False
    for job in jobs:
        source = None
        if RUN in takes and any(word.startswith(f"{RUN}=") for word in job):
            cfg, again = compose_run(job, extra_dir, scores), True
        elif takes or multirun or (source := source_of(job, extra_dir)) is None:
            cfg = compose(job, extra_dir)
        else:
            cfg, again = compose_again(job, source, extra_dir), True
        config = build(cfg, extra_dir)
        check_subject(config, takes)
        if multirun and any(word.startswith(f"{FORK}=") for word in job):
            raise ConfigError(f"{FORK}: one run is forked at a time, without -m")
        if source is not None and source == run_directory(config).expanduser():
            RunDirectory(source).check_resume(config.raw)
        checked.append((cfg, config))
    return checked, again


def _quoted(word: str) -> str:
    """run=FOLDER in quotation marks: the folder of a job of a sweep has signs in its name that mean something here."""
    key, _, folder = word.partition("=")
    mistyped = "=" in folder and folder[0] not in "'\""
    if key not in (RUN, RESUME, FORK) or not (mistyped or Path(folder).expanduser().is_dir()):
        return word
    escaped = folder.replace("'", "\\'")
    return f"{key}='{escaped}'"


def _no_sweep(error: HydraException, overrides: list[str]) -> str:
    """Which word of a sweep it is that cannot be expanded, and why."""
    for word in overrides:
        try:
            expand([word])
        except HydraException as own:
            return f"cannot read {word!r}: {first_line(own)}; words have the form key=value"
    return first_line(error)


def check_subject(config: Config, takes: tuple[str, ...]) -> None:
    """Only the commands that look at a model take run=, and they need one of what they take."""
    if not takes and config.run.run is not None:
        raise ConfigError("run: this command takes none; apa-train continues a run with resume=")
    given = {"run": config.run.run, "model.path": config.model.path}
    if takes and all(given[key] is None for key in takes):
        raise ConfigError(f"run: a model is needed, give {' or '.join(f'{key}=…' for key in takes)}")


def told_apart(overrides: list[str]) -> list[str]:
    """Of each job of a sweep, the words that another job has not."""
    jobs = expand([_quoted(word) for word in overrides])
    return [" ".join(word for word in job if any(word not in other for other in jobs)) for job in jobs]


def _run_hydra(task: Callable[[Config], None], extra_dir: str | None, sweep: list[str]) -> None:
    """Hydra's own program; `sweep` is what tells its jobs apart."""
    failed: list[UserError] = []
    inside, own = False, os.getpid()

    def job(cfg: DictConfig) -> None:
        nonlocal inside
        if failed:  # of a sweep the jobs after one that failed are not begun, and Hydra's folders not left behind
            with contextlib.suppress(OSError):
                Path(hydra.core.hydra_config.HydraConfig.get().runtime.output_dir).rmdir()
            return
        inside = True
        if sweep:
            number = int(hydra.core.hydra_config.HydraConfig.get().job.num)
            print(f"job {number + 1} of {len(sweep)}: {sweep[number]}".rstrip(": "), flush=True)
        try:
            task(build(cfg, extra_dir))
        except UserError as error:  # Hydra would print all the job's words over its one line
            if os.getpid() != own:  # a launcher runs the jobs of a sweep in processes of their own
                raise UserError(f"{Path(run_directory(build(cfg, extra_dir))).name}: {error}") from None
            failed.append(error)
        inside = False

    # Hydra then hands other exceptions on instead of printing its own account of them.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=str(config_dir()), config_name="config", version_base=VERSION_BASE)(job)()
    except (OSError, ValueError, HydraException) as error:
        if inside:
            raise
        if isinstance(error, HydraException | ValueError):
            raise ConfigError(first_line(error)) from error
        raise UserError(f"name: the directory {error.filename} cannot be made ({error.strerror})") from error
    if failed:
        raise failed[0]


def run_directory(config: Config) -> Path:
    """The directory of the job that Hydra is running, or of the run that goes on."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return Path(run_directory_name(config.run.name, config.run.resume))
    return Path(HydraConfig.get().runtime.output_dir)


def sweep_name() -> str | None:
    """The name of the sweep that this job belongs to, or None."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    if not HydraConfig.initialized():
        return None
    job = HydraConfig.get()
    return Path(job.sweep.dir).name if job.mode == RunMode.MULTIRUN else None
