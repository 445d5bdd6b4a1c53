"""Reward specs in a sum and for evaluation: the rewards built from them, and the errors for wrong specs."""

import subprocess
import sys

import pytest

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.errors import ConfigError
from apa_cli.rewards.ensemble import EnsembleReward
from apa_cli.rewards.function import FunctionReward
from apa_cli.rewards.model import ModelReward
from apa_cli.rewards.sum import SumReward
from apa_cli.settings import RewardFormat

HEAVY = "sorted({'torch', 'transformers', 'peft'} & set(sys.modules))"


def compose_config(*overrides, extra_dir=None):
    return build_config(compose(list(overrides), extra_dir), extra_dir)


def build_parts(specs, **options):
    return compose_config("reward=sum", f"reward.parts={specs}", **options).reward.parts


def test_a_spec_is_a_yamls_name_or_a_mapping_with_changed_keys():
    first, second, third = build_parts(
        "[{use: model, path: D, output: toxic, weight: -1}, vader, {use: vader, weight: 0.3}]"
    )
    assert first.reward == ModelReward("D", "toxic", 1.0, False, None, 64, 512, RewardFormat.auto)
    assert second.reward == third.reward == FunctionReward("apa_cli.rewards.vader:compound", None)
    assert [part.weight for part in (first, second, third)] == [-1.0, 1.0, 0.3]


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        ("[vader, model, vader, vader]", ["vader", "model", "vader_2", "vader_3"]),
        ("[vader, {use: model, name: vader}]", ["vader_2", "vader"]),
        ("[{use: vader, name: mood}, vader]", ["mood", "vader"]),
    ],
)
def test_default_names_are_the_yamls_names_made_unique(specs, names):
    assert [part.name for part in build_parts(specs)] == names


def test_a_sum_may_contain_a_sum():
    (part,) = build_parts("[{use: sum, name: all, parts: [vader, {use: ensemble, paths: [a, b], reduce: lower}]}]")
    assert isinstance(part.reward, SumReward) and part.name == "all"
    vader, ensemble = part.reward.parts
    assert vader.name == "vader" and isinstance(ensemble.reward, EnsembleReward)
    assert (ensemble.reward.paths, ensemble.reward.reduce.value) == (["a", "b"], "lower")


def test_evaluation_takes_the_same_specs_and_the_raw_configuration_keeps_them():
    specs = "[vader, {use: model, name: toxicity, path: D, output: 1}]"
    config = compose_config("reward=sum", f"reward.parts={specs}", "evaluation.rewards=${reward.parts}")
    assert config.evaluation.rewards == config.reward.parts
    assert config.raw["evaluation"]["rewards"] == config.raw["reward"]["parts"] == [
        "vader", {"use": "model", "name": "toxicity", "path": "D", "output": 1}
    ]  # fmt: skip
    assert compose_config().evaluation.rewards == []


def test_values_may_interpolate_other_sections():
    (part,) = build_parts("[{use: model, path: '${model.path}'}]")
    assert part.reward.path is None
    config = compose_config(
        "model=local", "model.path=M", "reward=sum", "reward.parts=[{use: model, path: '${model.path}'}]"
    )
    assert config.reward.parts[0].reward.path == "M"


WRONG = {
    "[vadr]": "reward.parts[0]: no 'vadr'; did you mean 'vader'?",
    "[vader, {use: modle}]": "reward.parts[1]: no 'modle'; did you mean 'model'?",
    "[{use: model, pth: 3}]": "reward.parts[0].pth: unknown key; did you mean 'reward.parts[0].path'?",
    "[{use: vader, wieght: 3}]": "reward.parts[0].wieght: unknown key; did you mean 'reward.parts[0].weight'?",
    "[{use: gptj_rm, architecture: {n_emb: 3}}]": "reward.parts[0].architecture.n_emb: unknown key; did you mean "
    "'reward.parts[0].architecture.n_embd'?",
    "[{use: gptj_rm, architecture: 3}]": "reward.parts[0].architecture: 3 is not a mapping, as {name: value}",
    "[{use: sum, parts: [vader, {use: vadr}]}]": "reward.parts[0].parts[1]: no 'vadr'; did you mean 'vader'?",
    "[{use: sum, parts: []}]": "reward=sum: parts needs at least one reward",
    "[{use: model, microbatch_size: x}]": "reward.parts[0].microbatch_size: 'x' is not a whole number",
    "[{use: model, microbatch_size: 0}]": "reward.parts[0].microbatch_size: 0 must be at least 1",
    "[{use: model, output: 1.5}]": "reward.parts[0].output: 1.5 is not a whole number or a text",
    "[{use: model, dtype: fp16}]": "reward.parts[0].dtype: 'fp16' is not one of float32, bfloat16",
    "[{use: vader, weight: much}]": "reward.parts[0].weight: 'much' is not a number",
    "[{use: vader, weight: nan}]": "reward.parts[0].weight: nan is not a finite number",
    "[{use: function}]": "reward.parts[0].target: a value is needed",
    "[{path: x}]": "reward.parts[0].use: a value is needed",
    "[3]": "reward.parts[0]: the name of a reward or {use: NAME, …} is needed, got 3",
    "[{use: vader, name: a}, {use: model, name: a}]": "reward.parts: two rewards have the same name, a, a; give each "
    "its own",
    "[]": "reward=sum: parts needs at least one reward",
    "vader": "reward.parts: 'vader' is not a list",
}


@pytest.mark.parametrize("specs", WRONG)
def test_a_wrong_spec_is_a_one_line_error_naming_its_key(specs):
    with pytest.raises(ConfigError) as error:
        build_parts(specs)
    assert str(error.value) == WRONG[specs]


def test_a_wrong_spec_for_evaluation_names_its_key():
    with pytest.raises(ConfigError, match=r"^evaluation\.rewards\[1\]: no 'modl'; did you mean 'model'\?$"):
        compose_config("evaluation.rewards=[vader,modl]")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("penalty.per_token=-0.1", "penalty.per_token: -0.1 must be at least 0"),
        ("penalty.missing_eos=x", "penalty.missing_eos: 'x' is not a number"),
        ("penalty.missing_oes=1", "penalty.missing_oes: unknown key; did you mean 'penalty.missing_eos'?"),
    ],
)
def test_wrong_penalties_are_refused(override, message):
    with pytest.raises(ConfigError) as error:
        compose_config(override)
    assert str(error.value) == message


@pytest.fixture
def config_dir(tmp_path):
    """Return a user's configuration folder with a reward that extends conf/reward/model.yaml."""
    folder = tmp_path / "conf"
    (folder / "reward").mkdir(parents=True)
    (folder / "reward" / "kind.yaml").write_text("defaults: [model, _self_]\npath: outputs/kindness\noutput: kind\n")
    return folder


def test_specs_find_the_users_yamls(config_dir):
    kind, vader = build_parts("[kind, vader]", extra_dir=str(config_dir))
    assert kind.reward == ModelReward("outputs/kindness", "kind", 1.0, False, None, 64, 512, RewardFormat.auto)
    assert vader.reward == FunctionReward("apa_cli.rewards.vader:compound", None)
    with pytest.raises(ConfigError, match="no 'kind'"):
        build_parts("[kind]")


def run_apa_train(*overrides, cwd, after="pass"):
    """Run the command in a subprocess, then the statement `after` even if the command failed."""
    start = "import sys\nfrom apa_cli.cli.train import main\nsys.argv[0] = 'apa-train'\n"
    code = f"{start}try:\n    main()\nfinally:\n    {after}"
    return subprocess.run(
        [sys.executable, "-c", code, *overrides], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_the_command_checks_specs_before_heavy_imports(config_dir, tmp_path):
    overrides = ["--config-dir", str(config_dir), "--cfg", "job", "reward=sum"]
    after = f"print({HEAVY}, file=sys.stderr)"
    good = run_apa_train(*overrides, "reward.parts=[kind, {use: vader, weight: 0.3}]", cwd=tmp_path, after=after)
    assert good.returncode == 0 and good.stderr == "[]\n" and "- kind" in good.stdout
    bad = run_apa_train(*overrides, "reward.parts=[kidn]", cwd=tmp_path, after=after)
    line, loaded, _ = bad.stderr.split("\n")
    assert bad.returncode == 2 and bad.stdout == "" and loaded == "[]"
    assert line == "apa-train: reward.parts[0]: no 'kidn'; did you mean 'kind'?"


@pytest.mark.slow
def test_every_job_of_a_sweep_finds_the_users_yamls(config_dir, tmp_path):
    process = run_apa_train(
        "--config-dir", str(config_dir), "-m", "seed=0,1", "dry_run=true", "reward=sum",
        "reward.parts=[{use: kind, weight: 2}]", "evaluation.rewards=[vader]", cwd=tmp_path,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("reward: 2 × (kind: ModelReward outputs/kindness)") == 2
    assert process.stdout.count("reward in evaluation, vader: FunctionReward apa_cli.rewards.vader:compound") == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                (
                    ["reward=http", "reward.url=http://h/", "reward.timeout=1e10"],
                    "reward.timeout: 10000000000.0 must be greater",
                ),
                (
                    ["reward=http", "reward.url=http://h/", "reward.backoff=1e10"],
                    "reward.backoff: 10000000000.0 must be at least",
                ),
                (
                    ["reward=http", "reward.url=http://h/", "reward.longest_backoff=1e10"],
                    "reward.longest_backoff: 1000000000",
                ),
                (
                    ["reward=http", "reward.url=http://h/", f"reward.max_bytes={10**20}"],
                    f"reward.max_bytes: {10**20} must be",
                ),
                (
                    ["reward=vader", "reward.timeout=1e10"],
                    "reward.timeout: 10000000000.0 must be greater than 0 and at most 1e+09",
                ),
            ]
        ),
        (["reward.max_tokens=10000000000"], "reward.max_tokens: 10000000000 must be at least 1 and at most 1e+09"),
        (["reward.format=chatml"], "reward.format: 'chatml' is not one of auto, chat, plain"),
        (["reward_model.format=hh"], "reward_model.format: 'hh' is not one of auto, chat, plain"),
    ],
)
def test_settings_out_of_range_are_refused(overrides, message):
    with pytest.raises(ConfigError) as error:
        build_config(compose(overrides))
    assert str(error.value).startswith(message)
