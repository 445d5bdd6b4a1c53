"""Construction of a trainer: a critic from the reward model, and a resume with other held-out prompts."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
)

from apa_cli.datasets.base import PromptStyle
from apa_cli.errors import ConfigError
from apa_cli.models.prompting import PromptFormat
from apa_cli.training.build import RunInputs, describe_prompt
from apa_cli.training.evaluator import compute_win_rate
from apa_cli.types import Example

# A critic initialised from the reward model


@pytest.fixture(scope="module")
def make_reward(tiny, tmp_path_factory):
    """make_reward(configuration=None, **dimensions) → the folder of a reward model with other random weights."""

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


def list_overrides(folder) -> list[str]:
    """Return the overrides of a run whose critic starts from the reward model in `folder`."""
    return ["reward=model", "~reward.target", f"reward.path={folder}", "critic.init=reward"]


def assert_equal(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys() and actual
    assert not [name for name, tensor in expected.items() if not torch.equal(actual[name], tensor)]


def load_trunk(path) -> dict[str, torch.Tensor]:
    """Return the weights of the model in `path` without its head."""
    return AutoModel.from_pretrained(path).state_dict()


def load_score_head(path) -> torch.Tensor:
    """Return the score head's weight [1, h] of the classifier in `path`."""
    return AutoModelForSequenceClassification.from_pretrained(path).score.weight.detach()


def test_the_critic_starts_from_the_reward_models_trunk_and_the_policy_does_not(make_trainer, reward, tiny):
    trainer = make_trainer(*list_overrides(reward))
    critic = trainer.models.critics["value"]
    assert_equal(critic.backbone.state_dict(), load_trunk(reward))
    assert_equal(trainer.models.policy.base_model.state_dict(), load_trunk(tiny))
    assert_equal(trainer.models.reference.base_model.state_dict(), load_trunk(tiny))
    assert not torch.equal(load_trunk(reward)["embed_in.weight"], load_trunk(tiny)["embed_in.weight"])
    assert torch.equal(critic.head.weight, load_score_head(reward)) and not critic.head.bias.any()
    assert all(parameter.requires_grad for parameter in critic.parameters())
    trained = {id(parameter) for parameter in trainer.updater.optimizer.param_groups[1]["params"]}
    assert trained == {id(parameter) for parameter in critic.parameters()}


@pytest.mark.parametrize(
    ("overrides", "factor", "bias"),
    [
        # Scores 2 · (w·h − 3), unscaled, are what V predicts.
        (["algo.score_scaling=none", "reward.scale=2", "reward.centered=true"], 2.0, -6.0),
        # Scaled scores are divided by their deviation, 2 · 4 or close to it: (2 / 8) · (w·h − 3).
        (["reward.scale=2", "reward.centered=true"], 0.25, -0.75),
        (["reward.scale=-2"], -0.25, 0.0),
    ],
)
def test_the_value_head_starts_as_the_score_head_in_the_units_of_the_algorithms_scores(
    overrides, factor, bias, make_trainer, make_reward
):
    folder = make_reward()
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"score_mean": 3.0, "score_std": 4.0}))
    head = make_trainer(*list_overrides(folder), *overrides).models.critics["value"].head
    torch.testing.assert_close(head.weight, factor * load_score_head(folder))
    assert head.bias.tolist() == [bias]


def test_a_value_head_with_two_layers_starts_at_zero_on_the_reward_models_trunk(make_trainer, reward):
    critic = make_trainer(*list_overrides(reward), "critic.head=mlp").models.critics["value"]
    assert_equal(critic.backbone.state_dict(), load_trunk(reward))
    assert not critic.head[-1].weight.any() and not critic.head[-1].bias.any()


def test_by_default_the_critic_starts_from_the_policy(make_trainer, reward, tiny):
    trainer = make_trainer(*list_overrides(reward)[:-1])
    assert_equal(trainer.models.critics["value"].backbone.state_dict(), load_trunk(tiny))


def test_with_lora_the_critics_frozen_base_is_the_reward_models(make_trainer, reward):
    trainer = make_trainer(*list_overrides(reward), "lora=default", "critic=separate")
    backbone = trainer.models.critics["value"].backbone
    base = {name.replace(".base_layer.", "."): p for name, p in backbone.state_dict().items() if ".lora_" not in name}
    assert_equal(base, load_trunk(reward))
    assert all((".lora_" in name) is p.requires_grad for name, p in backbone.named_parameters())


def test_the_trunk_of_a_lora_reward_model_has_its_adapter_merged(make_trainer, tiny, tmp_path):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query_key_value"], modules_to_save=["score"])
    model = get_peft_model(AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    expected = model.merge_and_unload().base_model.state_dict()
    trainer = make_trainer(*list_overrides(tmp_path))
    trunk = trainer.models.critics["value"].backbone.state_dict()
    assert trunk.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(trunk[name], tensor, msg=name)


GPT2 = GPT2Config(vocab_size=600, n_embd=32, n_layer=2, n_head=2, n_positions=128, num_labels=1, pad_token_id=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 48}, "hidden_size is 48, the policy's 32"),
        ({"vocab_size": 700}, "vocab_size is 700, the policy's 600"),
        ({"configuration": GPT2}, "model_type is gpt2, the policy's gpt_neox"),
    ],
    ids=["width", "vocabulary", "architecture"],
)
def test_a_reward_model_unlike_the_policy_is_a_one_line_error(changes, message, make_trainer, make_reward):
    with pytest.raises(ConfigError) as error:
        make_trainer(*list_overrides(make_reward(**changes)))
    assert str(error.value) == f"critic.init: the reward model's {message}"


@pytest.mark.parametrize("other", [["critic=head"], ["lora=default", "critic=adapter"], None])
def test_critic_init_without_a_trunk_or_a_reward_model_is_a_one_line_error(other, make_trainer, reward):
    # Without overrides the reward is a function.
    overrides = ["critic.init=reward"] if other is None else [*list_overrides(reward), *other]
    with pytest.raises(ConfigError) as error:
        make_trainer(*overrides)
    assert (
        str(error.value)
        == "critic.init: reward needs critic=separate and a reward that is a model; give policy instead"
    )


def test_an_algorithm_without_a_critic_builds_none(make_trainer):
    trainer = make_trainer("critic.init=reward", "algo.advantage_estimator=group_mean", "samples_per_prompt=2")
    assert not trainer.models.critics


# environment.json


def test_environment_json_has_how_the_algorithm_is_shown(make_trainer, tmp_path):
    trainer = make_trainer("algo=awr", folder=tmp_path)
    environment = json.loads((tmp_path / "environment.json").read_text())
    algorithm = trainer.config.algo
    assert environment["algorithm"] == {
        "label": algorithm.label,
        "color": algorithm.color,
        "lambda_meaning": algorithm.lambda_meaning,
    }
    assert environment["algorithm"]["label"] == "AWR" and environment["processes"] == 1


# Resume with other held-out prompts


@pytest.mark.parametrize(
    ("prompts", "lora"),
    [
        pytest.param(4, ["lora=default", "critic=adapter"], id="fewer-lora"),
        pytest.param(9, [], id="more", marks=pytest.mark.slow),
    ],
)
def test_a_resume_with_other_held_out_prompts_compares_on_those(prompts, lora, run_train, records, tmp_path):
    """The metrics are those of a run with these prompts from the start: the policy does not depend on them."""
    common = [*lora, "iterations=3", "evaluation.every=1", "checkpoint.keep_last=9", "optimizer.lr=1e-2"]
    fresh = run_train(*common, f"evaluation.prompts={prompts}", name="fresh")
    run = tmp_path / "run"
    shutil.copytree(run_train(*common, "iterations=1", name="first"), run)  # with six prompts
    run_train(*common, "name=first", f"evaluation.prompts={prompts}", f"resume={run}", name="run")
    start, *expected = records(fresh / "metrics.jsonl")
    before, first, *resumed = records(run / "metrics.jsonl")
    assert before["eval/reward_mean_sft"] == first["eval/reward_mean_sft"] != start["eval/reward_mean_sft"]
    keys = [key for key in start if key.startswith("eval/")]
    for row, other in zip(resumed, expected[1:], strict=True):
        assert {key: row[key] for key in keys} == {key: other[key] for key in keys}
        assert row["eval/reward_mean_sft"] == start["eval/reward_mean"]
    scores = {
        iteration: [row["score"] for row in records(fresh / "samples.jsonl") if row["iteration"] == iteration]
        for iteration in (0, 3)
    }
    assert resumed[-1]["eval/win_rate_sft"] == pytest.approx(compute_win_rate(scores[3], scores[0])) != 0.5
    state = json.loads((run / "checkpoints" / "iteration_000003" / "state.json").read_text())
    assert state["best_reward"] == max(row["eval/reward_mean"] for row in resumed)  # only those on the same prompts


# The lines at a run's start


def test_the_first_prompt_is_shown_as_the_policy_reads_it_with_what_ends_a_response(make_config, tiny):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.bos_token = "<|padding|>"
    special = [("<|padding|>", tokenizer.bos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|padding|> $A", special_tokens=special)
    config = make_config(r"sampling.stop_strings=['\n']", "sampling.max_new_tokens=7")
    rows = [Example("Who?\nYou:", None, None, {}), Example("Another", None, None, {})]
    ends = frozenset({tokenizer.eos_token_id})
    inputs = RunInputs(rows, rows, PromptFormat(tokenizer, PromptStyle.hh), ends, None, None)
    count = 1 + len(tokenizer("Who?\nYou:", add_special_tokens=False)["input_ids"])
    assert describe_prompt(config, inputs) == [
        f"first prompt, {count} tokens: '<|padding|>Who?\\nYou:'",
        "a response ends at <|endoftext|>, '\\n' or 7 tokens",
    ]


def test_a_stop_string_that_is_never_found_is_refused_before_training(make_trainer):
    with pytest.raises(ConfigError, match=r"^sampling\.stop_strings: 'x<\|padding\|>' is never found"):
        make_trainer("sampling.stop_strings=['x<|padding|>']")
