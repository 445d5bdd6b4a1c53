"""Starting, continuing and ending one run of training."""

from __future__ import annotations

import gc
from pathlib import Path

import torch

from apa_cli import checkpoint as checkpoints
from apa_cli.assembly import build_trainer
from apa_cli.console import Console
from apa_cli.plan import run_plan
from apa_cli.run_directory import RunDirectory
from apa_cli.settings import Config
from apa_cli.types import ConfigError


def start(config: Config, path: Path, sweep: str | None) -> None:
    """Runs one job in `path`, or continues the run that `config.run.resume` names in its own directory."""
    if config.run.plan:
        print("\n".join(run_plan(config)))
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
        directory.resume(config.raw, int(checkpoints.PATTERN.match(resume.name)[1]))
    trainer = None
    with Console(path / "run.log", config.run.iterations) as console:
        try:
            trainer = build_trainer(config, path, sweep, resume, console)
            trainer.train()
        except BaseException:
            if trainer is not None:
                trainer.tracker.finish(failed=True)
            raise
        trainer.tracker.finish()
    # The next job of a sweep runs in this process: leave it nothing.
    del trainer
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
