"""Import of the user's code, by FILE.py:NAME, package.module:NAME or package.module.NAME.

An imported file is a submodule of this module whose name encodes the file's path, so that a spawned process can import
the file again when it unpickles the configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__path__: list[str] = []  # makes this module a package, which alone can have submodules


class FileFinder(MetaPathFinder):
    """Finder of imported files: a file's module is this module's name, a dot, and its path as hexadecimal digits."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        package, _, digits = fullname.rpartition(".")
        if package != __name__:
            return None
        return importlib.util.spec_from_file_location(fullname, bytes.fromhex(digits).decode())


sys.meta_path.append(FileFinder())


def import_object(target: str) -> Any:
    """Import what `target` names; a file or module in the current folder needs no PYTHONPATH.

    Raise ImportError, in one line, for a malformed `target`, or if its file or module lacks the name or cannot be
    imported.
    """
    source, _, name = target.rpartition(":" if ":" in target else ".")
    if not source or not name or target.endswith(".py"):
        raise ImportError(f"{target!r} is not of the form FILE.py:NAME or package.module:NAME")
    try:
        module = import_file(Path(source).expanduser()) if source.endswith(".py") else import_module(source)
    except (Exception, SystemExit) as error:  # a file written as a script may call sys.exit
        location = "" if isinstance(error, SyntaxError) else format_import_location(error)
        raise ImportError(f"cannot import {source} ({describe_exception(error)}{location})") from error
    if not hasattr(module, name):
        raise ImportError(f"{source} defines no {name}")
    return getattr(module, name)


def import_file(file: Path) -> ModuleType:
    """Import a Python file, which may import modules of its own folder. Raise FileNotFoundError if there is none."""
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    add_to_path(file.resolve().parent)
    return importlib.import_module(f"{__name__}.{str(file.resolve()).encode().hex()}")


def import_module(name: str) -> ModuleType:
    """Import a module by name, also from the current folder, which a console script does not search."""
    if importlib.util.find_spec(name.partition(".")[0]) is None:
        add_to_path(Path.cwd())
    return importlib.import_module(name)


def add_to_path(folder: Path) -> None:
    """Search a folder for modules, after all other folders; spawned processes search it too."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
        importlib.invalidate_caches()


def describe_exception(error: BaseException) -> str:
    """Return an exception's class and message on one line; the class alone if the message cannot be made."""
    try:
        return " ".join(f"{type(error).__name__}: {error}".split())
    except Exception:
        return type(error).__name__


def format_raise_location(error: BaseException) -> str:
    """Return where the user's code raised, as " (FILE, line N)"; "" if no frame of the traceback is the user's.

    The innermost frame counts that is neither in the standard library, nor in an installed package, nor in this one.
    """
    frames = traceback.extract_tb(error.__traceback__)
    paths = sysconfig.get_paths()
    foreign = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")] + [str(Path(__file__).parent)]
    own = [
        f
        for f in frames
        if not f.filename.startswith("<") and not any(Path(f.filename).is_relative_to(p) for p in foreign)
    ]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


def format_import_location(error: BaseException) -> str:
    """Return the file and line that failed while it was imported, as ", FILE, line N"; "" if no file was found."""
    frames = traceback.extract_tb(error.__traceback__)
    importing = [index for index, frame in enumerate(frames) if frame.filename.startswith("<frozen importlib")]
    inside = frames[importing[-1] + 1 :] if importing else []
    return f", {Path(inside[0].filename).name}, line {inside[0].lineno}" if inside else ""
