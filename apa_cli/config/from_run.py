"""The settings of a recorded run with overrides on top, for looking at the run: run=…"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from omegaconf import BooleanNode, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from apa_cli.config.compose import compose
from apa_cli.config.explain import LAMBDA, describe_unknown_key
from apa_cli.config.hydra_api import SHARED, list_config_dirs, list_groups, list_keys, parse_override, to_dict
from apa_cli.config.trust import TARGET, check_plain, check_targets, list_offered_targets, list_targets
from apa_cli.errors import ConfigError
from apa_cli.runs.records import RecordedRun
from apa_cli.runs.resume import find_code, format_override_value
from apa_cli.settings import SECTIONS, TARGET_SECTIONS

RUN = "run"
"""The key that names a recorded run to look at."""


def is_true(value: Any) -> bool:
    """Return True for a boolean setting that is true, and for a value that the check of the configuration refuses."""
    try:
        return bool(BooleanNode().validate_and_convert(value))
    except ValidationError:
        return True


FIXED = ("algo", "plan", "lambda", "experiment", "critic", "lora", "resume", "fork")
"""Keys and sections that cannot be overridden with run=…"""


def find_recorded_run(overrides: list[str]) -> RecordedRun | None:
    """Return the run that an override run=… names, or None without one. Raise ConfigError if there is no such run."""
    names = [override.value() for override in parse_single_values(overrides) if override.key_or_group == RUN]
    return RecordedRun.find(str(names[-1])) if names and names[-1] is not None else None


def compose_from_run(
    overrides: list[str],
    extra_dir: str | None = None,
    uses_reward: Callable[[DictConfig], bool] = lambda cfg: True,
    run: RecordedRun | None = None,
) -> DictConfig:
    """Compose the settings of the run that an override run=… names, with the other overrides on top.

    `run` is that run if it has been found already. Keys that the run lacks come from conf/. `lambda` is left out, since
    the run has the algorithm's key that it set. `uses_reward` returns True if the command scores with the run's reward.
    Raise ConfigError if the run's config.yaml names code that neither conf/, `extra_dir` nor an override names.
    """
    parsed = parse_single_values(overrides)
    run = run or find_recorded_run(overrides)
    assert run is not None, "an override run=… is needed"
    for override in parsed:
        if override.key_or_group.partition(".")[0] in FIXED:
            raise ConfigError(f"{override.key_or_group}: with {RUN}=… the run's own value applies; leave it out")
    config_file = run.directory / "config.yaml"
    recorded = copy.deepcopy(run.config)
    check_plain(recorded, config_file, (*SECTIONS, *TARGET_SECTIONS))
    for section in (recorded["model"], recorded.get("guide", {})):
        section["trust_remote_code"] = False  # consent given to another run does not carry over
    defaults = to_dict(compose(choose_options(recorded, extra_dir), extra_dir))
    cfg = OmegaConf.create(fill_missing(recorded, defaults))
    cfg.pop(LAMBDA, None)
    code = list_unoffered_code(recorded, extra_dir)
    mark_missing(cfg, code)
    if recorded.get("sampling", {}).get("stop_strings") == recorded.get("dataset", {}).get("stop_strings"):
        cfg.sampling.stop_strings = defaults["sampling"]["stop_strings"]  # follows dataset= if that is overridden
    apply_overrides(cfg, parsed, extra_dir)
    check_offered(cfg, parsed, run.directory, extra_dir)
    if uses_reward(cfg):
        refuse_code(cfg, code, run.directory)
    for key, value in list_still_missing(cfg, code):
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def parse_single_values(overrides: list[str]) -> list[Any]:
    """Return the parsed overrides. Raise ConfigError for an override with several values, or with none."""
    parsed = [parse_override(override) for override in overrides]
    for override in parsed:
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.key_or_group}: one value is needed; several need -m, a list needs brackets")
    return parsed


def choose_options(recorded: dict[str, Any], extra_dir: str | None) -> list[str]:
    """Return the overrides that choose a recorded run's options by their classes, which give keys new since a value."""
    targets = {group: recorded[group].get(TARGET) for group in TARGET_SECTIONS if isinstance(recorded.get(group), dict)}
    options = {group: find_option(group, target, extra_dir) for group, target in targets.items()}
    return [f"{group}={option}" for group, option in options.items() if option is not None]


def find_option(group: str, target: Any, extra_dir: str | None) -> str | None:
    """Return the first option of the group whose section has this `_target_`, or None if none has."""
    for root in list_config_dirs(extra_dir):
        for file in sorted((root / group).rglob("*.yaml")):
            text = file.read_text(encoding="utf-8")
            if file.name.startswith(SHARED) or str(target) not in text:  # parsing takes milliseconds
                continue
            content = yaml.safe_load(text)
            section = content.get(group, content) if isinstance(content, dict) else None
            if isinstance(section, dict) and section.get(TARGET) == target:
                return str(file.with_suffix("").relative_to(root / group))
    return None


def fill_missing(recorded: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return `recorded` with the keys that it lacks taken from `defaults`, also in sections of the same type."""
    filled = {**defaults, **recorded}
    for key, value in recorded.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict) and value.get(TARGET) == default.get(TARGET):
            filled[key] = fill_missing(value, default) if key != "architecture" else value
    return filled


def apply_overrides(cfg: DictConfig, overrides: list[Any], extra_dir: str | None) -> None:
    """Set each override in a recorded run's settings; group=option replaces that section."""
    groups = list_groups(extra_dir)
    for override in sorted(overrides, key=lambda override: override.key_or_group not in groups):
        key = override.key_or_group
        if key in groups and key in cfg:
            cfg[key] = to_dict(compose([override.input_line], extra_dir)[key])
        elif override.is_add() or key in list_keys(cfg) or key.endswith("._target_"):
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
        else:
            raise ConfigError(describe_unknown_key(key, cfg, [group for group in groups if group in cfg]))


def check_offered(cfg: DictConfig, overrides: list[Any], directory: Path, extra_dir: str | None) -> None:
    """Raise ConfigError for a class that neither a yaml nor an override names; a run's files alone import nothing."""
    offered = list_offered_targets(list_config_dirs(extra_dir))
    for override in overrides:
        offered |= set(list_targets({override.key_or_group: override.value()}).values())
    check_targets(to_dict(cfg), offered, directory / "config.yaml")


def list_unoffered_code(recorded: dict[str, Any], extra_dir: str | None) -> list[tuple[str, Any]]:
    """Return (dotted key, value) of the code that a recorded configuration names and no yaml does."""
    offered = list_offered_targets(list_config_dirs(extra_dir), "target")
    return [(key, value) for key, value in find_code(recorded) if not (isinstance(value, str) and value in offered)]


def mark_missing(cfg: DictConfig, code: list[tuple[str, Any]]) -> None:
    """Mark these keys as missing, so that an override must set them."""
    for key, _ in code:
        OmegaConf.update(cfg, key, "???", merge=False)


def list_still_missing(cfg: DictConfig, code: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Return the keys, with their values, that no override has set."""
    missing = []
    for key, value in code:
        section, _, last = key.rpartition(".")
        node = OmegaConf.select(cfg, section) if section else cfg
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, last):
            missing.append((key, value))
    return missing


def refuse_code(cfg: DictConfig, code: list[tuple[str, Any]], directory: Path) -> None:
    """Raise ConfigError for the first of these keys that no override has set."""
    for key, value in list_still_missing(cfg, code):
        raise ConfigError(
            f"{key}: config.yaml of {directory} has {value!r}, which runs code; "
            f"give {shlex.quote(f'{key}={format_override_value(value)}')} to allow that"
        )
