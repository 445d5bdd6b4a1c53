"""Construction of the checked `Config` from a composed configuration.

Anything wrong with a configuration is found here, before torch is imported, and reported in one line.
"""

from __future__ import annotations

import itertools
import math
import typing
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Annotated, Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from apa_cli.algorithms.base import Algorithm
from apa_cli.algorithms.plans import Plan
from apa_cli.config.compose import compose
from apa_cli.config.explain import LAMBDA, describe_missing_option, describe_unknown_key
from apa_cli.config.hydra_api import list_groups, list_keys, to_dict
from apa_cli.config.trust import check_references
from apa_cli.datasets.base import Dataset
from apa_cli.errors import ConfigError, get_first_line
from apa_cli.rewards.base import NamedReward, Reward
from apa_cli.runs.resume import AUTO, RESUME
from apa_cli.runs.stopping import parse_duration
from apa_cli.secrets import check_secrets
from apa_cli.settings import SECTIONS, TARGET_SECTIONS, Config, RewardSpecs, RewardSpecSettings, RunSettings
from apa_cli.types import DATA, GUIDE, INIT, OLD, POLICY, REFERENCE, TARGET, EscapedText, Needs, Range
from apa_cli.user_code import import_object

LONGEST_FILE_NAME = 255
"""Bytes; the limit of common file systems."""
BASES: dict[str, type] = {"algo": Algorithm, "plan": Plan, "dataset": Dataset}
"""Section → the class from which its `_target_` must inherit; of all other places, rewards', it is `Reward`."""


def build_config(cfg: DictConfig, extra_dir: str | None = None) -> Config:
    """Return the checked configuration; `extra_dir` is the user's own folder of yamls, or None.

    Raise ConfigError, in one line, for anything wrong with the configuration.
    """
    check_references(to_dict(cfg))
    check_lambda(cfg)
    known = {f.name for f in fields(RunSettings)} | set(SECTIONS) | set(TARGET_SECTIONS) | {LAMBDA}
    for key in cfg:
        if key not in known:
            raise ConfigError(describe_unknown_key(str(key), cfg))
    sections = {name: _build_named_section(cfg, name, extra_dir) for name in (*TARGET_SECTIONS, *SECTIONS)}
    run = {f.name: _resolve_value(cfg, f.name, f.name) for f in fields(RunSettings) if f.name in cfg}
    if run.get("samples_per_prompt", 1) is None:
        run["samples_per_prompt"] = sections["plan"].needs(sections["algo"].needs()).samples_per_prompt
    raw = to_dict(cfg, resolve=True) | {"samples_per_prompt": run.get("samples_per_prompt")}
    config = Config(run=_build_section(RunSettings, run, "", cfg), **sections, raw=raw)
    check_secrets(config.raw)
    check_arithmetic(config)
    check_continuation(config, cfg)
    return config


def build_needs(cfg: DictConfig) -> Needs:
    """Return what the algorithm and the plan of a composed configuration need together."""
    return _build_named_section(cfg, "plan").needs(_build_named_section(cfg, "algo").needs())


def _build_named_section(cfg: DictConfig, name: str, extra_dir: str | None = None) -> Any:
    """Return the dataclass of one section. Raise ConfigError for anything wrong with it."""
    if not _is_section(cfg, name):
        raise ConfigError(f"{name}: a section with keys is needed, got {to_dict(cfg).get(name)!r}")
    values = {str(key): _resolve_value(cfg[name], key, f"{name}.{key}") for key in cfg[name]}
    kind = SECTIONS.get(name) or _import_target(values.pop("_target_", None), name)
    return _build_section(kind, values, name, cfg, extra_dir)


def _is_section(cfg: DictConfig, name: str) -> bool:
    """Return True if the key holds a section; False also for an interpolation that cannot be resolved."""
    try:
        return isinstance(cfg.get(name), DictConfig)
    except OmegaConfBaseException:
        return False


def check_lambda(cfg: DictConfig) -> None:
    """Raise ConfigError if the algorithm has no λ, or if the key that `lambda` sets was set directly."""
    raw = to_dict(cfg["algo"]) if _is_section(cfg, "algo") else {}
    linked = f"${{{LAMBDA}}}" in raw.values()
    if LAMBDA in cfg and not linked:
        raise ConfigError(
            f"{LAMBDA}: the algorithm has no λ, or the key that {LAMBDA} sets was set directly; give {LAMBDA}=…"
        )


def check_arithmetic(config: Config) -> None:
    """Raise ConfigError if batch sizes do not divide one another or other settings contradict each other."""
    run = config.run
    parts = Path(run.name).parts
    if not run.name.strip() or not parts or ".." in parts or Path(run.name).is_absolute():
        raise ConfigError(f"name: {run.name!r} is not a folder under outputs/")
    if any(len(part.encode()) > LONGEST_FILE_NAME for part in parts):
        raise ConfigError(f"name: {run.name[:40]!r}… exceeds {LONGEST_FILE_NAME} bytes, the longest folder name")
    check_algorithm(config)
    for large, small in (
        ("rollout_batch_size", "minibatch_size"),
        ("minibatch_size", "microbatch_size"),
        ("rollout_batch_size", "samples_per_prompt"),
    ):
        if getattr(run, large) % getattr(run, small):
            raise ConfigError(f"{large}: {getattr(run, large)} is not a multiple of {small} {getattr(run, small)}")
    if config.model.path is None and "model_type" not in config.model.architecture:
        raise ConfigError("model.path: a value is needed; give model.path=FOLDER_OR_HUB_ID")
    if not all(n >= 1 for n in config.evaluation.best_of):
        raise ConfigError(
            f"evaluation.best_of: whole numbers of at least 1 are needed, got {config.evaluation.best_of}"
        )
    if len(config.optimizer.betas) != 2 or not all(0 <= beta < 1 for beta in config.optimizer.betas):
        raise ConfigError(f"optimizer.betas: two numbers from 0 to below 1 are needed, got {config.optimizer.betas}")


def check_algorithm(config: Config) -> None:
    """Raise ConfigError if the algorithm cannot train with this plan, number of samples or without kl/*."""
    plan, samples, needs = config.plan.name, config.run.samples_per_prompt, config.needs
    if plan not in config.algo.plans:
        options = " or ".join(f"plan={name}" for name in config.algo.plans)
        raise ConfigError(f"plan: {config.algo.label} cannot train on {plan}; give {options}")
    if samples < needs.least_samples:
        raise ConfigError(
            f"samples_per_prompt: the algorithm with these settings needs at least {needs.least_samples}, got {samples}"
        )
    if samples % needs.samples_multiple:
        raise ConfigError(
            f"samples_per_prompt: the algorithm needs a multiple of {needs.samples_multiple}, got {samples}"
        )
    if config.optimizer.critic_warmup_iterations and not needs.critics:
        raise ConfigError(
            f"optimizer.critic_warmup_iterations: {config.algo.label} with these settings has no critic, so nothing "
            "would learn in these iterations; give 0"
        )
    check_names(needs)
    if config.run.stop_at_kl is not None and not config.reference.log_kl:
        raise ConfigError(
            "stop_at_kl: kl/sequence is not measured with reference.log_kl=false; leave one of the two out"
        )


def check_names(needs: Needs) -> None:
    """Raise ConfigError for a sampler or pass that does not exist."""
    critics = {critic.name for critic in needs.critics}
    passes = {INIT, REFERENCE, OLD, GUIDE, *critics, *(f"{name}{TARGET}" for name in critics)}
    for what, names, known in (
        ("sampler", needs.samplers, {POLICY, INIT, REFERENCE, GUIDE, DATA}),
        ("pass", itertools.chain(*needs.passes.values()), passes),
    ):
        if unknown := sorted(set(names) - known):
            raise ConfigError(
                f"algo: needs() names the {what} {unknown[0]!r}, which does not exist; there are "
                f"{', '.join(sorted(known))}"
            )


def check_continuation(config: Config, cfg: DictConfig) -> None:
    """Raise ConfigError for resume=auto without a name, for overwrite with resume, or an invalid time limit."""
    run = config.run
    if run.overwrite and run.resume is not None:
        raise ConfigError(f"overwrite: {RESUME}={run.resume} continues the run that this would remove; leave one out")
    if run.resume == AUTO and "${run_name:" in str(to_dict(cfg).get("name")):
        raise ConfigError(f"{RESUME}: {AUTO} needs name=…, which identifies the run")
    if run.stop_after is not None:
        try:
            parse_duration(run.stop_after)
        except ValueError as error:
            raise ConfigError(f"stop_after: {error}") from error


def _resolve_value(node: DictConfig, key: Any, name: str) -> Any:
    """Return one value, resolved. Raise ConfigError if the value is missing or refers to nothing."""
    if OmegaConf.is_missing(node, key):
        raise ConfigError(f"{name}: a value is needed; give {name}=…")
    try:
        value = node[key]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {get_first_line(error)}") from error
    try:
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except OmegaConfBaseException as error:
        raise ConfigError(f"{name}: {get_first_line(error)}") from error


def _import_target(path: Any, section: str) -> type:
    """Return the dataclass that a section's `_target_` names. Raise ConfigError if there is none that can be used."""
    if not isinstance(path, str):
        raise ConfigError(f"{section}._target_: FILE.py:Class or package.module.Class is needed, got {path!r}")
    try:
        found = import_object(path)
    except ImportError as error:
        raise ConfigError(f"{section}._target_: {error}") from error
    if not (isinstance(found, type) and is_dataclass(found)):
        raise ConfigError(f"{section}._target_: {path} is not a dataclass")
    base = BASES.get(section, Reward)
    if not issubclass(found, base):
        raise ConfigError(f"{section}._target_: {path} is not a subclass of {base.__module__}.{base.__name__}")
    missing = sorted(getattr(found, "__abstractmethods__", ()))
    if base is Plan and not hasattr(found, "name"):
        missing.append("name")
    if missing:
        raise ConfigError(f"{section}._target_: {path} lacks {', '.join(missing)}")
    return found


@cache
def _schema(kind: type) -> DictConfig:
    """Return the fields of a dataclass without values: a schema to merge values onto."""
    schema = OmegaConf.structured(kind)
    OmegaConf.set_readonly(schema, False)
    return schema


def _build_section(
    kind: type, values: dict[str, Any], section: str, cfg: DictConfig, extra_dir: str | None = None
) -> Any:
    """Return an instance of the dataclass `kind`. Raise ConfigError naming a key that is unknown, missing or wrong."""
    schema: Any
    try:
        hints, schema = typing.get_type_hints(kind, include_extras=True), _schema(kind)
    except (NameError, TypeError, OmegaConfBaseException) as error:
        raise ConfigError(f"{section}._target_: the type of a field is unusable ({get_first_line(error)})") from error
    named = {f.name for f in fields(kind)}
    prefix = f"{section}." if section else ""
    for key in values:
        if key not in named:
            raise ConfigError(describe_unknown_key(f"{prefix}{key}", cfg, [f"{prefix}{name}" for name in named]))
    try:
        schema, apart = OmegaConf.merge(schema, values), False
    except OmegaConfBaseException:
        apart = True  # merging one key at a time then shows which value is wrong
    for key in sorted(named, key=lambda key: (_rank_reference(cfg, section, key, named), key)):
        name = _user_key(cfg, section, key)
        if key not in values:
            raise ConfigError(f"{name}: a value is needed")
        value, hint = values[key], hints[key]
        try:
            schema = OmegaConf.merge(schema, {key: value}) if apart else schema
        except OmegaConfBaseException as error:
            if isinstance(value, list) and None in value:
                raise ConfigError(f"{name}: {value!r} has null in it; leave it out, or give a value") from error
            raise ConfigError(f"{name}: {value!r} is not {_describe_type(hint)}") from error
        _check_range(name, schema[key], hint)
    try:
        typed: Any = OmegaConf.to_object(schema)
    except (TypeError, ValueError) as error:  # of the class's own __post_init__
        raise ConfigError(f"{section}: {get_first_line(error)}") from error
    for key, hint in hints.items():
        if EscapedText in getattr(hint, "__metadata__", ()):
            typed = replace(typed, **{key: _unescape(getattr(typed, key))})
        if RewardSpecs in getattr(hint, "__metadata__", ()):
            typed = replace(typed, **{key: _build_parts(values[key], f"{prefix}{key}", cfg, extra_dir)})
    return typed


def _build_parts(specs: list[Any], where: str, cfg: DictConfig, extra_dir: str | None) -> list[NamedReward]:
    """Return the rewards of a list of specs, as `RewardSpecs` describes them."""
    own_keys = [f.name for f in fields(RewardSpecSettings)]
    settings, rewards = [], []
    for number, spec in enumerate(specs):
        place = f"{where}[{number}]"
        if not isinstance(spec, dict | str):
            raise ConfigError(f"{place}: the name of a reward or {{use: NAME, …}} is needed, got {spec!r}")
        given = {"name": None, "weight": 1.0, **(spec if isinstance(spec, dict) else {"use": spec})}
        settings.append(
            _build_section(RewardSpecSettings, {key: given.pop(key) for key in own_keys if key in given}, place, cfg)
        )
        rewards.append(_build_reward(settings[-1].use, given, place, cfg, extra_dir))
    return [
        NamedReward(name, part.weight, reward)
        for name, part, reward in zip(_name_parts(settings, where), settings, rewards, strict=True)
    ]


def _name_parts(parts: list[RewardSpecSettings], where: str) -> list[str]:
    """Return each part's own name, or its reward's name, numbered if another part has that name."""
    names = [part.name for part in parts if part.name]
    if len(set(names)) < len(names):
        raise ConfigError(f"{where}: two rewards have the same name, {', '.join(names)}; give each its own")
    found = []
    for part in parts:
        free = (f"{part.use}_{number}" if number > 1 else part.use for number in itertools.count(1))
        found.append(part.name or next(name for name in free if name not in names))
        names.append(found[-1])
    return found


def _build_reward(name: str, given: dict[str, Any], place: str, cfg: DictConfig, extra_dir: str | None) -> Any:
    """Return the reward of conf/reward/NAME.yaml, or of the user's own folder, with the keys in `given` changed."""
    options = list_groups(extra_dir)["reward"]
    if name not in options:
        raise ConfigError(f"{place}: {describe_missing_option(name, options)}")
    node = compose([f"+reward={name}"], extra_dir, None).reward
    known = {f"{place}.{key}" for key in [*(f.name for f in fields(RewardSpecSettings)), *list_keys(node)]}
    for key in list_keys(OmegaConf.create(given)):
        above = key.rpartition(".")[0]
        if f"{place}.{key}" not in known and (not above or OmegaConf.select(node, above)):
            raise ConfigError(describe_unknown_key(f"{place}.{key}", OmegaConf.create(), sorted(known)))
    whole = cfg.copy()  # so that the yaml may refer to other sections, as a reward section may
    OmegaConf.set_struct(whole, False)
    OmegaConf.set_struct(node, False)
    whole["reward"] = OmegaConf.merge(node, given)
    for key in whole["reward"]:
        if OmegaConf.is_missing(whole["reward"], key):
            raise ConfigError(f"{place}.{key}: a value is needed")
    values = {str(key): _resolve_value(whole["reward"], key, f"{place}.{key}") for key in whole["reward"]}
    return _build_section(_import_target(values.pop("_target_", None), place), values, place, whole, extra_dir)


def _user_key(cfg: DictConfig, section: str, key: str) -> str:
    """Return the key that the user sets: `lambda` for a field that refers to `lambda`."""
    node = cfg.get(section) if section else None
    if isinstance(node, DictConfig) and to_dict(node).get(key) == f"${{{LAMBDA}}}":
        return LAMBDA
    return f"{section}.{key}" if section else key


def _rank_reference(cfg: DictConfig, section: str, key: str, named: set[str]) -> int:
    """Return 0 for a value, 1 for an interpolation, 2 for that of another key of the section, whose keys are `named`.

    Of several keys that are wrong, errors name the first in this order: the one that was set, not one that follows it.
    """
    node = cfg.get(section) if section else cfg
    if not (isinstance(node, DictConfig) and key in node and OmegaConf.is_interpolation(node, key)):
        return 0
    prefix, interpolation = f"{section}." if section else "", cast(Any, node._get_node(key))
    return 2 if interpolation._value().strip("${}").removeprefix(prefix) in named else 1


def _check_range(name: str, value: Any, hint: Any) -> None:
    """Raise ConfigError for a number that is not finite or is outside the `Range` of its type."""
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{name}: {value} is not a finite number")
    if value is None or typing.get_origin(hint) is not Annotated:
        return
    for allowed in hint.__metadata__:
        if isinstance(allowed, Range) and value not in allowed:
            raise ConfigError(f"{name}: {value} must be {allowed}")


def _unescape(value: Any) -> Any:
    """Return a text, or each text of a list, with its escapes replaced, as `EscapedText` describes them."""
    if isinstance(value, list):
        return [_unescape(part) for part in value]
    return EscapedText.read(value) if isinstance(value, str) else value


def _describe_type(hint: Any) -> str:
    """Return a type as a user names it, such as "a whole number or null"."""
    if typing.get_origin(hint) is Annotated:
        hint = typing.get_args(hint)[0]
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] or [hint]
    kind = hint if typing.get_origin(hint) in (list, dict) else kinds[0]
    optional = " or null" if type(None) in typing.get_args(hint) else ""
    if isinstance(kind, type) and issubclass(kind, Enum):
        return "one of " + ", ".join(member.name for member in kind)
    words = {float: "a number", int: "a whole number", bool: "true or false", str: "a text"}
    if len(kinds) > 1 and kind is kinds[0]:
        return " or ".join(words[each] for each in kinds) + optional
    if typing.get_origin(kind) is dict:
        return "a mapping, as {name: value}" + optional
    return words.get(kind, f"a {typing.get_origin(kind).__name__}" if typing.get_origin(kind) else str(kind)) + optional
