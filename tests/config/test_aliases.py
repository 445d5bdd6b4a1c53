"""Keys and options of other tools are answered with ours, and every answer exists here."""

import re

import pytest

from apa_cli.config.aliases import ALIASES, suggest_for_key, suggest_for_option
from apa_cli.config.compose import check_adapter_keys, check_group_keys, compose
from apa_cli.config.explain import describe_unknown_key, suggest_for_flag
from apa_cli.config.hydra_api import list_groups, list_keys
from apa_cli.errors import ConfigError

SETTINGS, GROUPS = compose(["algo=ppo"]), list_groups(None)
KEYS = list_keys(SETTINGS)
TOP_LEVEL = {key for key in KEYS if "." not in key}


def names_in(answer: str) -> set[str]:
    """The keys and groups that an answer names, the remarks in brackets left out."""
    text = re.sub(r"\([^)]*\)", "", answer)
    words = [word.strip(",.;:") for word in text.split()]
    return {word.partition("=")[0] for word in words if "=" in word or "." in word or word in TOP_LEVEL}


@pytest.mark.parametrize("alias", ALIASES)
def test_an_answer_names_keys_and_options_that_exist(alias):
    names = names_in(ALIASES[alias])
    assert names and names <= {*KEYS, *GROUPS, "reward.target"}


@pytest.mark.parametrize("alias", [name for name in ALIASES if name != "epochs"])
def test_no_alias_is_a_key_at_the_top(alias):
    assert alias not in {*TOP_LEVEL, *GROUPS}
    answer = f"{alias}: unknown key; here it is {ALIASES[alias]}"
    assert describe_unknown_key(alias, SETTINGS, list(GROUPS)) == answer


EXPECTED = {
    "learning_rate=1e-5": "optimizer.lr",
    "optimizer.learning_rate=1e-5": "optimizer.lr",
    "batch_size=8": "minibatch_size",
    "num_epochs=3": "update_epochs",
    "wandb=true": "tracking=wandb",
    "report_to=wandb": "tracking=wandb",
    "beta=0.1": "lambda",
    "kl_coef=0.1": "algo.kl_coef",
    "gae_lambda=0.9": "algo.gae_lambda",
    "rollout_batch=8": "rollout_batch_size",
    "+max_steps=3": "iterations",
    "model=EleutherAI/pythia-70m": "model=local model.path=EleutherAI/pythia-70m",
    "plan=true": "dry_run=true",
    "guide=EleutherAI/pythia-70m": "guide=local guide.path=EleutherAI/pythia-70m",
    "algo=mine.py:Pairs": "DIR/algo/NAME.yaml, whose _target_ is mine.py:Pairs",
    "lora=16": "lora=default lora.rank=16",
    "dataset=prompts.jsonl": "dataset=jsonl dataset.path=prompts.jsonl",
    "dataset=prompts.txt": "dataset=prompts dataset.path=prompts.txt",
    "reward=my_reward.py:brevity": "reward=function reward.target=my_reward.py:brevity",
    "reward=http://127.0.0.1:8000/score": "reward=http reward.url=http://127.0.0.1:8000/score",
    "reward=OpenAssistant/reward-model": "reward=model reward.path=OpenAssistant/reward-model",
}


@pytest.mark.parametrize("override", EXPECTED)
def test_other_tools_overrides_are_answered_with_ours(override):
    from apa_cli.config.build import build_config

    with pytest.raises(ConfigError) as caught:
        build_config(compose([override]))
    assert EXPECTED[override] in str(caught.value) and "\n" not in str(caught.value)


def test_a_flag_of_another_tool_is_answered_with_key_value():
    assert "optimizer.lr=1e-5;" in suggest_for_flag("--learning_rate", "1e-5")
    assert "optimizer.lr=1e-5;" in suggest_for_flag("--learning-rate=1e-5", None)
    assert "seed=3;" in suggest_for_flag("--seed", "3")
    assert "seed=VALUE;" in suggest_for_flag("--seed", "--other")


def test_unknown_names_get_no_answer():
    assert suggest_for_key("nothing_like_it") is None
    assert suggest_for_option("model", "pythia") is None


CHOICES = {
    ("critic.kind=head",): "critic=NAME",
    ("tracking.kind=wandb",): "tracking=NAME",
    ("lora.rank=8",): "lora=default lora.rank",
}


@pytest.mark.parametrize("overrides", CHOICES)
def test_a_choice_has_one_way(overrides):
    with pytest.raises(ConfigError, match=CHOICES[overrides]):
        check_group_keys(list(overrides))
        check_adapter_keys(list(overrides), None)


@pytest.mark.parametrize(
    "overrides", [("lora=default", "lora.rank=8"), ("model=llama_7b", "lora.rank=8"), ("critic=head",)]
)
def test_settings_of_a_chosen_option_pass(overrides):
    check_group_keys(list(overrides))
    check_adapter_keys(list(overrides), None)
