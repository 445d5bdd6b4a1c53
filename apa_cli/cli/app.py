"""Hydra commands: check all overrides, run the task once for each job, print errors in one line."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from apa_cli.cli.help import print_help
from apa_cli.config.build import build_config
from apa_cli.config.compose import LOCAL_MODEL, check_adapter_keys, check_group_keys, choose_local_model, compose
from apa_cli.config.continuation import compose_continuation, find_continued_run
from apa_cli.config.effects import refuse_idle_options
from apa_cli.config.explain import explain_inherited_key, suggest_for_flag
from apa_cli.config.from_run import RUN, compose_from_run, find_recorded_run
from apa_cli.config.hydra_api import (
    CONFIG_NAME,
    PATH_KEY,
    VERSION_BASE,
    expand_sweep,
    find_config_dir,
    parse_override,
    quote_value,
)
from apa_cli.config.run_names import locate_run_directory
from apa_cli.errors import ConfigError, UserError, get_first_line
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.records import RecordedRun
from apa_cli.runs.resume import FORK, RESUME
from apa_cli.runs.stopping import GracefulStop, describe_interruption
from apa_cli.settings import Config
from apa_cli.user_code import describe_exception


@dataclass(frozen=True)
class Job:
    """One checked job of a command."""

    cfg: DictConfig
    """The composed configuration, for --cfg."""
    config: Config
    run: RecordedRun | None = None
    """The recorded run that run= names; None in commands that take no run=."""

    @property
    def directory(self) -> Path:
        """The job's directory: Hydra's in a sweep, else outputs/NAME or the directory of the resumed run."""
        if self.sweep is not None:
            return Path(HydraConfig.get().runtime.output_dir)
        return Path(locate_run_directory(self.config.run.name, self.config.run.resume))

    @property
    def sweep(self) -> str | None:
        """The name of the sweep that the job belongs to, or None."""
        if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
            return None
        return Path(HydraConfig.get().sweep.dir).name


Task = Callable[[Job], None]


def run_command(
    name: str, task: Task, takes: tuple[str, ...] = (), uses_reward: Callable[[DictConfig], bool] = lambda cfg: True
) -> None:
    """Run one of the Hydra commands; an error is printed in one line on stderr and sets the exit status.

    `takes` are the keys that name the model which the command looks at, "run" and perhaps "model.path"; empty for a
    command that trains. `uses_reward` returns True if the command scores with a run's reward, whose function must then
    be named on the command line. A single job is composed and checked once, here; Hydra's own program serves -m and
    Hydra's flags.
    """
    if "--version" in sys.argv[1:]:
        print(f"apa-cli {version('apa-cli')}")
        return
    parser = get_args_parser()
    parser.error = refuse_flag  # type: ignore[method-assign]  # argparse would print a usage of many lines
    try:
        args = parser.parse_intermixed_args()
        with nullcontext() if takes else GracefulStop():
            run_arguments(name, args, task, takes, uses_reward)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as head, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if not (args.help or args.cfg):  # the task may be unfinished
            sys.exit(128 + signal.SIGPIPE)
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt as error:
        line = (error or "stopped by SIGINT") if takes else describe_interruption(name, error)
        print(f"{name}: {line}", file=sys.stderr)
        sys.exit(getattr(error, "status", 130))
    except Exception as error:
        if not (notes := getattr(error, "__notes__", [])):
            raise
        print(f"{name}: {describe_exception(error)}; {notes[-1]}", file=sys.stderr)  # run.log has the traceback
        sys.exit(1)


def run_arguments(
    name: str, args: Namespace, task: Task, takes: tuple[str, ...], uses_reward: Callable[[DictConfig], bool]
) -> None:
    """Run the jobs of a parsed command line, or print what its flags ask for; see `run_command`."""
    put_flags_first(args.overrides)
    for flag in ("config_name", "config_path"):
        if getattr(args, flag) is not None:
            raise ConfigError(
                f"--{flag.replace('_', '-')}: not supported; give a folder with your own yamls by --config-dir"
            )
    if args.help:
        print_help(name, args.config_dir, args.overrides)
    elif args.hydra_help or args.info or args.shell_completion:
        run_hydra(task, args, [])
    else:
        overrides = [quote_path(override) for override in args.overrides]
        jobs = expand_jobs(overrides) if args.multirun else [overrides]
        checked_jobs = [check_job(overrides, args, takes, uses_reward) for overrides in jobs]
        if is_for_hydra(args, takes):
            run_hydra(task, args, jobs)
            return
        for job in checked_jobs:
            if args.cfg:
                print(OmegaConf.to_yaml(job.cfg, resolve=args.resolve), end="")
            else:
                task(job)


def put_flags_first(overrides: list[str]) -> None:
    """Move the flags before the overrides in sys.argv, since Hydra's own program takes no flags after overrides."""
    flags = sys.argv[1:]
    for override in reversed(overrides):
        del flags[len(flags) - 1 - flags[::-1].index(override)]
    sys.argv[1:] = [*flags, *map(quote_path, overrides)]


def refuse_flag(message: str) -> NoReturn:
    """Raise ConfigError for arguments that argparse refuses; for a flag of another tool with the override to use."""
    unknown = message.partition("unrecognized arguments: ")[2].split()
    if unknown and unknown[0].startswith("--"):
        flag = unknown[0]
        value = next((after for before, after in zip(sys.argv, sys.argv[1:], strict=False) if before == flag), None)
        raise ConfigError(suggest_for_flag(flag, value))
    raise ConfigError(f"{get_first_line(ValueError(message))}; --help lists the flags and keys")


def is_for_hydra(args: Namespace, takes: tuple[str, ...]) -> bool:
    """Return True if Hydra's own program is needed: for a sweep, for its flags, or if its settings are overridden.

    Jobs with the settings of a recorded run are composed here even in a sweep, since Hydra reads only conf/.
    """
    overrides = [override.lstrip("+~") for override in args.overrides]
    if RUN in takes and any(override.startswith(f"{RUN}=") for override in overrides):
        return False
    sets_hydra = any(override.startswith(("hydra.", "hydra/")) for override in overrides)
    return bool(args.multirun or sets_hydra or args.package or args.experimental_rerun or args.cfg in ("hydra", "all"))


# --- one job ------------------------------------------------------------------------------------------------


def check_job(
    overrides: list[str],
    args: Namespace,
    takes: tuple[str, ...],
    uses_reward: Callable[[DictConfig], bool] = lambda cfg: True,
) -> Job:
    """Compose and check the configuration of one job. Raise ConfigError for anything wrong with it."""
    extra_dir = args.config_dir
    folder = next(
        (text for text in overrides if text and "=" not in text and os.path.isdir(os.path.expanduser(text))), None
    )
    if folder is not None:
        key = next(iter(takes), RESUME)
        raise ConfigError(f"{folder}: overrides have the form key=value; give {key}={folder}")
    check_group_keys(overrides)
    source, run = None, None
    if RUN in takes and (run := find_recorded_run(overrides)) is not None:
        cfg = compose_from_run(overrides, extra_dir, uses_reward, run)
    elif takes or args.multirun or (source := find_continued_run(overrides)) is None:
        check_adapter_keys(overrides, extra_dir)
        cfg = compose(overrides, extra_dir)
    else:
        cfg = compose_continuation(overrides, source, extra_dir)
    try:
        config = build_config(cfg, extra_dir)
    except ConfigError as error:
        if explanation := explain_inherited_key(error, overrides, extra_dir):
            raise ConfigError(explanation) from error
        raise
    check_subject(config, takes)
    if not takes and not args.multirun:  # the jobs of a sweep share overrides that some of their algorithms lack
        refuse_idle_options(config, overrides)
    if args.multirun and config.run.fork is not None:
        raise ConfigError(f"{FORK}: a sweep cannot fork a run; leave out -m")
    if source is not None and source == Job(cfg, config).directory.expanduser():
        RunDirectory(source).check_resume(config.raw)
    return Job(cfg, config, run)


def check_subject(config: Config, takes: tuple[str, ...]) -> None:
    """Raise ConfigError if a command that looks at a model is given none, or another command is given run=."""
    if not takes and config.run.run is not None:
        raise ConfigError("run: this command does not take it; apa-train continues a run with resume=")
    given = {"run": config.run.run, "model.path": config.model.path}
    if takes and config.run.dry_run:
        raise ConfigError("dry_run: this command has no dry run; leave it out")
    if takes and all(given[key] is None for key in takes):
        raise ConfigError(f"run: a model is needed; give {' or '.join(f'{key}=…' for key in takes)}")


def quote_path(override: str) -> str:
    """Return an override whose value is an existing path with the value quoted, if Hydra would not take it as it is.

    Of run=, resume= and fork= also a path that does not exist: names of sweep jobs have characters of Hydra's.
    """
    key, _, value = override.partition("=")
    if not PATH_KEY.search(key) or value[:1] in ("'", '"'):
        return override
    names_run = "=" in value and key in (RUN, RESUME, FORK)
    file = value.rpartition(":")[0] if key.endswith("target") else value
    if not names_run and not os.path.exists(os.path.expanduser(file)):
        return override
    with contextlib.suppress(ConfigError):
        if parse_override(override).value() == value:
            return override
    return quote_value(override)


# --- sweeps and Hydra's own flags ---------------------------------------------------------------------------


def run_hydra(task: Task, args: Namespace, jobs: list[list[str]]) -> None:
    """Run Hydra's own program on the command line; `jobs` are the overrides of each job, already checked."""
    labels = label_jobs(jobs) if args.multirun else []
    if jobs and choose_local_model(jobs[0], args.config_dir) != jobs[0]:
        sys.argv.append(LOCAL_MODEL)  # `compose` adds this override, which Hydra's program does not know of
    failures: list[UserError] = []
    state = {"inside_task": False}
    main_process = os.getpid()

    def run_job(cfg: DictConfig) -> None:
        if failures:  # jobs after a failed one do not start, and leave no folder of Hydra's behind
            with contextlib.suppress(OSError):
                Path(HydraConfig.get().runtime.output_dir).rmdir()
            return
        state["inside_task"] = True
        if labels:
            number = int(HydraConfig.get().job.num)
            print(f"job {number + 1} of {len(labels)}: {labels[number]}".rstrip(": "), flush=True)
        try:
            task(Job(cfg, build_config(cfg, args.config_dir)))
        except UserError as error:  # Hydra would print the job's overrides above the error's line
            if os.getpid() != main_process:  # some launchers run the jobs of a sweep in processes of their own
                raise UserError(f"{Path(HydraConfig.get().runtime.output_dir).name}: {error}") from None
            failures.append(error)
        state["inside_task"] = False

    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra re-raise other exceptions instead of printing its own report
    try:
        hydra.main(config_path=str(find_config_dir()), config_name=CONFIG_NAME, version_base=VERSION_BASE)(run_job)()
    except (OSError, ValueError, HydraException) as error:
        if state["inside_task"]:
            raise
        if isinstance(error, HydraException | ValueError):
            raise ConfigError(get_first_line(error)) from error
        raise UserError(f"name: cannot create the directory {error.filename} ({error.strerror})") from error
    if failures:
        raise failures[0]


def expand_jobs(overrides: list[str]) -> list[list[str]]:
    """Return the overrides of each job of a sweep. Raise ConfigError naming an override that cannot be expanded."""
    try:
        return expand_sweep(overrides)
    except HydraException as error:
        for override in overrides:
            try:
                expand_sweep([override])
            except HydraException as reason:
                raise ConfigError(
                    f"{override!r}: not an override ({get_first_line(reason)}); overrides have the form key=value"
                ) from error
        raise ConfigError(get_first_line(error)) from error


def label_jobs(jobs: list[list[str]]) -> list[str]:
    """Return, for each job of a sweep, the overrides that distinguish it."""
    return [" ".join(override for override in job if any(override not in other for other in jobs)) for job in jobs]
