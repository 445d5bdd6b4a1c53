"""The start-up lines of a run: batch arithmetic, learning rates, λ, models; and dry_run=true."""

from dataclasses import dataclass, replace

import pytest

from apa_cli.algorithms.apa import APA
from apa_cli.training.dry_run import describe_run
from apa_cli.training.launch import start_training


@pytest.fixture
def describe(make_config):
    """describe(*overrides, world_size=1) → the start-up lines of a small run by their first word or words."""

    def run(*overrides: str, world_size: int = 1) -> dict[str, str]:
        return dict(line.split(": ", 1) for line in describe_run(make_config(*overrides), world_size))

    return run


SIZES = ["rollout_batch_size=24", "minibatch_size=12", "microbatch_size=4", "update_epochs=2", "iterations=5"]


def test_the_batch_arithmetic_names_every_factor(describe):
    lines = describe(*SIZES, "samples_per_prompt=3")
    assert lines["batches"] == "5 iterations × 24 responses (8 prompts × 3) = 120 responses"
    assert lines["updates"] == (
        "2 epochs × 2 minibatches of 12 = 4 optimizer steps per iteration, 20 in all, each of 3 × 4 responses"
    )


def test_the_batch_arithmetic_divides_minibatches_over_processes(describe):
    # 12 responses over 2 processes are 6 each: a microbatch of 4 and one of 2.
    assert describe(*SIZES, world_size=2)["updates"].endswith("each of 2 processes × 2 × 4 responses")


def test_a_minibatch_of_pairs_is_of_whole_pairs(describe):
    # 24 responses are 12 pairs: with minibatches of one response, one pair per step, 12 steps per epoch
    one = [*SIZES, "algo=dpo", "minibatch_size=1", "microbatch_size=1"]
    assert describe(*one)["updates"].startswith("2 epochs × 12 minibatches of 2 = 24 optimizer steps per iteration")


def test_learning_rates_have_their_schedule(describe):
    rates = ["optimizer.lr=5e-4", "optimizer.critic_lr=1e-3", "optimizer.warmup_ratio=0.1"]
    line = describe(*rates, "optimizer.lr_scheduler=linear")["learning rates"]
    assert line == "policy 0.0005, critic 0.001 (linear, warm-up 10 % of the steps)"
    without = describe("optimizer.lr=5e-4", "algo.advantage_estimator=group_mean", "samples_per_prompt=2")
    assert without["learning rates"].startswith("policy 0.0005 (")


@pytest.mark.parametrize(("name", "value"), [("apa", "0.1"), ("ppo", "0.07"), ("awr", "2")])
def test_lambda_has_its_value_and_the_meaning_that_the_algorithm_gives_it(name, value, describe, make_config):
    overrides = [f"algo={name}", f"lambda={value}"]
    meaning = make_config(*overrides).algo.lambda_meaning
    assert meaning and describe(*overrides)[f"lambda {value}"] == f"{meaning} (GAE's λ is algo.gae_lambda, 0.95)"


@dataclass(frozen=True)
class WithoutMeaning(APA):
    """An algorithm whose λ has no meaning in words."""

    lambda_meaning = None


def test_lambda_is_named_if_the_configuration_has_it(make_config):
    config = make_config("lambda=0.1")
    silent = describe_run(replace(config, algo=WithoutMeaning(**vars(config.algo))))
    assert [line for line in silent if line.startswith("lambda")] == ["lambda 0.1 (GAE's λ is algo.gae_lambda, 0.95)"]
    raw = {key: value for key, value in config.raw.items() if key != "lambda"}
    assert not [line for line in describe_run(replace(config, raw=raw)) if line.startswith("lambda")]


def test_passes_are_those_that_algorithm_and_metrics_need(describe):
    def list_passes(*overrides: str) -> str:
        return describe(*overrides)["passes per iteration"].split("reward 8, ")[-1].split(", then")[0]

    assert list_passes("algo=awr") == "reference 8, critic 8"
    assert list_passes("algo=awr", "reference.log_kl=false") == "critic 8"
    assert list_passes("algo=ppo", "reference.log_kl=false") == "reference 8, critic 8, old log-probs 8"


def test_models_have_their_parameters_and_memory(describe):
    lines = describe("reference.refresh_every=3")
    assert "of them trained" in lines["policy"] and lines["critic value"].endswith("(a network of its own)")
    assert lines["reference"].endswith("(frozen, float32)")
    assert lines["moving reference"].endswith("(refreshed every 3 iterations)")
    lora = describe("lora=default", "critic=adapter")
    assert lora["reference"] == "the policy's base without its adapter"
    assert lora["critic value"].startswith("an adapter on the policy's base, ")


def test_a_dry_run_prints_the_lines_and_leaves_no_directory(make_config, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    config = make_config("dry_run=true")
    start_training(config, tmp_path / "run", None)
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("dataset: 60 rows to train on") and lines == describe_run(config)
    assert not (tmp_path / "run").exists()
