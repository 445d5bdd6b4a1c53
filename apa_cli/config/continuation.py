"""The settings of a recorded run with overrides on top, for continuing the run: resume=… and fork=…"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from apa_cli.config.build import build_needs
from apa_cli.config.compose import compose
from apa_cli.config.explain import LAMBDA
from apa_cli.config.from_run import (
    apply_overrides,
    check_offered,
    choose_options,
    fill_missing,
    list_unoffered_code,
    mark_missing,
    parse_single_values,
    refuse_code,
)
from apa_cli.config.hydra_api import (
    compose_unchecked,
    list_config_dirs,
    list_groups,
    list_overridden_groups,
    parse_override,
    read_experiment,
    to_dict,
)
from apa_cli.config.run_names import locate_run_directory
from apa_cli.config.trust import TARGET, check_plain, list_offered_targets
from apa_cli.errors import ConfigError
from apa_cli.runs.files import read_config
from apa_cli.runs.old_names import is_old
from apa_cli.runs.records import suggest_nearest
from apa_cli.runs.resume import AUTO, FORK, RESUME
from apa_cli.settings import SECTIONS, TARGET_SECTIONS

EXPERIMENT = "experiment"
"""The group whose options have no section of their own: they choose options of other groups and set keys of theirs."""

NOT_INHERITED = ("resume", "resume_changed", "overwrite", "stop_after", "dry_run")
"""Keys that concern one command, not the run; a continuation does not inherit them."""


def find_continued_run(overrides: list[str]) -> Path | None:
    """Return the directory of the run that these overrides resume or fork, or None if they start a new run.

    Raise ConfigError if that directory holds no run.
    """
    values = {override.key_or_group: override.value() for override in map(parse_override, overrides)}
    resume, fork, name = (values.get(key) for key in (RESUME, FORK, "name"))
    if fork is not None and resume not in (None, AUTO):
        raise ConfigError(f"{FORK}: a fork is a new run, which resumes nothing; leave out {RESUME}={resume}")
    if resume == AUTO and name is not None:
        path = Path(locate_run_directory(str(name), AUTO))
        if any(path.glob("checkpoints/iteration_*")):
            return path
    for key, value in ((RESUME, None if resume == AUTO else resume), (FORK, fork)):
        if value is not None:
            path = Path(locate_run_directory("", str(value))).expanduser()
            if not (path / "config.yaml").is_file():
                raise ConfigError(f"{key}: there is no run in {path}{suggest_nearest(path)}")
            return path
    return None


def compose_continuation(overrides: list[str], source: Path, extra_dir: str | None = None) -> DictConfig:
    """Compose the settings of the run in the directory `source`, which is resumed or forked, with overrides on top.

    A group=option sets all that it sets in a new run. Raise ConfigError if the run was recorded under old key names,
    or if its config.yaml names code that neither conf/, `extra_dir` nor an override names.
    """
    parsed = parse_single_values(overrides)
    groups = list_groups(extra_dir)
    recorded = read_config(source)
    defaults = to_dict(compose(choose_options(recorded, extra_dir), extra_dir))
    is_fork = any(override.key_or_group == FORK for override in parsed)
    if is_old(recorded):
        raise ConfigError(
            f"{FORK if is_fork else RESUME}: {source} was recorded by an earlier version, whose keys had other names; "
            "the run can be evaluated, exported and compared, but not continued"
        )
    check_plain(recorded, source / "config.yaml", (*SECTIONS, *TARGET_SECTIONS))
    recorded = fill_missing(recorded, without_lambda(defaults, recorded))
    recorded |= {key: defaults[key] for key in NOT_INHERITED}
    if is_fork:
        recorded["name"] = defaults["name"]
    cfg = OmegaConf.create(_restore_links(recorded, defaults, OmegaConf.create(recorded)))
    if any(override.key_or_group.partition(".")[0] in ("algo", "plan", "experiment") for override in parsed):
        _restore_own_samples(cfg, extra_dir)
    code = list_unoffered_code(recorded, extra_dir)
    mark_missing(cfg, code)
    options = [override for override in parsed if override.key_or_group in groups]
    if options:
        new = to_dict(compose([override.input_line for override in options], extra_dir))
        settings = to_dict(cfg)
        for override in options:
            settings = _take_keys(settings, new, _list_set_keys(override, extra_dir))
        if f"${{{LAMBDA}}}" not in settings["algo"].values():  # the old algorithm's λ
            settings.pop(LAMBDA, None)
        cfg = OmegaConf.create(settings)
    apply_overrides(cfg, [override for override in parsed if override not in options], extra_dir)
    check_offered(cfg, parsed, source, extra_dir)
    refuse_code(cfg, code, source)
    return cfg


def without_lambda(defaults: dict[str, Any], recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the defaults for a recorded run: without the default algorithm's λ if the run has no λ."""
    return defaults if LAMBDA in recorded else {key: value for key, value in defaults.items() if key != LAMBDA}


def _restore_own_samples(cfg: DictConfig, extra_dir: str | None) -> None:
    """Set samples_per_prompt to null again if it is the algorithm's own number, so that another algorithm has its own.

    The number stays if that needs the import of a class which only the run's directory names.
    """
    targets = {str(cfg[section].get(TARGET)) for section in ("algo", "plan")}
    is_offered = targets <= list_offered_targets(list_config_dirs(extra_dir))
    if is_offered and cfg.samples_per_prompt == build_needs(cfg).samples_per_prompt:
        cfg.samples_per_prompt = None


def _restore_links(settings: dict[str, Any], defaults: dict[str, Any], resolved: DictConfig) -> dict[str, Any]:
    """Return the settings with each default's reference ${another.key} restored if the value equals that key's."""
    linked = dict(settings)
    for key, value in settings.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            linked[key] = _restore_links(value, default, resolved)
        elif reference := re.fullmatch(r"\$\{([\w.]+)\}", str(default)):
            linked[key] = default if OmegaConf.select(resolved, reference[1]) == value else value
    return linked


def _list_set_keys(override: Any, extra_dir: str | None) -> dict[str, Any]:
    """Return the keys, nested, that group=option sets in a new run; None for a section that it sets as a whole."""
    group, option = override.key_or_group, override.value()
    if group == EXPERIMENT:
        return _list_experiment_keys(option, extra_dir)
    others = list_overridden_groups(group, option, extra_dir)
    base = [f"+{name}={option}" for name, option in others.items()]
    return to_dict(compose([*base, f"+{override.input_line}"], extra_dir, None)) | dict.fromkeys([group, *others])


def _list_experiment_keys(name: str, extra_dir: str | None) -> dict[str, Any]:
    """Return the keys, nested, that an experiment and the options that it chooses set, also those set to a default."""
    keys, groups = read_experiment(name, extra_dir)
    choices = compose_unchecked([f"{EXPERIMENT}={name}"], extra_dir, choices=True).hydra.runtime.choices
    for group in groups:
        keys = _merge_keys(keys, _list_set_keys(parse_override(f"{group}={choices[group]}"), extra_dir))
    return keys


def _merge_keys(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Return the nested keys of both; a section that either sets as a whole is set as a whole."""
    merged = first | second
    for key in first.keys() & second.keys():
        both = (first[key], second[key])
        merged[key] = _merge_keys(*both) if all(isinstance(each, dict) for each in both) else None
    return merged


def _take_keys(settings: dict[str, Any], new: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the values of `new` under these keys, nested."""
    updated = dict(settings)
    for key, inner in keys.items():
        if isinstance(inner, dict) and isinstance(settings.get(key), dict) and isinstance(new[key], dict):
            updated[key] = _take_keys(settings[key], new[key], inner)
        else:
            updated[key] = new[key]
    return updated
