"""The settings of a run that is there already, with words on top: to look at it, to resume it, to fork it."""

from __future__ import annotations

import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import BooleanNode, DictConfig, OmegaConf
from omegaconf.errors import ValidationError

from apa_cli.config.compose import (
    LAMBDA,
    RUN,
    compose,
    config_dir,
    explained,
    groups_of,
    keys_of,
    run_directory_name,
    unknown_key,
)
from apa_cli.config.trust import check_plain, check_targets, offered_targets, targets
from apa_cli.errors import ConfigError
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.records import located_run, nearest, recorded_config
from apa_cli.runs.resume import AUTO, FORK, RESUME, code_in, worded
from apa_cli.settings import SECTIONS, TARGET_SECTIONS


def always(cfg: DictConfig) -> bool:
    return True


def compose_run(
    words: list[str], extra_dir: str | None = None, scores: Callable[[DictConfig], bool] = always
) -> DictConfig:
    """The settings of the run that a word run=… names, the other words on top of them.

    What the run does not know yet is as in conf/. `lambda` is not there: the key of the algorithm that it set is.
    ConfigError where the run's config.yaml names code that neither conf/, `extra_dir` nor the words name; `scores`
    says whether the reward's is asked for at all.
    """
    overrides = _overrides(words, extra_dir)
    name = next(str(override.value()) for override in overrides if override.key_or_group == RUN)
    directory = located_run(name)[0]
    recorded = recorded_config(directory)
    check_plain(recorded, directory / "config.yaml", (*SECTIONS, *TARGET_SECTIONS))
    recorded["model"]["trust_remote_code"] = False  # another run's consent is none
    defaults = typing.cast(dict, OmegaConf.to_container(compose([], extra_dir), resolve=False))
    cfg = OmegaConf.create(_completed(recorded, defaults))
    cfg.pop(LAMBDA, None)
    code = _own_code(recorded, extra_dir)
    _take_out(cfg, code)
    if recorded.get("sampling", {}).get("stop_strings") == recorded.get("dataset", {}).get("stop_strings"):
        cfg.sampling.stop_strings = defaults["sampling"]["stop_strings"]  # those of another data set, if one is given
    _on_top(cfg, overrides, extra_dir)
    _check_targets(cfg, overrides, directory, extra_dir)
    if scores(cfg):
        _refuse_code(cfg, code, directory)
    for key, value in _not_named(cfg, code):
        OmegaConf.update(cfg, key, value, merge=False)
    return cfg


def _check_targets(cfg: DictConfig, overrides: list[Override], directory: Path, extra_dir: str | None) -> None:
    """ConfigError for a class that neither the yamls nor a word names: the run alone cannot have it imported."""
    offered = offered_targets(_folders(extra_dir))
    for override in overrides:
        offered |= set(targets({override.key_or_group: override.value()}).values())
    check_targets(typing.cast(dict, OmegaConf.to_container(cfg, resolve=False)), offered, directory / "config.yaml")


def _folders(extra_dir: str | None) -> list[Path]:
    """Where the yamls are."""
    return [config_dir(), *([Path(extra_dir)] if extra_dir else [])]


def _own_code(recorded: dict[str, Any], extra_dir: str | None) -> list[tuple[str, Any]]:
    """`code_in` the recorded configuration that no yaml names too."""
    offered = offered_targets(_folders(extra_dir), "target")
    return [(key, value) for key, value in code_in(recorded) if not (isinstance(value, str) and value in offered)]


def is_on(value: Any) -> bool:
    """A switch of a configuration, as its check will read it; true for what that will refuse."""
    try:
        return bool(BooleanNode().validate_and_convert(value))
    except ValidationError:
        return True


def _take_out(cfg: DictConfig, code: list[tuple[str, Any]]) -> None:
    """Values are needed for these keys again."""
    for key, _ in code:
        OmegaConf.update(cfg, key, "???", merge=False)


def _not_named(cfg: DictConfig, code: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Those of the keys that still need values."""
    found = []
    for key, value in code:
        section, _, last = key.rpartition(".")
        node = OmegaConf.select(cfg, section) if section else cfg
        if isinstance(node, DictConfig) and OmegaConf.is_missing(node, last):
            found.append((key, value))
    return found


def _refuse_code(cfg: DictConfig, code: list[tuple[str, Any]], directory: Path) -> None:
    """ConfigError for the first of these keys that still needs a value."""
    for key, value in _not_named(cfg, code):
        raise ConfigError(
            f"{key}: config.yaml of {directory} has {value!r} there, which runs code; "
            f"give {key}={worded(value)} if that is wanted"
        )


def compose_again(words: list[str], source: Path, extra_dir: str | None = None) -> DictConfig:
    """The settings of the run in the directory `source`, which is resumed or forked, the words on top of them.

    A group=option sets all that it sets in a new run. ConfigError where the run's config.yaml names code that neither
    conf/, `extra_dir` nor the words name: what lies in a run's directory runs nothing by itself.
    """
    overrides = _overrides(words, extra_dir)
    groups = groups_of(extra_dir)
    defaults = typing.cast(dict, OmegaConf.to_container(compose([], extra_dir), resolve=False))
    recorded = RunDirectory(source).recorded()
    check_plain(recorded, source / "config.yaml", (*SECTIONS, *TARGET_SECTIONS))
    recorded = _completed(recorded, defaults)
    recorded |= {key: defaults[key] for key in OF_ONE_COMMAND}
    if any(override.key_or_group == FORK for override in overrides):
        recorded["name"] = defaults["name"]
    for section in TARGET_SECTIONS:
        recorded[section] = _set_by_lambda(recorded[section], section, extra_dir)
    cfg = OmegaConf.create(_linked(recorded, defaults, OmegaConf.create(recorded)))
    code = _own_code(recorded, extra_dir)
    _take_out(cfg, code)
    chosen = [override for override in overrides if override.key_or_group in groups]
    if chosen:
        new = OmegaConf.to_container(compose([override.input_line for override in chosen], extra_dir), resolve=False)
        own = typing.cast(dict, OmegaConf.to_container(cfg, resolve=False))
        for override in chosen:
            own = _taken(own, new, _set_by(override, new, defaults, extra_dir))
        cfg = OmegaConf.create(own)
    _on_top(cfg, [override for override in overrides if override not in chosen], extra_dir)
    _check_targets(cfg, overrides, source, extra_dir)
    _refuse_code(cfg, code, source)
    return cfg


OF_ONE_COMMAND = ("resume", "resume_changed", "stop_after", "dry_run")
"""Keys that say nothing about the run, only what one command does with it."""


def _set_by_lambda(section: dict[str, Any], name: str, extra_dir: str | None) -> dict[str, Any]:
    """The section, what `lambda` sets in the yaml of its `_target_` linked again."""
    target, roots = section.get("_target_"), _folders(extra_dir)
    for file in (file for root in roots for file in sorted((root / name).rglob("*.yaml"))):
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        known = content.get(name, content)
        if target is not None and known.get("_target_") == target:
            return section | {key: value for key, value in known.items() if value == f"${{{LAMBDA}}}"}
    return section


def _linked(own: dict[str, Any], defaults: dict[str, Any], whole: DictConfig) -> dict[str, Any]:
    """`own` with the references of the defaults, ${another.key}, wherever it has the value of that key in `whole`."""
    linked = dict(own)
    for key, value in own.items():
        default = defaults.get(key)
        if isinstance(value, dict) and isinstance(default, dict):
            linked[key] = _linked(value, default, whole)
        elif found := re.fullmatch(r"\$\{([\w.]+)\}", str(default)):
            linked[key] = default if OmegaConf.select(whole, found[1]) == value else value
    return linked


def _set_by(override: Override, new: dict[str, Any], defaults: dict[str, Any], extra_dir: str | None) -> dict[str, Any]:
    """The keys, nested, that group=option sets in a new run; for the group's section, which it sets as a whole, None.

    A yaml without a section of its own name, an experiment, is known by what differs from the defaults.
    """
    group = override.key_or_group
    if group not in new:
        return _differing(new, defaults)
    content = compose([f"+{override.input_line}"], extra_dir, None)
    return typing.cast(dict, OmegaConf.to_container(content, resolve=False)) | {group: None}


def _differing(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The keys, nested, whose values differ; None for sections that are of two types."""
    keys: dict[str, Any] = {}
    for key, value in new.items():
        other = old.get(key)
        both = isinstance(value, dict) and isinstance(other, dict)
        if value != other:
            keys[key] = _differing(value, other) if both and value.get("_target_") == other.get("_target_") else None
    return keys


def _taken(own: dict[str, Any], new: dict[str, Any], keys: dict[str, Any]) -> dict[str, Any]:
    """`own` with the values of `new` under these keys, nested."""
    taken = dict(own)
    for key, within in keys.items():
        if isinstance(within, dict) and isinstance(own.get(key), dict) and isinstance(new[key], dict):
            taken[key] = _taken(own[key], new[key], within)
        else:
            taken[key] = new[key]
    return taken


def _overrides(words: list[str], extra_dir: str | None) -> list[Override]:
    """The words parsed. ConfigError for one that has several values, or none."""
    overrides = _parsed(words, extra_dir)
    for override in overrides:
        if override.is_delete() or override.is_sweep_override():
            raise ConfigError(f"{override.key_or_group}: one value is needed; several need -m, a list needs brackets")
    return overrides


def _parsed(words: list[str], extra_dir: str | None) -> list[Override]:
    try:
        return OverridesParser.create().parse_overrides(words)
    except HydraException as error:
        raise ConfigError(explained(error, words, extra_dir, "config")) from error


def _on_top(cfg: DictConfig, overrides: list[Override], extra_dir: str | None) -> None:
    """Puts words on top of a run's settings; group=option replaces that section."""
    groups = groups_of(extra_dir)
    for override in sorted(overrides, key=lambda override: override.key_or_group not in groups):
        key = override.key_or_group
        if key in groups and key in cfg:
            section = compose([override.input_line], extra_dir)[key]
            cfg[key] = OmegaConf.to_container(section, resolve=False)
        elif override.is_add() or key in keys_of(cfg) or key.endswith("._target_"):
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
        else:
            raise ConfigError(unknown_key(key, cfg, [group for group in groups if group in cfg]))


def source_of(words: list[str], extra_dir: str | None = None) -> Path | None:
    """The directory of the run that these words resume or fork; None where they begin one of its own.

    ConfigError where there is no run in it.
    """
    given = {each.key_or_group: each.value() for each in _parsed(words, extra_dir)}
    resume, fork, name = (given.get(key) for key in (RESUME, FORK, "name"))
    if fork is not None and resume not in (None, AUTO):
        raise ConfigError(f"{FORK}: give it without {RESUME}={resume}; a fork is a run of its own")
    if resume == AUTO and name is not None:
        path = Path(run_directory_name(str(name), AUTO))
        if any(path.glob("checkpoints/iteration_*")):
            return path
    named = {RESUME: None if resume == AUTO else resume, FORK: fork}
    for key, value in named.items():
        if value is not None:
            path = Path(run_directory_name("", str(value))).expanduser()
            if not (path / "config.yaml").is_file():
                raise ConfigError(f"{key}: there is no run in {path}{nearest(path)}")
            return path
    return None


def _completed(given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """`given` with the keys that it lacks taken from `defaults`, also in sections that are of one type."""
    whole = {**defaults, **given}
    for key, value in given.items():
        other = defaults.get(key)
        if isinstance(value, dict) and isinstance(other, dict) and value.get("_target_") == other.get("_target_"):
            whole[key] = _completed(value, other) if key != "architecture" else value
    return whole
