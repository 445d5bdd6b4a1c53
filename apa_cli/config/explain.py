"""Explanations, in one line with the nearest right key, of overrides that cannot be composed."""

from __future__ import annotations

import difflib
import re
from pathlib import Path

import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf

from apa_cli.config.aliases import suggest_for_key, suggest_for_option
from apa_cli.config.hydra_api import (
    PATH_KEY,
    compose_unchecked,
    list_groups,
    list_keys,
    parse_override,
    quote_for_shell,
    quote_value,
    read_experiment,
)
from apa_cli.errors import ConfigError, get_first_line

LAMBDA = "lambda"
"""The only key of the command line whose meaning depends on the algorithm."""


SHORT_LIST = 4
"""Number of options up to which a message names all options of a group besides the nearest."""


def explain_error(error: Exception, overrides: list[str], extra_dir: str | None, config_name: str | None) -> str:
    """Return the reason why overrides cannot be composed: a missing option, an unknown key, or Hydra's first line."""
    if isinstance(error, ConfigError):
        return str(error)
    if broken := describe_broken_yaml(overrides, extra_dir):
        return broken
    groups = list_groups(extra_dir)
    choices = []
    for override in overrides:
        parsed = parse_override(override)
        if parsed.key_or_group in groups:
            options, option = groups[parsed.key_or_group], parsed.value()
            if not isinstance(option, str):
                if suggestion := suggest_for_option(parsed.key_or_group, str(option)):
                    return f"{parsed.key_or_group}: no {option}; give {suggestion}"
                several = "; several options need -m (a sweep)" if parsed.is_sweep_override() else ""
                return f"{parsed.key_or_group}: {override} names none of {', '.join(sorted(options))}{several}"
            if option not in options:
                return f"{parsed.key_or_group}: {describe_missing_option(option, options, parsed.key_or_group)}"
            choices.append(override)
    base = None
    if choices != overrides:
        try:
            base = compose_unchecked(choices, extra_dir, config_name)
        except Exception as base_error:
            return explain_error(base_error, choices, extra_dir, config_name)
    if base is not None:
        known = [*list_keys(base), *groups]
        for override in overrides:
            key = parse_override(override).key_or_group
            if key not in known and not override.startswith("+") and not key.startswith("hydra"):
                return describe_unknown_key(key, base, list(groups))
    if "Ambiguous value" in str(error):
        return explain_sweep(get_first_line(error), overrides)
    unknown = re.search(r"is not in struct\n\s*full_key: (\S+)", str(error.__cause__))
    if base is not None and unknown:  # a key inside of a value {key: …}
        return describe_unknown_key(unknown[1], base, list(groups))
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) and error.__cause__ else error
    return _add_override(get_first_line(cause), overrides, choices, extra_dir, config_name)


def describe_broken_yaml(overrides: list[str], extra_dir: str | None) -> str | None:
    """Return one line, with file and line, for a chosen yaml of the user's own folder that is not YAML, or None."""
    choices = (parse_override(override) for override in overrides)
    files = [Path(extra_dir or "") / str(each.key_or_group) / f"{each.value()}.yaml" for each in choices]
    for file in files if extra_dir else ():
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else None
        except yaml.MarkedYAMLError as error:
            line = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
            return f"{file}{line}: not readable as YAML ({error.problem or get_first_line(error)})"
        except (OSError, ValueError, yaml.YAMLError) as error:
            return f"{file}: not readable as YAML ({get_first_line(error)})"
        if not isinstance(content, dict | None):
            return f"{file}: keys are needed, as KEY: VALUE, got a {type(content).__name__}"
    return None


def explain_inherited_key(error: ConfigError, overrides: list[str], extra_dir: str | None) -> str | None:
    """Return one line for an error about a key that an experiment gives and the chosen option lacks, else None."""
    given = [parse_override(override) for override in overrides]
    experiment = next((str(each.value()) for each in given if each.key_or_group == "experiment"), None)
    key = str(error).partition(":")[0]
    chosen = next((each for each in given if each.key_or_group == key.partition(".")[0]), None)
    if experiment is None or chosen is None or key in [each.key_or_group for each in given]:
        return None
    keys, _ = read_experiment(experiment, extra_dir)
    if key not in list_keys(OmegaConf.create(keys)) or "unknown key" not in str(error):
        return None
    return (
        f"{key}: experiment={experiment} sets this key, which {chosen.input_line} does not have; leave "
        f"{chosen.input_line} out, or remove the key by '~{key}'"
    )


def explain_sweep(message: str, overrides: list[str]) -> str:
    """Return one line for an override with several values outside a sweep, which may be one path with a comma."""
    for override in overrides:
        parsed = parse_override(override)
        if parsed.is_sweep_override() and PATH_KEY.search(parsed.key_or_group):
            quoted = quote_for_shell(quote_value(override))
            return f"{parsed.key_or_group}: several values need -m (a sweep), a path with a comma quotes, {quoted}"
    return f"{message}: several values need -m (a sweep), a list needs brackets"


def _add_override(
    message: str, overrides: list[str], choices: list[str], extra_dir: str | None, config_name: str | None
) -> str:
    """Return the message after the override that cannot be composed even alone, with `choices`, if there is one.

    `choices` are the overrides among them that choose a group's option.
    """
    others = [override for override in overrides if override not in choices]
    if len(others) <= 1:
        return f"{(others or overrides)[0]!r}: {message}"
    for override in others:
        try:
            compose_unchecked([*choices, override], extra_dir, config_name)
        except Exception as error:
            return explain_error(error, [*choices, override], extra_dir, config_name)
    return message


def describe_missing_option(option: str, options: set[str], group: str | None = None) -> str:
    """Return one line for an option that a group does not have, with the right override or the nearest option."""
    if group is not None and (suggestion := suggest_for_option(group, option)):
        return f"no '{option}'; give {suggestion}"
    nearest = difflib.get_close_matches(option, options, n=1, cutoff=0.4)
    hints = [f"did you mean '{nearest[0]}'?"] if nearest else []
    if not nearest or len(options) <= SHORT_LIST:
        hints.append(f"there are {', '.join(sorted(options))}")
    return f"no '{option}'; {' '.join(hints)}"


def describe_unknown_key(key: str, cfg: DictConfig, candidates: list[str] | None = None) -> str:
    """Return one line for a key that does not exist: its name here, or the nearest key.

    `candidates` are preferred over the keys of `cfg` if both are equally near.
    """
    if not key:
        return "'': a key is needed; overrides have the form key=value"
    if key == LAMBDA:
        return f"{LAMBDA}: the algorithm of this run has no λ; leave it out"
    keys = [name for name in [*(candidates or []), *list_keys(cfg)] if name != key]
    section, _, last = key.rpartition(".")
    if last.lower() in (LAMBDA, f"{LAMBDA}_"):
        return f"{key}: unknown key; here it is {LAMBDA}"
    same_section = [name for name in keys if section and name.rpartition(".")[0] == section]
    nearest = difflib.get_close_matches(key, same_section, n=1, cutoff=0.85)
    if not nearest and (suggestion := suggest_for_key(key)):
        return f"{key}: unknown key; here it is {suggestion}"
    nearest = nearest or [name for name in keys if name.rpartition(".")[2] == last]
    nearest = nearest or difflib.get_close_matches(key, keys, n=1, cutoff=0.5)
    if not nearest:
        by_last = {name.rpartition(".")[2]: name for name in reversed(keys)}
        nearest = [by_last[name] for name in difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)]
    return f"{key}: unknown key; " + (f"did you mean '{nearest[0]}'?" if nearest else "--help lists the keys")


def suggest_for_flag(flag: str, value: str | None) -> str:
    """Return one line for a flag of another tool, such as --learning_rate 1e-5, with the override for it."""
    key, _, attached = flag.lstrip("-").partition("=")
    key = key.replace("-", "_")
    value = attached or (value if value and not value.startswith("-") and "=" not in value else None) or "VALUE"
    suggestion = suggest_for_key(key)
    simple = suggestion is None or re.fullmatch(r"[\w.]+", suggestion)
    answer = f"{suggestion or key}={value}" if simple else suggestion
    return f"{flag.partition('=')[0]}: no such flag; options have the form key=value, here {answer}; --help lists them"
