"""Options without effect: those that the other settings make idle, refused if they were set on the command line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from apa_cli.config.hydra_api import parse_override
from apa_cli.errors import ConfigError
from apa_cli.runs.resume import is_within
from apa_cli.settings import Config, CriticKind
from apa_cli.types import REFERENCE

CRITIC_KEYS = (
    "critic", "optimizer.critic_lr", "optimizer.critic_warmup_iterations", "guard.critic_patience",
    "guard.min_explained_variance", "optimizer.joint_clip",
)  # fmt: skip
"""Keys and sections that concern critics alone."""


def list_idle_options(config: Config) -> dict[str, str]:
    """Return the keys and sections without effect, each with the reason."""
    algo, needs = config.algo, config.needs
    idle = {f"algo.{name}": f"algo.{reason}" for name, reason in algo.idle_fields().items()}
    if not needs.critics:
        idle |= dict.fromkeys(CRITIC_KEYS, f"{algo.label} without a critic")
    elif config.critic.kind is not CriticKind.separate:
        idle["critic.init"] = f"critic={config.critic.kind.value}, which starts from the policy"
    if config.model.tokenizer is not None or config.model.path is not None:
        key = "tokenizer" if config.model.tokenizer is not None else "path"
        idle["model.tokenizer_vocabulary"] = f"model.{key}, which brings its own tokenizer"
    if config.model.path is not None and Path(config.model.path).expanduser().is_dir():
        idle["model.architecture"] = "a model.path that is a folder, whose config.json says the same"
    if not any(REFERENCE in passes for passes in needs.passes.values()):
        idle["reference.refresh_every"] = f"{algo.label}, whose loss reads no reference"
    return idle


def refuse_idle_options(config: Config, overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override of an option without effect, unless it turns the option off."""
    idle = list_idle_options(config)
    for override in map(parse_override, overrides):
        key, value = override.key_or_group, override.value()
        reason = next((reason for option, reason in idle.items() if is_within(key, option)), None)
        is_off = value is None or (value == 0 and not key.startswith("algo."))
        if reason is not None and not is_off:
            raise ConfigError(f"{key}: no effect with {reason}; leave it out")
