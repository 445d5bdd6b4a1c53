"""Which settings a resumed run may change, and the overrides that continue it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MAY_DIFFER = (
    "name", "resume", "resume_changed", "fork", "stop_after", "dry_run", "iterations",
    "tracking", "evaluation", "checkpoint", "guard", "stop_at_kl", "launch", "run", "export", "chat",
    "bench",
)  # fmt: skip
"""Top-level keys in which a resumed run may differ from the one it continues."""

RESUME, FORK, AUTO = "resume", "fork", "auto"

CODE = ("target", "trust_remote_code")
"""Names of keys that make a run execute code of the user's; see `code_in`."""

WORDS_WITH_A_MEANING = {"null", "true", "false", "yes", "no", "on", "off", "inf", "nan"}
"""What the command line does not read as text unless it is quoted."""


def code_in(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of every key by which a configuration runs code that is not the package's.

    A file in a run's directory must not make a command run code: these are asked for on the command line again.
    """
    found = []
    for key, value in config.items():
        inner = value if isinstance(value, list) else [value]
        parts = [part for part in inner if isinstance(part, dict)]
        if parts:
            within = [pair for part in parts for pair in code_in(part, f"{prefix}{key}.")]
            found += within if isinstance(value, dict) or not within else [(f"{prefix}{key}", value)]
        elif key in CODE and value:
            found.append((f"{prefix}{key}", value))
    return found


def resume_words(config: dict[str, Any], path: Path) -> list[str]:
    """The words with which the run in `path` goes on."""
    return [f"{RESUME}={path}", *(f"{key}={worded(value)}" for key, value in code_in(config))]


def worded(value: Any) -> str:
    """A value of a configuration as a word of the command line gives it."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {worded(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(worded, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z_/.][\w/.:-]*", value) and value.lower() not in WORDS_WITH_A_MEANING
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if plain else f"'{quoted}'"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def covers(key: str, dotted: str) -> bool:
    """Whether `key` is that dotted key, or a section it is in."""
    return dotted == key or dotted.startswith(f"{key}.")


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(dotted key, old value, new value) wherever two configurations differ, save in what may.

    Where `lambda` differs, the key of the algorithm that it sets does too, and is not counted again.
    """
    found = _differences(*({k: v for k, v in side.items() if k not in MAY_DIFFER} for side in (old, new)))
    pair = next(((before, after) for key, before, after in found if key == "lambda"), None)
    return [part for part in found if not (part[0].startswith("algo.") and part[1:] == pair)]


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += _differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append((f"{prefix}{key}", before, after))
    return found
