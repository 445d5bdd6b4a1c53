"""The settings of a recorded run, with overrides, as the commands that look at a run compose them."""

import json
import subprocess
import sys

import pytest
import yaml

from apa_cli.cli.app import check_subject
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.continuation import compose_continuation
from apa_cli.config.from_run import compose_from_run
from apa_cli.config.run_names import make_job_name
from apa_cli.errors import ConfigError


@pytest.fixture(scope="module")
def record_run(tmp_path_factory):
    """record_run(*overrides, name=, **environment) → the directory of a run that has just started."""

    def make(*overrides: str, name: str = "run", **environment):
        directory = tmp_path_factory.mktemp("recorded") / name
        directory.mkdir()
        (directory / "config.yaml").write_text(yaml.safe_dump(build_config(compose(list(overrides))).raw))
        (directory / "environment.json").write_text(json.dumps(environment))
        (directory / "metrics.jsonl").touch()
        return directory

    return make


def test_the_settings_are_the_runs_with_the_models_of_its_stages(record_run):
    run = record_run("algo=ppo", "lambda=0.3", "seed=5", policy="made/sft", reward="made/reward")
    config = build_config(compose_from_run([f"run={run}", "evaluation.seed=6", "evaluation.prompts=7"]))
    assert (config.run.seed, config.evaluation.seed, config.evaluation.prompts) == (5, 6, 7)
    assert type(config.algo).__name__ == "PPO" and config.algo.kl_coef == 0.3
    assert (config.model.path, config.reward.path, config.run.run) == ("made/sft", "made/reward", str(run))
    run = record_run("model=local", "model.path=mine", "reward.path=my_reward", name="given", policy="x", reward="y")
    config = build_config(compose_from_run([f"run={run}"]))
    assert (config.model.path, config.reward.path) == ("mine", "my_reward")


def test_groups_replace_sections_and_keys_change_them(record_run):
    run = record_run("reward=function", "reward.target=a.py:f", "sampling.max_new_tokens=9", policy="x", reward=None)
    overrides = ["reward.target=b.py:g", "sampling.temperature=0.5"]
    config = build_config(compose_from_run([f"run={run}", *overrides]))
    assert (config.reward.target, config.sampling.temperature, config.sampling.max_new_tokens) == ("b.py:g", 0.5, 9)
    config = build_config(
        compose_from_run([f"run={run}", "dataset.data_seed=3", "dataset=story_openings", "reward=vader"])
    )
    assert config.dataset.data_seed == 3 and type(config.dataset).__name__ == "StoryOpenings"
    assert config.sampling.stop_strings == [] and config.reward.target.endswith("vader:compound")
    run = record_run("sampling.stop_strings=[x]", name="own", policy="x", reward="y")
    assert build_config(compose_from_run([f"run={run}", "dataset=story_openings"])).sampling.stop_strings == ["x"]


def test_keys_that_the_run_lacks_have_their_defaults(record_run):
    run = record_run(policy="x", reward="y")
    raw = yaml.safe_load((run / "config.yaml").read_text())
    del raw["chat"], raw["run"], raw["evaluation"]["rewards"], raw["evaluation"]["best_of"]
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    config = build_config(compose_from_run([f"run={run}"]))
    assert config.evaluation.best_of and config.evaluation.rewards == [] and config.chat.dialogue is None


def test_keys_that_options_other_than_the_default_lack_have_the_values_of_those_options(record_run):
    overrides = ["dataset=jsonl", "dataset.path=a.csv", "dataset.held_out_every=7", "reward=ensemble"]
    run = record_run(*overrides, "reward.paths=[a, b]", "algo=a2po", "lambda=0.3", policy="x", reward="y")
    raw = yaml.safe_load((run / "config.yaml").read_text())
    del raw["dataset"]["columns"], raw["dataset"]["subset"], raw["reward"]["format"], raw["reward"]["deviations"]
    del raw["algo"]["beta1"], raw["plan"]["init_samples"]
    (run / "config.yaml").write_text(yaml.safe_dump(raw))
    for config in map(build_config, (compose_from_run([f"run={run}"]), compose_continuation([f"fork={run}"], run))):
        assert (config.dataset.path, config.dataset.held_out_every, config.dataset.subset) == ("a.csv", 7, None)
        assert set(config.dataset.columns.values()) == {None}
        assert (config.reward.format.value, config.reward.deviations) == ("auto", 1.0)
        assert (config.algo.beta1, config.algo.beta2, config.plan.init_samples) == (0.3, 0.3, 8)  # β₁ follows β₂, λ


@pytest.fixture(scope="module")
def new_run(record_run):
    return record_run(policy="x", reward="y")


def test_the_folder_of_a_sweeps_job_is_read_and_no_heavy_package_loaded(record_run, tmp_path):
    run = record_run("seed=8", name=make_job_name("algo=apa,lambda=0.1"), policy="x", reward="y")
    heavy = "{'torch', 'transformers', 'wandb', 'matplotlib', 'datasets', 'accelerate'}"
    code = (
        "import sys; from apa_cli.cli.evaluate import main; import apa_cli.cli.export, apa_cli.cli.chat\n"
        f"sys.argv = ['apa-eval', 'run={run}', '--cfg', 'job']; main()\n"
        f"print('loaded:', sorted({heavy} & set(sys.modules)))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    printed, _, loaded = process.stdout.partition("loaded:")
    assert loaded.strip() == "[]"
    assert yaml.safe_load(printed)["run"] == str(run) and yaml.safe_load(printed)["seed"] == 8
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["run=nowhere"], ["nowhere", "neither a run of apa-train"]),
        (["run={run}/checkpoints/iteration_000077"], ["nor its checkpoint"]),
        (["run={run}", "optimizer.lrr=1"], ["optimizer.lrr: ", "optimizer.lr'"]),
        (["run={run}", "evaluation.best_off=[2]"], ["evaluation.best_off", "evaluation.best_of'"]),
        (["run={run}", "+evaluation.bestof=[2]"], ["evaluation.bestof", "evaluation.best_of'"]),
        (["run={run}", "evaluation.best_of=[0]"], ["evaluation.best_of", "at least 1"]),
        (["run={run}", "evaluation.prompts=0"], ["evaluation.prompts", "at least 1"]),
        (["run={run}", "evaluation.prompts=1,2"], ["evaluation.prompts", "-m"]),
        (["run={run}", "reward=vadr"], ["reward", "'vader'"]),
        (["run={run}", "seed=[1"], ["seed=[1"]),
        (["run={run}", "~seed"], ["seed"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_override_is_one_line(overrides, parts, new_run):
    with pytest.raises(ConfigError) as error:
        build_config(
            compose_from_run([override.format(run=new_run) for override in overrides], uses_reward=lambda cfg: False)
        )
    message = str(error.value)
    assert "\n" not in message and all(part in message for part in parts)


def test_a_directory_that_is_no_run_of_apa_train_is_refused(record_run):
    stage = record_run(name="stage")  # apa-sft's environment.json names no policy
    with pytest.raises(ConfigError, match=r"give model.path=.*stage/model"):
        compose_from_run([f"run={stage}"])
    (stage / "config.yaml").write_text("- 1")
    with pytest.raises(ConfigError, match=r"cannot be read"):
        compose_from_run([f"run={stage}"])


def test_each_command_names_the_keys_that_it_takes(tmp_path):
    neither, of_model, of_run = (build_config(compose(overrides)) for overrides in ([], ["model.path=x"], ["run=y"]))
    check_subject(neither, ())
    check_subject(of_model, ("run", "model.path"))
    check_subject(of_run, ("run",))
    for config, takes, answer in [
        (of_run, (), "resume="),
        (neither, ("run", "model.path"), "run=… or model.path=…"),
        (of_model, ("run",), "give run=…"),
    ]:
        with pytest.raises(ConfigError, match=answer):
            check_subject(config, takes)
    code = "import sys; from apa_cli.cli.train import main; sys.argv = ['apa-train', 'run=nowhere']; main()"
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and not list(tmp_path.iterdir())
