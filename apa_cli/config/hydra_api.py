"""Hydra's composition of conf/: groups, keys, sweeps; this module does not know what a key means."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from apa_cli.errors import ConfigError, get_first_line

VERSION_BASE = "1.3"
CONFIG_NAME = "config"
"""The primary configuration, conf/config.yaml."""
OVERRIDE = re.compile(r"^\s*- override /(\w+): *([\w/]+)", re.MULTILINE)
"""An entry of a yaml's defaults list that overrides another group."""
PATH_KEY = re.compile(r"(^|[.+])(\w*path|\w*_dir|target|run|resume|fork)$")
"""Keys whose values are paths, in which any character may occur."""
SHARED = "_"
"""Prefix of yamls that other yamls of their group start from; such a yaml is not an option."""


def find_config_dir() -> Path:
    """Return the absolute path of conf/: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def list_config_dirs(extra_dir: str | None) -> list[Path]:
    """Return the folders that hold yamls: conf/ and, if there is one, the user's own."""
    return [find_config_dir(), *([Path(extra_dir)] if extra_dir else [])]


def compose_unchecked(
    overrides: list[str], extra_dir: str | None = None, config_name: str | None = CONFIG_NAME, choices: bool = False
) -> DictConfig:
    """Compose conf/ with these overrides; without a `config_name` only what the overrides add.

    With `choices` the section `hydra` is included, whose `runtime.choices` has each group's option. Raise Hydra's and
    OmegaConf's own errors, and ConfigError if `extra_dir` does not exist.
    """
    search_path = []
    if extra_dir is not None:
        if not Path(extra_dir).is_dir():
            raise ConfigError(f"--config-dir: there is no folder {extra_dir}")
        search_path = [f"hydra.searchpath=[file://{Path(extra_dir).resolve()}]"]
    running_job = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(str(find_config_dir()), version_base=VERSION_BASE):
            return hydra.compose(config_name, overrides=[*overrides, *search_path], return_hydra_config=choices)
    finally:
        GlobalHydra.instance().hydra = running_job


def parse_override(override: str) -> Override:
    """Return one parsed override. Raise ConfigError, in one line, if Hydra cannot parse it."""
    try:
        return OverridesParser.create().parse_override(override)
    except HydraException as error:
        key, equals, value = override.partition("=")
        hint = "overrides have the form key=value"
        is_text = PATH_KEY.search(key) or not set(value) & set("'\"[]{}$,")
        if equals and value.isprintable() and value and is_text:
            hint = f"quote the value twice, {quote_for_shell(quote_value(override))}"
        elif value.startswith(("{", "[")):
            hint = "quote the whole override, as 'key={name: value}' or 'key=[value, value]'"
        raise ConfigError(f"{override!r}: not an override ({get_first_line(error)}); {hint}") from error


def quote_value(override: str) -> str:
    """Return an override with its value in quotes, so that Hydra takes it as one text."""
    key, _, value = override.partition("=")
    escaped = value.replace("'", "\\'")
    return f"{key}='{escaped}'"


def quote_for_shell(override: str) -> str:
    """Return an override in double quotes, as a shell takes it."""
    escaped = re.sub(r'(["$`\\])', r"\\\1", override)
    return f'"{escaped}"'


def expand_sweep(overrides: list[str]) -> list[list[str]]:
    """Return the jobs of a sweep: one list of overrides for each combination of values."""
    parsed = OverridesParser.create().parse_overrides(overrides)
    return BasicSweeper.split_arguments(parsed, max_batch_size=None)[0]


def list_groups(extra_dir: str | None) -> dict[str, set[str]]:
    """Return each group with its options, in conf/ and in the user's own folder."""
    groups: dict[str, set[str]] = {}
    for root in list_config_dirs(extra_dir):
        for file in root.rglob("*.yaml"):
            if file.parent != root and not file.name.startswith(SHARED):
                group = file.relative_to(root).parts[0]
                groups.setdefault(group, set()).add(str(file.with_suffix("").relative_to(root / group)))
    return groups


def list_overridden_groups(group: str, option: str, extra_dir: str | None) -> dict[str, str]:
    """Return the other groups that an option's yaml overrides in its defaults list, with the option of each."""
    files = [folder / group / f"{option}.yaml" for folder in list_config_dirs(extra_dir)]
    file = next(file for file in files if file.is_file())
    return dict(OVERRIDE.findall(file.read_text(encoding="utf-8")))


def read_experiment(name: str, extra_dir: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return the keys that an experiment's yaml sets, nested, and the groups of which it chooses an option.

    Those of the experiments that it starts from are included.
    """
    file = next(
        file
        for folder in reversed(list_config_dirs(extra_dir))
        if (file := folder / "experiment" / f"{name}.yaml").is_file()
    )
    content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    keys: dict[str, Any] = {}
    groups: list[str] = []
    for entry in content.pop("defaults", []):
        if isinstance(entry, dict):
            groups += [str(group).rpartition("/")[2].partition("@")[0] for group, option in entry.items() if option]
        elif entry != "_self_":
            base = entry.removeprefix("/experiment/") if entry.startswith("/") else str(Path(name).parent / entry)
            inherited, chosen = read_experiment(base, extra_dir)
            keys, groups = to_dict(OmegaConf.merge(keys, inherited)), groups + chosen
    return to_dict(OmegaConf.merge(keys, content)), list(dict.fromkeys(groups))


def list_keys(cfg: DictConfig, prefix: str = "") -> list[str]:
    """Return all dotted keys of a configuration, `_target_` left out."""
    names = []
    for key in map(str, cfg):
        name = f"{prefix}{key}"
        names.append(name)
        node = cfg._get_node(key)
        if isinstance(node, DictConfig) and not OmegaConf.is_missing(cfg, key) and not node._is_none():
            names += list_keys(node, f"{name}.")
    return [name for name in names if not name.endswith("_target_")]


def to_dict(cfg: Any, resolve: bool = False) -> dict[str, Any]:
    """Return a section of a configuration as nested dicts and lists; interpolations stay unless `resolve`."""
    container = OmegaConf.to_container(cfg, resolve=resolve)
    if not isinstance(container, dict):
        raise TypeError(f"expected a section, got {type(container).__name__}")
    return {str(key): value for key, value in container.items()}
