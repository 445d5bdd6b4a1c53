"""From words to a configuration: conf/ composed by Hydra, the names of runs, and what is wrong with words."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from datetime import datetime
from pathlib import Path

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import DictConfig, OmegaConf

from apa_cli.errors import ConfigError, first_line
from apa_cli.runs.resume import AUTO

LAMBDA = "lambda"
RUN = "run"
VERSION_BASE = "1.3"
LONGEST_NAME = 200
"""Bytes in the name of a job's folder; longer ones keep their end and get a digest."""


def config_dir() -> Path:
    """The absolute path of conf/: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def new_run_name() -> str:
    """A time stamp that no directory under outputs/ has yet."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    taken = any((Path("outputs") / parent / stamp).exists() for parent in ("", "sweeps"))
    return f"{stamp}_{os.getpid()}" if taken else stamp


def directory_name(overrides: str) -> str:
    """The overrides of one job of a sweep as one folder name, without separators of paths."""
    name = re.sub(r"[/\\]", "_", overrides) or "default"
    if len(name.encode()) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name.encode()[-(LONGEST_NAME - 9) :].decode(errors='ignore')}-{digest}"


def run_directory_name(name: str, resume: str | None) -> str:
    """outputs/<name>, or the directory of the run that is resumed (a run, or one of its checkpoints)."""
    if resume in (None, AUTO):
        return str(Path("outputs") / name)
    path = Path(str(resume))
    return str(path.parent.parent if path.parent.name == "checkpoints" else path)


OmegaConf.register_new_resolver("run_directory", run_directory_name, replace=True)
OmegaConf.register_new_resolver("run_name", new_run_name, use_cache=True, replace=True)
OmegaConf.register_new_resolver("directory_name", directory_name, replace=True)


def compose(overrides: list[str], extra_dir: str | None = None, config_name: str | None = "config") -> DictConfig:
    """conf/ with these overrides, unchecked. ConfigError in one line for words that cannot be composed.

    Without a `config_name` what the overrides add is all there is.
    """
    extra = [] if extra_dir is None else [f"hydra.searchpath=[file://{Path(extra_dir).resolve()}]"]
    if extra_dir is not None and not Path(extra_dir).is_dir():
        raise ConfigError(f"--config-dir: no folder {extra_dir}")
    running = GlobalHydra.instance().hydra  # that of the job, where one is running
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(config_dir()), version_base=VERSION_BASE):
            return hydra.compose(config_name, overrides=[*overrides, *extra])
    except Exception as error:  # Hydra's own, OmegaConf's, and whatever a list where a name is needed leads to
        raise ConfigError(explained(error, overrides, extra_dir, config_name)) from error
    finally:
        GlobalHydra.instance().hydra = running


def explained(error: Exception, overrides: list[str], extra_dir: str | None, config_name: str | None) -> str:
    """What is wrong with these words, in one line: a group's option, a key, or whatever Hydra says first."""
    groups = groups_of(extra_dir)
    plain = []
    for word in overrides:
        try:
            parsed = OverridesParser.create().parse_override(word)
        except HydraException as parse_error:
            return f"cannot read {word!r}: {first_line(parse_error)}; words have the form key=value"
        if parsed.key_or_group in groups:
            options, chosen = groups[parsed.key_or_group], parsed.value()
            if not isinstance(chosen, str):
                return f"{parsed.key_or_group}: {word} does not name one of {', '.join(sorted(options))}"
            if chosen not in options:
                return f"{parsed.key_or_group}: {no_option(chosen, options)}"
            plain.append(word)
        elif parsed.is_add() and "." not in parsed.key_or_group and isinstance(parsed.value(), str):
            plain.append(word)
    chosen_groups = [word for word in plain if not word.startswith("+")]
    try:
        base = compose(chosen_groups, extra_dir, config_name) if chosen_groups != overrides else None
    except ConfigError as base_error:
        return str(base_error)
    if base is not None:
        known = [*keys_of(base), *groups]
        for word in overrides:
            key = OverridesParser.create().parse_override(word).key_or_group
            if key not in known and not word.startswith(("+", "hydra.")) and not key.startswith("hydra."):
                return unknown_key(key, base, list(groups))
    if "Ambiguous value" in str(error):
        return f"{first_line(error)}: several values need -m (a sweep), a list needs brackets"
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    return _with_word(first_line(cause), overrides, extra_dir, config_name)


def _with_word(message: str, overrides: list[str], extra_dir: str | None, config_name: str | None) -> str:
    """The message, behind the first of several words that cannot be composed even alone, or the only one."""
    if len(overrides) == 1:
        return f"{overrides[0]!r}: {message}"
    for word in overrides:
        try:
            compose([word], extra_dir, config_name)
        except ConfigError as error:
            return str(error)
    return message


def groups_of(extra_dir: str | None) -> dict[str, set[str]]:
    """Group → its options, in conf/ and in the user's own folder."""
    groups: dict[str, set[str]] = {}
    for root in (config_dir(), *([Path(extra_dir)] if extra_dir else [])):
        for file in root.rglob("*.yaml"):
            if file.parent != root:
                group = file.parent.relative_to(root)
                parts = group.parts[0]
                groups.setdefault(parts, set()).add(str(file.with_suffix("").relative_to(root / parts)))
    return groups


def expand(overrides: list[str]) -> list[list[str]]:
    """The jobs of a sweep: one list of overrides each."""
    parsed: list[Override] = OverridesParser.create().parse_overrides(overrides)
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def no_option(name: str, options: set[str]) -> str:
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.4)
    return f"no '{name}'; " + (f"did you mean '{close[0]}'?" if close else f"there are {', '.join(sorted(options))}")


def unknown_key(key: str, cfg: DictConfig, near: list[str] | None = None) -> str:
    """One line that names a key that does not exist, and the nearest one that does."""
    if key == LAMBDA:
        return f"{LAMBDA}: the algorithm of this run has none"
    keys = [k for k in [*(near or []), *keys_of(cfg)] if k != key]
    same_end = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    same_section = [k for k in keys if "." in key and k.rpartition(".")[0] == key.rpartition(".")[0]]
    within = difflib.get_close_matches(key, same_section, n=1, cutoff=0.85)
    close = within or same_end or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not close:
        ends = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        found = difflib.get_close_matches(key.rsplit(".", 1)[-1], ends, n=1, cutoff=0.6)
        close = [ends[name] for name in found]
    return f"unknown key '{key}'" + (f"; did you mean '{close[0]}'?" if close else "; --help lists the keys")


def keys_of(cfg: DictConfig, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration."""
    names = []
    for key in cfg:
        name = f"{prefix}{key}"
        names.append(name)
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not OmegaConf.is_missing(cfg, key) and not node._is_none():
            names += keys_of(node, f"{name}.")
    return [name for name in names if not name.endswith("_target_")]
