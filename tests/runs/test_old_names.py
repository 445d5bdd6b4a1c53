"""Configurations recorded with the former key names: each name is translated to a key that exists today."""

import copy

import pytest
import yaml

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.continuation import compose_continuation
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import ConfigError
from apa_cli.runs.old_names import CURRENT_NAMES, is_old, translate_old_names
from apa_cli.runs.records import RecordedRun


def read_key(config: dict, dotted: str):
    """Return the value of a dotted key, or KeyError."""
    for key in dotted.split("."):
        config = config[key]
    return config


def write_key(config: dict, dotted: str, value) -> None:
    *sections, key = dotted.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    config[key] = value


def remove_plan(config: dict) -> dict:
    """Return a copy without the section `plan`, which runs with the former names do not have."""
    return {key: value for key, value in copy.deepcopy(config).items() if key != "plan"}


def restore_old_names(config: dict) -> dict:
    """Return a configuration of today as it was recorded before its keys were renamed."""
    old = remove_plan(config)  # `plan` was the name of `dry_run`
    for name, current in CURRENT_NAMES.items():
        try:
            value = read_key(config, current)
        except KeyError:
            continue
        section, _, key = current.rpartition(".")
        read_key(old, section).pop(key) if section else old.pop(key)
        write_key(old, name, value)
    if "warmup_ratio" in old.get("optimizer", {}):
        del old["optimizer"]["warmup_ratio"]
        old["optimizer"]["warmup_steps"] = 0
    old["evaluate"]["shown"] = 5
    return old


@pytest.mark.parametrize("overrides", [[], ["algo=ppo", "lora=default"], ["algo=awr", "reward=http"]])
def test_translation_is_the_inverse_of_the_former_names(overrides):
    required = ["reward.url=http://localhost"] if "reward=http" in overrides else []
    config = build_config(compose([*overrides, *required])).raw
    old = restore_old_names(config)
    assert old != config and is_old(old) and not is_old(config)
    before = copy.deepcopy(old)
    assert old["plan"] is False and translate_old_names(old) == remove_plan(config)
    assert old == before  # the argument is not changed
    assert translate_old_names(config) is config


def test_every_former_name_leads_to_a_key_of_today():
    options = ([], ["algo=ppo"], ["reward=http", "reward.url=http://localhost"])
    configs = [build_config(compose(overrides)).raw for overrides in options]
    for current in CURRENT_NAMES.values():
        section, _, key = current.rpartition(".")
        assert any(key in (read_key(config, section) if section else config) for config in configs), current


def test_parts_of_a_reward_are_translated():
    config = {
        "rollout_batch": 8,
        "reward": {"parts": [{"use": "model", "microbatch": 4}, {"use": "http", "batch": 2}]},
        "evaluation": {"rewards": ["vader", {"use": "model", "microbatch": 3}]},
    }
    translated = translate_old_names(config)
    assert translated["reward"]["parts"] == [{"use": "model", "microbatch_size": 4}, {"use": "http", "batch_size": 2}]
    assert translated["evaluation"]["rewards"] == ["vader", {"use": "model", "microbatch_size": 3}]


def test_warmup_steps_become_a_share_of_the_run():
    config = {"rollout_batch": 64, "minibatch": 32, "epochs": 2, "iterations": 10, "optimizer": {"warmup_steps": 6}}
    assert translate_old_names(config)["optimizer"] == {"warmup_ratio": 0.15}  # 6 of 10 · 2 · 2 steps
    assert translate_old_names({"minibatch": 1, "optimizer": {"warmup_steps": 6}})["optimizer"] == {"warmup_ratio": 0.0}


@pytest.mark.parametrize("section", ["algo", "reward", "evaluation", "optimizer", "evaluate"])
def test_section_of_the_wrong_type_is_left_to_the_checks_of_the_configuration(section):
    assert translate_old_names({"minibatch": 4, section: "x"})["minibatch_size"] == 4


def test_old_run_can_be_looked_at_but_not_resumed(run_train, small_overrides):
    target = next(override for override in small_overrides if override.startswith("reward.target="))
    directory = run_train("iterations=1", "evaluation.every=0", "checkpoint.every=0")
    expected = build_config(compose_from_run([f"run={directory}", target])).raw
    recorded = yaml.safe_load((directory / "config.yaml").read_text())
    (directory / "config.yaml").write_text(yaml.safe_dump(restore_old_names(recorded)))
    assert build_config(compose_from_run([f"run={directory}", target])).raw == expected
    assert RecordedRun.read(directory).config_yaml == remove_plan(recorded)
    with pytest.raises(ConfigError, match="recorded by an earlier version") as error:
        compose_continuation([f"resume={directory}"], directory)
    assert "\n" not in str(error.value)
