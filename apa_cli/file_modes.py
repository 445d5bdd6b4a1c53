"""Permissions of written files: those that the user's umask gives, as any program's new files have.

Libraries that write through temporary files (safetensors, `tempfile`) give them to their owner alone.
"""

from __future__ import annotations

import os
from pathlib import Path


def read_umask() -> int:
    """Return the process's umask, which can only be read by setting it."""
    umask = os.umask(0o022)
    os.umask(umask)
    return umask


def apply_umask(folder: Path) -> None:
    """Give a folder and all that is in it the permissions of new folders and files; links are left as they are."""
    umask = read_umask()
    folder.chmod(0o777 & ~umask)
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
