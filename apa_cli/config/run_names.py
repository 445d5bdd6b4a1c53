"""Names of runs and of their directories, as resolvers that conf/config.yaml uses."""

from __future__ import annotations

import hashlib
import os
import re
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from apa_cli.runs.resume import AUTO

OUTPUTS = Path("outputs")
LONGEST_NAME = 200
"""Bytes in the name of a job's directory; a longer name keeps its end and gets a digest."""


def make_run_name() -> str:
    """Return a timestamp that no directory under outputs/ has yet."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    exists = any((OUTPUTS / parent / stamp).exists() for parent in ("", "sweeps"))
    return f"{stamp}_{os.getpid()}" if exists else stamp


def make_job_name(overrides: str) -> str:
    """Return the overrides of one job of a sweep as one directory name, without path separators."""
    if "model.path=" in overrides:  # it implies model=local, see `compose.choose_local_model`
        overrides = re.sub(r"(?:^|(?<=,))model=local(?:,|$)", "", overrides).rstrip(",")
    name = re.sub(r"[/\\]", "_", overrides) or "default"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[-(LONGEST_NAME - 9) :].decode(errors='ignore')}-{digest}"


def locate_run_directory(name: str, resume: str | None) -> str:
    """Return outputs/<name>, or the directory of the run that `resume` names (a run, or one of its checkpoints)."""
    if resume is None or resume == AUTO:
        return str(OUTPUTS / name)
    path = Path(str(resume))
    return str(path.parent.parent if path.parent.name == "checkpoints" else path)


OmegaConf.register_new_resolver("run_name", make_run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("job_name", make_job_name, replace=True)
