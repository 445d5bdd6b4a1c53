"""What is read is not trusted: whose `_target_` may be imported, and what must not be written down."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from apa_cli.errors import ConfigError
from apa_cli.secrets import leaves

REFERENCE = re.compile(r"oc\.env:\s*([^,}\s]*)")
HARMLESS = {"APA_CACHE_DIR", "HOME", "USER", "TMPDIR", "XDG_CACHE_HOME", "SLURM_JOB_ID", "SLURM_TMPDIR"}
"""Variables of the environment that a configuration may refer to."""
TARGET = "_target_"


def targets(value: Any) -> dict[str, str]:
    """Every `_target_` in nested mappings and lists, by the key that it stands under."""
    return {place: str(leaf) for place, leaf in leaves(value) if place.rpartition(".")[2] == TARGET}


def offered_targets(folders: Iterable[Path], key: str = TARGET) -> set[str]:
    """Every `_target_`, or value of another key for code, in the yaml files of these folders."""
    found = set()
    for folder in folders:
        for file in folder.rglob("*.yaml"):
            found.update(re.findall(rf"\b{key}:\s*['\"]?([\w.:]+)", file.read_text(encoding="utf-8")))
    return found


def check_plain(recorded: dict[str, Any], file: Path, sections: Iterable[str]) -> None:
    """A run writes its configuration resolved, its sections as mappings: ConfigError for any other."""
    for section in sections:
        if not isinstance(recorded.get(section, {}), dict):
            raise ConfigError(f"{section} in {file} is {recorded[section]!r}; no run writes that")
    for place, leaf in leaves(recorded):
        if isinstance(leaf, str) and "${" in leaf:
            raise ConfigError(f"{place} in {file} refers to {leaf!r}; no run writes that")


def check_targets(config: dict[str, Any], offered: set[str], file: Path) -> None:
    """ConfigError for a `_target_` that nobody offers: what a recorded configuration names alone is not imported."""
    for place, target in targets(config).items():
        if target not in offered:
            raise ConfigError(
                f"{place} in {file} is {target!r}, which no yaml of conf/ or --config-dir has; it is not imported "
                f"unless a word says {place}={target}"
            )


def check_references(config: dict[str, Any]) -> None:
    """ConfigError for a value that is taken from the environment and may be a secret: it would be written down."""
    for place, leaf in leaves(config):
        if isinstance(leaf, str) and (asked := set(REFERENCE.findall(leaf)) - HARMLESS):
            raise ConfigError(
                f"{place}: of the environment only {', '.join(sorted(HARMLESS))} can be referred to, not "
                f"{', '.join(sorted(asked))}, for config.yaml and trackers get the value; keys that need a token take "
                "its variable's name"
            )
