"""Rewards in whole runs: the logged metrics of sums, of further rewards in evaluation, and of penalties."""

import importlib.util
import shutil

import pytest

from apa_cli.algorithms.base import ActorCritic

pytestmark = pytest.mark.slow

SOURCE = """\
def length(prompts, responses):
    return [0.1 * len(response) for response in responses]

def vowels(prompts, responses):
    return [sum(map(response.lower().count, "aeiou")) for response in responses]

def nothing(prompts, responses):
    return [0.0] * len(responses)
"""


@pytest.fixture(scope="module")
def function_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(SOURCE)
    return path


@pytest.fixture(scope="module")
def functions(function_file):
    spec = importlib.util.spec_from_file_location("functions", function_file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def overrides(function_file):
    """Return the overrides of a sum of two functions, one with a negative weight, also used in evaluation."""
    spec = "{{use: function, name: {name}, weight: {weight}, target: '{file}:{name}'}}"
    specs = [
        spec.format(name=name, weight=weight, file=function_file) for name, weight in (("length", -0.5), ("vowels", 2))
    ]
    return ["reward=sum", "~reward.target", f"reward.parts=[{', '.join(specs)}]", "evaluation.rewards=${reward.parts}"]


@pytest.fixture(scope="module")
def run(train, overrides, tmp_path_factory):
    penalties = ["penalty.per_token=0.01", "penalty.missing_eos=0.7"]
    return train(
        tmp_path_factory.mktemp("run") / "run", *overrides, *penalties, "optimizer.lr=1e-2", "evaluation.every=1"
    )


def test_the_mean_score_is_the_weighted_sum_of_the_parts_means(run, records):
    _, *rows = records(run / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        expected = -0.5 * row["reward/mean/length"] + 2 * row["reward/mean/vowels"]
        assert row["reward/mean"] == pytest.approx(expected, rel=1e-5)
        assert row["reward/mean/vowels"] > 0 and row["reward/mean/length"] > 0


def test_evaluation_scores_the_same_responses_by_each_further_reward(run, records, functions):
    samples = records(run / "samples.jsonl")
    for row in records(run / "metrics.jsonl"):
        now, sft = ([s["response"] for s in samples if s["iteration"] == i] for i in (row["iteration"], 0))
        for name in ("length", "vowels"):
            scores, before = (getattr(functions, name)([], replies) for replies in (now, sft))
            assert row[f"eval/reward_mean/{name}"] == pytest.approx(sum(scores) / len(scores), rel=1e-5)
            wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(scores, before, strict=True)) / len(scores)
            assert row[f"eval/win_rate_sft/{name}"] == pytest.approx(wins)
        # Evaluation takes the raw sum, without the penalty.
        expected = -0.5 * row["eval/reward_mean/length"] + 2 * row["eval/reward_mean/vowels"]
        assert row["eval/reward_mean"] == pytest.approx(expected, rel=1e-5)
    assert row["eval/win_rate_sft/length"] != 0.5 or row["eval/win_rate_sft/vowels"] != 0.5


def test_the_logged_penalty_follows_from_length_and_truncation(run, records):
    start, *rows = records(run / "metrics.jsonl")
    assert "reward/penalty" not in start
    for row in rows:
        expected = 0.01 * row["response/length"] + 0.7 * row["response/truncated_rate"]
        assert row["reward/penalty"] == pytest.approx(expected, rel=1e-5)
    assert any(0 < row["response/truncated_rate"] < 1 for row in rows)


def test_only_the_algorithm_sees_the_penalty(run_train, function_file, records, monkeypatch):
    rollouts, prepare = [], ActorCritic.prepare

    def prepare_and_record(self, rollout, state):
        rollouts.append(rollout)
        return prepare(self, rollout, state)

    monkeypatch.setattr(ActorCritic, "prepare", prepare_and_record)
    overrides = [
        "iterations=1",
        f"reward.target={function_file}:nothing",
        "penalty.per_token=0.25",
        "penalty.missing_eos=3",
    ]
    row = records(run_train(*overrides) / "metrics.jsonl")[-1]
    (rollout,) = rollouts
    lengths = rollout.mask.sum(-1).tolist()
    expected = [-0.25 * n - 3 * (ending == "length") for n, ending in zip(lengths, rollout.endings, strict=True)]
    assert rollout.scores.tolist() == pytest.approx(expected)
    assert len(set(rollout.endings)) == 2 and row["reward/mean"] == row["reward/std"] == row["eval/reward_mean"] == 0


def test_without_penalties_the_algorithm_sees_the_raw_scores(run_train, records, monkeypatch):
    rollouts, prepare = [], ActorCritic.prepare

    def prepare_and_record(self, rollout, state):
        rollouts.append(rollout)
        return prepare(self, rollout, state)

    monkeypatch.setattr(ActorCritic, "prepare", prepare_and_record)
    row = records(run_train("iterations=1") / "metrics.jsonl")[-1]
    assert "reward/penalty" not in row and row["reward/mean"] == float(rollouts[0].scores.mean())


def test_a_resumed_run_keeps_the_sft_scores_of_every_reward(run_train, overrides, comparable, tmp_path):
    overrides = [*overrides, "iterations=2", "evaluation.every=1", "checkpoint.keep_last=4", "optimizer.lr=1e-2"]
    whole = run_train(*overrides, name="whole")
    shutil.copytree(whole, tmp_path / "resumed")
    run_train(*overrides, "name=whole", f"resume={tmp_path}/resumed/checkpoints/iteration_000001", name="resumed")
    assert comparable(tmp_path / "resumed" / "metrics.jsonl") == comparable(whole / "metrics.jsonl")


def test_a_reward_added_on_resume_has_no_win_rate(run_train, overrides, records, function_file, tmp_path):
    run_train("iterations=1", name="run")
    added = f"evaluation.rewards=[{{use: function, name: late, target: '{function_file}:length'}}]"
    run_train("iterations=2", added, "name=run", f"resume={tmp_path}/run", name="run")
    row = records(tmp_path / "run" / "metrics.jsonl")[-1]
    assert row["eval/reward_mean/late"] > 0 and "eval/win_rate_sft" in row
    assert "eval/win_rate_sft/late" not in row


def test_parts_and_further_rewards_share_one_trained_model(run_train, records, tmp_path):
    row = records(
        run_train(
            "dataset=embedded", "~reward.target", "reward=sum", "reward.parts=[{use: model, weight: 3}]",
            "evaluation.rewards=[model]", "iterations=0", "reward_model.epochs=1", f"stages.cache_dir={tmp_path}/cache",
        )
        / "metrics.jsonl"
    )[-1]  # fmt: skip
    assert row["eval/reward_mean"] == pytest.approx(3 * row["eval/reward_mean/model"], rel=1e-5)
    assert row["eval/reward_mean"] != 0 and row["eval/win_rate_sft/model"] == 0.5
    assert len(list((tmp_path / "cache").glob("reward-*/stage.json"))) == 1
