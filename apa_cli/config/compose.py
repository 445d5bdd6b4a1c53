"""Composition of overrides to an unchecked configuration; `build_config` checks it."""

from __future__ import annotations

from omegaconf import DictConfig

from apa_cli.config import run_names  # noqa: F401  (registers the resolvers of conf/config.yaml)
from apa_cli.config.aliases import CHOSEN_BY_GROUP
from apa_cli.config.explain import explain_error
from apa_cli.config.hydra_api import CONFIG_NAME, compose_unchecked, parse_override
from apa_cli.errors import ConfigError

LOCAL_MODEL = "model=local"


def compose(overrides: list[str], extra_dir: str | None = None, config_name: str | None = CONFIG_NAME) -> DictConfig:
    """Compose conf/ with these overrides. Raise ConfigError, in one line, for overrides that cannot be composed.

    Without a `config_name` the configuration holds only what the overrides add.
    """
    try:
        if config_name is not None:
            overrides = choose_local_model(overrides, extra_dir)
        return compose_unchecked(overrides, extra_dir, config_name)
    except Exception as error:  # of Hydra, of OmegaConf, or of Python for a list in place of a name
        raise ConfigError(explain_error(error, overrides, extra_dir, config_name)) from error


def choose_local_model(overrides: list[str], extra_dir: str | None) -> list[str]:
    """Return the overrides with model=local added if model.path is given and only the default names a model.

    The default model, embedded, sets learning rates for a tiny network, which are wrong for any other model.
    """
    keys = {override.partition("=")[0].lstrip("+") for override in overrides}
    given = [override.lstrip("+") for override in overrides if override.lstrip("+").startswith("model.path=")]
    if not given or "model" in keys or given[-1] in ("model.path=", "model.path=null"):
        return overrides
    choosing = [override for override in overrides if override.partition("=")[0] == "experiment"]
    cfg = compose_unchecked(choosing, extra_dir, choices=True)
    return [LOCAL_MODEL, *overrides] if cfg.hydra.runtime.choices.model == "embedded" else overrides


def check_group_keys(overrides: list[str]) -> None:
    """Raise ConfigError for a key that only a group's option sets."""
    for override in overrides:
        key = parse_override(override).key_or_group
        if group := CHOSEN_BY_GROUP.get(key):
            raise ConfigError(f"{key}: only an option of the group sets it; give {group}=NAME")


def check_adapter_keys(overrides: list[str], extra_dir: str | None) -> None:
    """Raise ConfigError for adapter settings of a new run without adapters."""
    keys = [parse_override(override).key_or_group for override in overrides]
    adapter_keys = [key for key in keys if key.startswith("lora.")]
    if adapter_keys and "lora" not in keys:
        others = [override for override, key in zip(overrides, keys, strict=True) if key not in adapter_keys]
        if compose(others, extra_dir).lora.rank == 0:
            raise ConfigError(f"{adapter_keys[0]}: this run has no adapters; give lora=default {adapter_keys[0]}=…")
