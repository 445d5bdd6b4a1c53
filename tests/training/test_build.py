"""How a run is put together: a critic from the reward model, and a run that goes on with other held-out prompts."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
)

from apa_cli.errors import ConfigError
from apa_cli.runs.console import Console
from apa_cli.training.build import build_trainer
from apa_cli.training.evaluator import win_rate
from apa_cli.training.trainer import Trainer

# A critic that starts from the reward model


@pytest.fixture(scope="module")
def make_reward(tiny, tmp_path_factory):
    """make_reward(model=None, **dimensions) → the folder of a reward model with random weights of its own."""

    def make(configuration=None, **dimensions):
        folder = tmp_path_factory.mktemp("reward")
        configuration = configuration or AutoConfig.from_pretrained(tiny, num_labels=1, **dimensions)
        torch.manual_seed(11)
        AutoModelForSequenceClassification.from_config(configuration).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def reward(make_reward):
    return make_reward()


@pytest.fixture(scope="module")
def make_trainer(configured, tmp_path_factory):
    def make(*words: str) -> Trainer:
        with Console(None, 1, quiet=True) as console:
            return build_trainer(configured(*words), tmp_path_factory.mktemp("trainer"), None, None, console)

    return make


def words(folder) -> list[str]:
    return ["reward=model", "~reward.target", f"reward.path={folder}", "critic.init=reward"]


def assert_equal(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and found
    assert not [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]


def trunk(path) -> dict[str, torch.Tensor]:
    return AutoModel.from_pretrained(path).state_dict()


def test_the_critic_starts_from_the_reward_models_trunk_and_the_policy_does_not(make_trainer, reward, tiny):
    trainer = make_trainer(*words(reward))
    critic = trainer.model.critics["value"]
    assert_equal(critic.backbone.state_dict(), trunk(reward))
    assert_equal(trainer.model.policy.base_model.state_dict(), trunk(tiny))
    assert_equal(trainer.reference.base_model.state_dict(), trunk(tiny))
    assert not torch.equal(trunk(reward)["embed_in.weight"], trunk(tiny)["embed_in.weight"])
    assert not critic.head.weight.any() and not critic.head.bias.any()
    assert all(parameter.requires_grad for parameter in critic.parameters())
    trained = {id(parameter) for parameter in trainer.updater.optimizer.param_groups[1]["params"]}
    assert trained == {id(parameter) for parameter in critic.parameters()}


def test_by_default_the_critic_starts_from_the_policy(make_trainer, reward, tiny):
    trainer = make_trainer(*words(reward)[:-1])
    assert_equal(trainer.model.critics["value"].backbone.state_dict(), trunk(tiny))


def test_with_lora_the_critics_frozen_base_is_the_reward_models(make_trainer, reward):
    trainer = make_trainer(*words(reward), "lora=default", "critic=separate")
    backbone = trainer.model.critics["value"].backbone
    base = {name.replace(".base_layer.", "."): p for name, p in backbone.state_dict().items() if ".lora_" not in name}
    assert_equal(base, trunk(reward))
    assert all((".lora_" in name) is p.requires_grad for name, p in backbone.named_parameters())


def test_a_lora_reward_models_trunk_has_what_its_adapter_learnt(make_trainer, tiny, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query_key_value"], modules_to_save=["score"])
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().base_model.state_dict()
    trainer = make_trainer(*words(tmp_path))
    found = trainer.model.critics["value"].backbone.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)


GPT2 = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2, n_positions=128, num_labels=1, pad_token_id=1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 48}, "hidden_size is 48, the policy's 32"),
        ({"vocab_size": 700}, "vocab_size is 700, the policy's 600"),
        ({"configuration": GPT2}, "model_type is gpt2, the policy's gpt_neox"),
    ],
    ids=["width", "vocabulary", "architecture"],
)
def test_a_reward_model_that_cannot_be_a_critic_is_one_line(changes, said, make_trainer, make_reward):
    with pytest.raises(ConfigError) as caught:
        make_trainer(*words(make_reward(**changes)))
    assert str(caught.value) == f"critic.init: the reward model's {said}"


@pytest.mark.parametrize("other", [["critic=head"], ["lora=default", "critic=adapter"], None])
def test_a_critic_without_a_trunk_and_a_reward_without_a_model_are_one_line(other, make_trainer, reward):
    asked = ["critic.init=reward"] if other is None else [*words(reward), *other]  # by default a function rewards
    with pytest.raises(ConfigError) as caught:
        make_trainer(*asked)
    assert str(caught.value) == "critic.init: reward needs critic.kind=separate and a reward that is a model"


def test_an_algorithm_without_a_critic_asks_for_none(make_trainer):
    trainer = make_trainer("critic.init=reward", "algo.advantage_estimator=group_mean", "samples_per_prompt=2")
    assert not trainer.model.critics


# Going on with other held-out prompts


@pytest.mark.parametrize(
    ("prompts", "lora"),
    [
        pytest.param(4, ["lora=default", "critic=adapter"], id="fewer-lora"),
        pytest.param(9, [], id="more", marks=pytest.mark.slow),
    ],
)
def test_a_run_that_goes_on_with_other_held_out_prompts_is_compared_on_those(
    prompts, lora, run_train, records, tmp_path
):
    """As if it had been evaluated on them from the start: its policy does not depend on what it is evaluated on."""
    common = [*lora, "iterations=3", "evaluation.every=1", "checkpoint.keep_last=9", "optimizer.lr=1e-2"]
    fresh = run_train(*common, f"evaluation.prompts={prompts}", name="fresh")
    run = tmp_path / "run"
    shutil.copytree(run_train(*common, "iterations=1", name="first"), run)  # six prompts
    run_train(*common, "name=first", f"evaluation.prompts={prompts}", f"resume={run}", name="run")
    start, *expected = records(fresh / "metrics.jsonl")
    before, first, *found = records(run / "metrics.jsonl")
    assert before["eval/reward_mean_sft"] == first["eval/reward_mean_sft"] != start["eval/reward_mean_sft"]
    figures = [key for key in start if key.startswith("eval/")]
    for row, wanted in zip(found, expected[1:], strict=True):
        assert {key: row[key] for key in figures} == {key: wanted[key] for key in figures}
        assert row["eval/reward_mean_sft"] == start["eval/reward_mean"]
    scores = {
        iteration: [row["score"] for row in records(fresh / "samples.jsonl") if row["iteration"] == iteration]
        for iteration in (0, 3)
    }
    assert found[-1]["eval/win_rate_sft"] == pytest.approx(win_rate(scores[3], scores[0])) != 0.5
    state = json.loads((run / "checkpoints" / "iteration_000003" / "state.json").read_text())
    assert state["best_reward"] == max(row["eval/reward_mean"] for row in found)  # of those on the same prompts
