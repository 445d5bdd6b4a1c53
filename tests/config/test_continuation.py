"""The settings of a resumed or forked run: what follows a changed algorithm, and runs of earlier versions."""

import pytest
import yaml

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.continuation import compose_continuation
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import ConfigError
from apa_cli.runs.directory import RunDirectory

GROUP_MEAN = "algo.advantage_estimator=group_mean"
"""With it the algorithm's own samples_per_prompt is 2 instead of 1."""


@pytest.fixture
def record(tmp_path):
    """record(*overrides, without=keys) → the directory of a run, whose config.yaml lacks these keys."""

    def make(*overrides, without=()):
        raw = build_config(compose(list(overrides))).raw
        for key in without:
            section, _, last = key.rpartition(".")
            del (raw[section] if section else raw)[last]
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
        (tmp_path / "environment.json").write_text('{"policy": "p", "reward": "r"}')
        (tmp_path / "metrics.jsonl").touch()
        return tmp_path

    return make


def continue_run(start, run, *overrides, extra_dir=None):
    return build_config(compose_continuation([f"{start}={run}", *overrides], run, extra_dir), extra_dir)


# --- samples_per_prompt -------------------------------------------------------------------------------------


def test_another_algorithm_has_its_own_number_of_samples(record):
    run = record()
    assert yaml.safe_load((run / "config.yaml").read_text())["samples_per_prompt"] == 1
    assert continue_run("fork", run, GROUP_MEAN).run.samples_per_prompt == 2
    assert continue_run("fork", run, "algo=ppo", GROUP_MEAN).run.samples_per_prompt == 2
    assert continue_run("fork", run, GROUP_MEAN, "samples_per_prompt=8").run.samples_per_prompt == 8
    run = record(GROUP_MEAN)
    assert continue_run("fork", run, "algo=ppo").run.samples_per_prompt == 1


def test_a_number_that_was_given_stays(record):
    run = record("samples_per_prompt=8")
    assert continue_run("fork", run, "algo=ppo").run.samples_per_prompt == 8
    assert continue_run("fork", run, GROUP_MEAN).run.samples_per_prompt == 8


@pytest.mark.parametrize("overrides", [(), (GROUP_MEAN,), ("samples_per_prompt=4",)])
def test_a_run_continues_with_its_own_number(overrides, record):
    run = record(*overrides)
    number = yaml.safe_load((run / "config.yaml").read_text())["samples_per_prompt"]
    config = continue_run("resume", run, f"samples_per_prompt={number}")  # as it is, or given again
    RunDirectory(run).check_resume(config.raw)
    for config in (continue_run("resume", run), build_config(compose_from_run([f"run={run}"]))):
        assert config.run.samples_per_prompt == config.raw["samples_per_prompt"] == number
    with pytest.raises(ConfigError, match=rf"samples_per_prompt: {number} → 16"):
        RunDirectory(run).check_resume(continue_run("resume", run, "samples_per_prompt=16").raw)


# --- options that override other groups ---------------------------------------------------------------------


def test_an_option_that_overrides_other_groups_sets_them_too(record):
    config = continue_run("fork", record(), "model=llama_7b")
    assert (config.model.path, config.lora.rank, config.critic.kind.value) == ("huggyllama/llama-7b", 16, "adapter")
    config = continue_run("fork", record("sampling.max_new_tokens=9"), "model=llama_7b", "lora.rank=4")
    assert (config.lora.rank, config.sampling.max_new_tokens) == (4, 9)


def test_an_algorithm_brings_its_plan(record, tmp_path):
    own = tmp_path / "own"
    (own / "algo").mkdir(parents=True)
    (own / "plan").mkdir()
    (own / "code.py").write_text(
        "from dataclasses import dataclass\n\nfrom apa_cli.algorithms.apa import APA\n"
        "from apa_cli.algorithms.plans import Online\n\n\n@dataclass(frozen=True)\nclass Logged(Online):\n"
        "    name = 'logged'\n    passes: int\n\n\n"
        "@dataclass(frozen=True)\nclass Offline(APA):\n    plans = ('logged',)\n"
    )
    (own / "plan" / "logged.yaml").write_text(f"_target_: {own}/code.py:Logged\npasses: 3\n")
    (own / "algo" / "offline.yaml").write_text(
        "# @package _global_\ndefaults:\n  - apa\n  - override /plan: logged\n  - _self_\n\n"
        f"lambda: 0.7\n\nalgo:\n  _target_: {own}/code.py:Offline\n"
    )
    config = continue_run("fork", record("lambda=0.2"), "algo=offline", extra_dir=str(own))
    assert (config.plan.name, config.plan.passes, config.algo.lambda_) == ("logged", 3, 0.7)
    config = continue_run("fork", record(), "algo=offline", "plan.passes=5", extra_dir=str(own))
    assert config.plan.passes == 5
    with pytest.raises(ConfigError, match=r"^plan: APA cannot train on logged; give plan=online$"):
        continue_run("fork", record(), "plan=logged", extra_dir=str(own))


# --- runs of earlier versions -------------------------------------------------------------------------------


def test_a_run_recorded_before_plans_and_guides_goes_on(record):
    run = record("seed=3", without=("plan", "guide", "reference.log_kl"))
    for start in ("resume", "fork"):
        config = continue_run(start, run)
        assert (config.plan.name, config.guide.top_k, config.reference.log_kl, config.run.seed) == (
            "online",
            50,
            True,
            3,
        )
    RunDirectory(run).check_resume(continue_run("resume", run).raw)
    config = build_config(compose_from_run([f"run={run}"]))
    assert (config.plan.name, config.run.seed) == ("online", 3)
    with pytest.raises(ConfigError, match=r"^resume: .*: seed: 3 → 4;"):
        RunDirectory(run).check_resume(continue_run("resume", run, "seed=4").raw)


def test_a_run_with_a_plan_may_not_change_it(record):
    run = record()
    raw = continue_run("resume", run).raw
    RunDirectory(run).check_resume(raw)
    with pytest.raises(ConfigError, match=r"guide\.top_k: 50 → 3, plan\._target_: .* → 'Other'"):
        RunDirectory(run).check_resume(raw | {"plan": {"_target_": "Other"}, "guide": raw["guide"] | {"top_k": 3}})
    with pytest.raises(ConfigError, match=r"reference\.log_kl: True → False"):
        RunDirectory(run).check_resume(continue_run("resume", run, "reference.log_kl=false").raw)


def test_consent_to_a_guides_code_is_given_again(record):
    run = record("guide.path=X", "guide.trust_remote_code=true")
    with pytest.raises(ConfigError, match=r"^guide\.trust_remote_code: .*give guide\.trust_remote_code=true"):
        continue_run("resume", run)
    assert continue_run("resume", run, "guide.trust_remote_code=true").guide.trust_remote_code is True
    look = [f"run={run}"]
    assert build_config(compose_from_run(look)).guide.trust_remote_code is False
    assert build_config(compose_from_run([*look, "guide.trust_remote_code=true"])).guide.trust_remote_code is True


@pytest.mark.parametrize("override", ["plan=online", "plan._target_=x.Y"])
def test_a_plan_cannot_be_changed_to_look_at_a_run(override, record):
    with pytest.raises(ConfigError, match=r"^plan.*the run's own value applies"):
        compose_from_run([f"run={record()}", override])


# --- λ ------------------------------------------------------------------------------------------------------


@pytest.fixture
def without_lambda(tmp_path):
    """A folder with algo=plain, which has no λ."""
    (tmp_path / "own" / "algo").mkdir(parents=True)
    (tmp_path / "own" / "algo" / "plain.yaml").write_text(
        "# @package _global_\ndefaults:\n  - _actor_critic@algo\n  - _self_\nalgo:\n  _target_: plain.py:Plain\n"
    )
    (tmp_path / "plain.py").write_text(
        "from dataclasses import dataclass\nfrom apa_cli.algorithms.base import ActorCritic\n\n\n"
        "@dataclass(frozen=True)\nclass Plain(ActorCritic):\n    def loss(self, batch, output):\n        raise\n"
    )
    return str(tmp_path / "own")


@pytest.mark.parametrize("start", ["resume", "fork"])
def test_a_run_without_lambda_continues(start, record, without_lambda, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "run"
    run.mkdir()
    raw = build_config(compose(["algo=plain"], without_lambda), without_lambda).raw
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    (run / "environment.json").write_text('{"policy": "p", "reward": "r"}')
    (run / "metrics.jsonl").touch()
    assert "lambda" not in raw
    config = continue_run(start, run, extra_dir=without_lambda)
    assert "lambda" not in config.raw and type(config.algo).__name__ == "Plain"
    assert continue_run("fork", run, "algo=ppo", extra_dir=without_lambda).raw["lambda"] == 0.05


def test_a_fork_to_an_algorithm_without_lambda_drops_it(record, without_lambda, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "lambda" not in continue_run("fork", record(), "algo=plain", extra_dir=without_lambda).raw


def test_a_key_that_follows_lambda_follows_it_in_a_fork_unless_it_had_a_value_of_its_own(record):
    algo = continue_run("fork", record("algo=a2po"), "lambda=0.3").algo
    assert (algo.beta1, algo.beta2) == (0.3, 0.3)
    run = record("algo=a2po", "algo.beta1=0.5")
    assert continue_run("resume", run).algo.beta1 == 0.5
    algo = continue_run("fork", run, "lambda=0.3").algo
    assert (algo.beta1, algo.beta2) == (0.5, 0.3)
    with pytest.raises(ConfigError, match=r"^lambda: "):  # β₁ alone would follow λ
        build_config(compose(["algo=a2po", "algo.beta2=1"]))
