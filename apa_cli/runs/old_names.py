"""Former names of the configuration's keys, so that runs recorded with them can still be read.

Such a run can be evaluated and compared (`translate_old_names`), but not continued (`is_old`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

CURRENT_NAMES = {
    "rollout_batch": "rollout_batch_size",
    "minibatch": "minibatch_size",
    "microbatch": "microbatch_size",
    "epochs": "update_epochs",
    "eval_every": "evaluation.every",
    "eval_seed": "evaluation.seed",
    "checkpoint_every": "checkpoint.every",
    "plan": "dry_run",
    "evaluation.shown": "evaluation.print_samples",
    "evaluate.reference": "evaluation.reference",
    "evaluate.best_of": "evaluation.best_of",
    "evaluate.best_of_prompts": "evaluation.best_of_prompts",
    "optimizer.schedule": "optimizer.lr_scheduler",
    "sft.batch": "sft.batch_size",
    "sft.schedule": "sft.lr_scheduler",
    "sft.warmup_fraction": "sft.warmup_ratio",
    "reward_model.batch": "reward_model.batch_size",
    "reward_model.schedule": "reward_model.lr_scheduler",
    "reward_model.warmup_fraction": "reward_model.warmup_ratio",
    "sampling.microbatch": "sampling.microbatch_size",
    "reward.batch": "reward.batch_size",
    "reward.microbatch": "reward.microbatch_size",
    "lora.targets": "lora.target_modules",
    "model.attention": "model.attn_implementation",
    "algo.advantage": "algo.advantage_estimator",
    "algo.controller": "algo.kl_controller",
    "algo.value_clip": "algo.value_clip_range",
    "launch.frozen": "launch.frozen_placement",
}
"""Former dotted key → current key. The keys of `reward` also occur in the parts of a reward, see REWARD_LISTS."""

DROPPED = ("evaluate", "optimizer.warmup_steps")
"""Former keys without a current name; `_compute_warmup_ratio` converts the warm-up."""

REWARD_LISTS = ("reward.parts", "evaluation.rewards")
"""Lists of rewards, whose keys are those of the section `reward`."""

OLD_KEYS = ("rollout_batch", "minibatch")
"""Keys that every former configuration has and no current one."""

_MISSING = object()
"""Marker of an absent key."""


def is_old(config: Mapping[str, Any]) -> bool:
    """Return True if a recorded configuration has the former names of its keys."""
    return any(key in config for key in OLD_KEYS)


def translate_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration (nested, without interpolations) with the current key names.

    A configuration that already has them is returned unchanged.
    """
    if not is_old(config):
        return config
    config = copy.deepcopy(config)
    warmup_ratio = _compute_warmup_ratio(config)
    _rename(config, CURRENT_NAMES)
    for dotted in REWARD_LISTS:
        section, _, key = dotted.partition(".")
        parts = config[section].get(key) if isinstance(config.get(section), dict) else None
        for part in parts if isinstance(parts, list) else ():
            _rename({"reward": part}, {old: new for old, new in CURRENT_NAMES.items() if old.startswith("reward.")})
    for dotted in DROPPED:
        _pop_key(config, dotted)
    if isinstance(config.get("optimizer"), dict):
        config["optimizer"]["warmup_ratio"] = warmup_ratio
    return config


def _rename(config: dict[str, Any], names: Mapping[str, str]) -> None:
    """Move each value of `config` from its former key to its current key."""
    for old, new in names.items():
        value = _pop_key(config, old)
        if value is not _MISSING:
            section, _, key = new.rpartition(".")
            target = config.setdefault(section, {}) if section else config
            if isinstance(target, dict):
                target[key] = value


def _pop_key(config: dict[str, Any], dotted: str) -> Any:
    """Remove a dotted key and return its value; _MISSING if the key is absent."""
    section, _, key = dotted.rpartition(".")
    holder = config.get(section) if section else config
    return holder.pop(key, _MISSING) if isinstance(holder, dict) else _MISSING


def _compute_warmup_ratio(config: Mapping[str, Any]) -> float:
    """Return optimizer.warmup_steps as a share of the run's optimizer steps; 0 if it cannot be computed."""
    try:
        steps = config["iterations"] * config["epochs"] * config["rollout_batch"] / config["minibatch"]
        return min(1.0, config["optimizer"]["warmup_steps"] / steps)
    except (KeyError, TypeError, ZeroDivisionError):
        return 0.0
