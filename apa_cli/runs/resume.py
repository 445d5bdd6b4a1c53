"""Settings that a resumed run may change, and the overrides that continue a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

MAY_DIFFER = (
    "name", "resume", "resume_changed", "fork", "overwrite", "stop_after", "dry_run", "iterations",
    "tracking", "evaluation", "checkpoint", "guard", "stop_at_kl", "launch", "run", "export", "chat",
    "bench",
)  # fmt: skip
"""Top-level keys and sections in which a resumed run may differ from the run that it continues."""

MUST_MATCH = ("evaluation.seed",)
"""Keys of these sections that must not change: evaluations of one run are compared on the same random numbers."""

ADDED_KEYS = ("plan", "guide", "reference.log_kl")
"""Keys and sections that runs of earlier versions lack; to lack one is no difference."""

RESUME, FORK, AUTO = "resume", "fork", "auto"

INPUTS = "inputs"
"""Key of a checkpoint's state.json: the digest of each input of the run, by the key that names it."""

INPUT_LABELS = {
    "dataset.train": "rows to train on",
    "dataset.test": "held-out rows; some may have been trained on",
    "model.tokenizer.chat_template": "chat template",
}
"""Meaning of inputs whose key does not say it."""

CHANGED_BY = {
    "dataset.train": "dataset",
    "dataset.test": "dataset",
    "model.tokenizer": "model.path",
    "model.tokenizer.chat_template": "model.path",
}
"""Inputs → the key or section whose change changes them."""

CODE_KEYS = ("target", "trust_remote_code")
"""Names of keys that make a run execute the user's code; see `find_code`."""

YAML_CONSTANTS = {"null", "true", "false", "yes", "no", "on", "off", "inf", "nan"}
"""Values that the command line does not read as text unless they are quoted."""

Difference = tuple[str, Any, Any]
"""(dotted key, old value, new value)."""


def find_code(config: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted key, value) of every key by which a configuration runs code from outside the package.

    A file in a run's directory must not make a command run code, so these keys must be given on the command line again.
    A list that contains such a key is returned as a whole.
    """
    code = []
    for key, value in config.items():
        parts = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, dict)]
        if parts:
            nested = [pair for part in parts for pair in find_code(part, f"{prefix}{key}.")]
            code += nested if isinstance(value, dict) or not nested else [(f"{prefix}{key}", value)]
        elif key in CODE_KEYS and value:
            code.append((f"{prefix}{key}", value))
    return code


def build_resume_overrides(config: dict[str, Any], path: Path) -> list[str]:
    """Return the overrides that continue the run in `path`."""
    code = find_code(config)
    return [f"{RESUME}={path}", *(f"{key}={format_override_value(value)}" for key, value in code)]


def format_override_value(value: Any) -> str:
    """Return a value of a configuration in the syntax of an override."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {format_override_value(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(format_override_value, value))}]"
    if isinstance(value, str):
        plain = re.fullmatch(r"([A-Za-z_/.]|\d+-\d+-\d+_)[\w/.:-]*", value) and value.lower() not in YAML_CONSTANTS
        quoted = value.replace("\\", "\\\\").replace("'", "\\'")
        return value if plain else f"'{quoted}'"
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def find_changed_inputs(recorded: dict[str, str], present: dict[str, str]) -> list[str]:
    """Return the keys of the inputs whose digests differ.

    An input on one side alone is left out: another key of the configuration, which is compared, added or removed it.
    """
    return [key for key, digest in recorded.items() if present.get(key, digest) != digest]


def may_change(key: str, allowed: list[str]) -> bool:
    """Return True if the keys and sections `allowed` let the input `key` differ."""
    return any(is_within(key, each) or is_within(each, CHANGED_BY.get(key, key)) for each in allowed)


def format_changed_inputs(keys: list[str]) -> str:
    """Return the keys of inputs with the meaning of those that do not say it."""
    return ", ".join(f"{key} ({INPUT_LABELS[key]})" if key in INPUT_LABELS else key for key in keys)


def is_within(key: str, section: str) -> bool:
    """Return True if the dotted `key` is `section` or one of its keys."""
    return key == section or key.startswith(f"{section}.")


def find_differences(old: dict[str, Any], new: dict[str, Any]) -> list[Difference]:
    """Return the differences between two configurations, except those of MAY_DIFFER.

    If `lambda` differs, the algorithm's key that it sets differs too and is not counted again.
    """
    differences = [difference for difference in _compare(old, new) if not _may_differ(difference[0])]
    of_lambda = next(((before, after) for key, before, after in differences if key == "lambda"), None)
    return [
        (key, before, after)
        for key, before, after in differences
        if not (is_within(key, "algo") and (before, after) == of_lambda) and not (before is None and key in ADDED_KEYS)
    ]


def _may_differ(key: str) -> bool:
    return key.partition(".")[0] in MAY_DIFFER and key not in MUST_MATCH


def _compare(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[Difference]:
    """Return all differences between two nested configurations."""
    differences: list[Difference] = []
    for key in dict.fromkeys([*old, *new]):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            differences += _compare(before, after, f"{prefix}{key}.")
        elif before != after:
            differences.append((f"{prefix}{key}", before, after))
    return differences
