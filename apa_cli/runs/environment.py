"""Versions, machine and command of a run, as environment.json records them."""

from __future__ import annotations

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from apa_cli.secrets import redact_secrets

PACKAGES = (
    "apa-cli", "torch", "transformers", "tokenizers", "numpy", "hydra-core", "omegaconf", "accelerate", "peft",
)  # fmt: skip
"""Packages whose versions are recorded."""


def collect_environment() -> dict[str, Any]:
    """Return versions, the package's git commit if it is a checkout, the machine, and the command line."""
    return {
        "command": [Path(sys.argv[0]).name, *map(redact_secrets, sys.argv[1:])],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "packages": {name: _find_version(name) for name in PACKAGES},
        "git_commit": _find_git_commit(),
    }


def _find_version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _find_git_commit() -> str | None:
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
