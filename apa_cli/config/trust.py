"""Trust in recorded configurations: classes that may be imported, references that are refused."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from apa_cli.errors import ConfigError
from apa_cli.secrets import iterate_leaves

REFERENCE = re.compile(r"oc\.env:\s*([^,}\s]*)")
ALLOWED_VARIABLES = {"APA_CACHE_DIR", "HOME", "USER", "TMPDIR", "XDG_CACHE_HOME", "SLURM_JOB_ID", "SLURM_TMPDIR"}
"""Environment variables that a configuration may refer to."""
TARGET = "_target_"


def list_targets(value: Any) -> dict[str, str]:
    """Return every `_target_` in nested mappings and lists, by its dotted key."""
    return {place: str(leaf) for place, leaf in iterate_leaves(value) if place.rpartition(".")[2] == TARGET}


def list_offered_targets(folders: Iterable[Path], key: str = TARGET) -> set[str]:
    """Return every `_target_`, or every value of another key that names code, in the yaml files of these folders."""
    targets: set[str] = set()
    for folder in folders:
        for file in folder.rglob("*.yaml"):
            text = file.read_text(encoding="utf-8")
            if f"{key}:" not in text:  # parsing takes milliseconds
                continue
            with contextlib.suppress(yaml.YAMLError):  # such a file cannot be composed either
                leaves = iterate_leaves(yaml.safe_load(text))
                targets.update(str(leaf) for place, leaf in leaves if place.rpartition(".")[2] == key)
    return targets - {"???"}


def check_plain(recorded: dict[str, Any], file: Path, sections: Iterable[str]) -> None:
    """Raise ConfigError unless all sections are mappings and all values resolved, as every run writes them."""
    for section in sections:
        if not isinstance(recorded.get(section, {}), dict):
            raise ConfigError(f"{section}: {file} has {recorded[section]!r}, which no run writes")
    for place, leaf in iterate_leaves(recorded):
        if isinstance(leaf, str) and "${" in leaf:
            raise ConfigError(f"{place}: {file} has the reference {leaf!r}, which no run writes")


def check_targets(config: dict[str, Any], offered: set[str], file: Path) -> None:
    """Raise ConfigError for a `_target_` that only the recorded configuration names: it is not imported."""
    for place, target in list_targets(config).items():
        if target not in offered:
            is_fixed = place.partition(".")[0] in ("algo", "plan")  # run= refuses an override of these
            override = "" if is_fixed else f", or {place}={target},"
            raise ConfigError(
                f"{place}: {file} has {target!r}, which no yaml of conf/ or --config-dir names; give the --config-dir "
                f"of the run{override} to import it"
            )


def check_references(config: dict[str, Any]) -> None:
    """Raise ConfigError for a reference to an environment variable that may be secret; config.yaml would hold it."""
    for place, leaf in iterate_leaves(config):
        if isinstance(leaf, str) and (names := set(REFERENCE.findall(leaf)) - ALLOWED_VARIABLES):
            raise ConfigError(
                f"{place}: {', '.join(sorted(names))} cannot be referred to, because config.yaml and trackers get the "
                f"value; allowed are {', '.join(sorted(ALLOWED_VARIABLES))}, and keys that need a token take its "
                "variable's name"
            )
