"""Versions, machine and command, as environment.json records them."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from apa_cli.secrets import without_secrets


def environment() -> dict[str, Any]:
    """Versions, the package's git commit if it is a checkout, the machine, the words of the command."""
    packages = (
        "apa-cli",
        "torch",
        "transformers",
        "tokenizers",
        "numpy",
        "hydra-core",
        "omegaconf",
        "accelerate",
        "peft",
    )
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "command": [Path(sys.argv[0]).name, *map(without_secrets, sys.argv[1:])],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": versions,
        "git_commit": _git_commit(),
    }


def _git_commit() -> str | None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(checkout), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or None
