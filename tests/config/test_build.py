"""The command line: what composes, and what every wrong word is answered with."""

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from apa_cli.cli.app import checked_jobs, told_apart
from apa_cli.config.build import build
from apa_cli.config.build import compose as composing
from apa_cli.config.compose import compose, config_dir, expand
from apa_cli.errors import ConfigError

CONF = config_dir()
YAMLS = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))


def built(*words, extra_dir=None):
    return build(compose(list(words), extra_dir))


def refused(*words, extra_dir=None):
    with pytest.raises(ConfigError) as caught:
        built(*words, extra_dir=extra_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def run(*words, cwd, module="train"):
    code = f"import sys; from apa_cli.{module} import main; sys.argv[0] = 'apa-{module}'; main()"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, check=False)


def test_the_default_is_apa_at_a_tenth():
    config = built()
    assert type(config.algo).__name__ == "APA"
    assert config.algo.lambda_ == 0.1
    assert config.run.microbatch_size == config.run.minibatch_size


@pytest.mark.parametrize("path", [p for p in YAMLS if len(p.parts) > 1], ids=str)
def test_every_yaml_builds_its_section(path):
    group, option = path.parts[0], str(Path(*path.parts[1:]).with_suffix(""))
    text = (CONF / path).read_text()
    lists = {"parts": "[vader]", "paths": "[x]", "url": "https://x"}
    missing = [f"{group}.{key}={lists.get(key, 'x')}" for key, value in yaml.safe_load(text).items() if value == "???"]
    if option == "stories_vader":
        missing = ["model.path=x"]
    config = built(f"{group}={option}", *missing)
    section = getattr(config, group, None)
    if section is not None:
        named = {f.name for f in fields(section)}
        assert named <= set(config.raw[group]) | {"lambda_"}


@pytest.mark.parametrize("path", YAMLS, ids=str)
def test_every_key_has_a_comment_above_it(path):
    previous = ""
    for line in (CONF / path).read_text().splitlines():
        key = line.strip().split(":")[0]
        leaf = line.strip() and not line.strip().startswith(("#", "-")) and not line.rstrip().endswith(":")
        structural = key in ("_target_", "dir", "subdir", "chdir", "exclude_keys") or line.startswith("    ")
        nested_dimension = path.parts[0] == "model" and line.startswith("  ")
        shared = previous.strip().split(":")[0] in ("prefix",)
        if leaf and not structural and not nested_dimension and not shared:
            assert previous.strip().startswith("#"), f"{path}: {line!r} has no comment above it"
        previous = line


WRONG = {
    "optimizer.lrr=1": ["optimizer.lrr", "optimizer.lr'"],
    "lr=1": ["'lr'", "optimizer.lr'"],
    "algoo=ppo": ["algoo", "'algo'"],
    "lambd=1": ["lambd", "'lambda'"],
    "algo=pppo": ["algo", "'ppo'"],
    "reward=vadr": ["reward", "'vader'"],
    "+algo.lamda_=1": ["algo.lamda_", "algo.lambda_"],
    "+seeed=1": ["seeed", "'seed'"],
    "lambda=-1": ["lambda", "-1", "greater than 0"],
    "lambda=0": ["lambda", "greater than 0"],
    "lambda=nan": ["lambda", "finite"],
    "lambda=abc": ["lambda", "'abc'", "a number"],
    "seed=1.5": ["seed", "1.5", "whole number"],
    "seed=-1": ["seed", "at least 0"],
    "seed=99999999999999999999": ["seed", "at most 9.22337e+18"],
    "name=": ["name", "outputs/"],
    "name=a/../../b": ["name", "outputs/"],
    "launch=[{use: vadr}]": ["launch", "auto"],
    "++lora.alpha=${oc.decode:[1}": ["lora.alpha"],
    "minibatch_size=-0.5": ["minibatch: -0.5"],
    "name=${oc.env:SECRET}": ["name", "SECRET"],
    "guard.action=shout": ["guard.action", "warn, stop"],
    "stop_at_kl=0": ["stop_at_kl", "greater than 0"],
    "reward.timeout=3": ["reward.timeout"],
    "dry_run=maybe": ["plan", "true or false"],
    "algo.advantage_estimator=gea": ["algo.advantage_estimator", "gae, monte_carlo, group_mean"],
    "algo.gae_lambda=1.1": ["algo.gae_lambda", "1.1", "at most 1"],
    "sampling.top_p=0": ["sampling.top_p", "greater than 0"],
    "sampling.stop_strings=x": ["sampling.stop_strings", "'x'", "list"],
    "optimizer.betas=[0.9]": ["optimizer.betas", "two numbers"],
    "optimizer.betas=[0.9,1]": ["optimizer.betas"],
    "minibatch_size=5": ["rollout_batch_size", "64", "5"],
    "microbatch_size=3": ["minibatch", "32", "3"],
    "samples_per_prompt=3": ["rollout_batch_size", "64", "3"],
    "algo.advantage_estimator=group_mean": ["samples_per_prompt", "at least 2"],
    "reward=function": ["reward.target"],
    "model=local": ["model.path"],
    "algo.lambda_=0.2": ["lambda"],
    "algo._target_=nowhere.Nothing": ["algo._target_", "nowhere.Nothing"],
    "algo._target_=pathlib.Path": ["algo._target_", "dataclass"],
    "model.architecture=3": ["model.architecture"],
    "optimizer=null": ["optimizer", "adamw"],
    "~lambda": ["lambda"],
    "~optimizer.lr": ["optimizer.lr"],
    "word": ["'word'", "key=value"],
    "seed=[1": ["seed=[1"],
    "lambda=0.1,0.2": ["lambda", "-m"],
    "sampling.temperature=0": ["sampling.temperature", "greater than 0"],
    "name=${nothing}": ["name", "nothing"],
    "bench.iteration=3": ["bench.iteration", "bench.iterations'"],
    "bench.iterations=0": ["bench.iterations", "at least 1"],
    "bench.end_probability=2": ["bench.end_probability", "at most 1"],
}


@pytest.mark.parametrize("word", WRONG)
def test_a_wrong_word_is_one_line_that_names_the_key_and_the_nearest(word):
    message = refused(word)
    for part in WRONG[word]:
        assert part in message


@pytest.fixture
def own_dir(tmp_path):
    """A user's own algorithm without a λ: one yaml, no Python."""
    (tmp_path / "algo").mkdir()
    text = (CONF / "algo" / "apa.yaml").read_text()
    text = text.replace("lambda: 0.1\n", "").replace("lambda_: ${lambda}", "lambda_: 0.5")
    (tmp_path / "algo" / "fixed.yaml").write_text(text)
    return tmp_path


def test_own_yaml_and_lambda_for_an_algorithm_that_has_none(own_dir):
    assert built("algo=fixed", extra_dir=str(own_dir)).algo.lambda_ == 0.5
    assert refused("algo=fixed", "lambda=0.1", extra_dir=str(own_dir)).startswith("lambda: ")
    assert refused("algo=fixed", "+lambda=0.1", extra_dir=str(own_dir)).startswith("lambda: ")
    assert "no folder" in refused(extra_dir=str(own_dir / "nothing"))


def test_each_algorithm_takes_lambda_in_its_own_place():
    assert built("algo=apa", "lambda=0.7").algo.lambda_ == 0.7
    assert built("algo=awr", "lambda=0.7").algo.lambda_ == 0.7
    assert built("algo=ppo", "lambda=0.7").algo.kl_coef == 0.7


def test_published_defaults():
    apa, awr, ppo = (built(f"algo={name}").algo for name in ("apa", "awr", "ppo"))
    assert apa.whitening.value == "none"
    assert awr.whitening.value == ppo.whitening.value == "rollout"
    assert (apa.value_clip_range, awr.value_clip_range, ppo.value_clip_range) == (None, None, 0.2)
    assert awr.weight_clip == 20
    assert (ppo.clip_range, ppo.kl_target, ppo.kl_horizon) == (0.2, 6, 10000)
    for algo in (apa, awr, ppo):
        assert (algo.gamma, algo.gae_lambda, algo.score_scaling.value, algo.value_coef) == (1, 0.95, "running", 1)


def test_a_sweep_is_every_combination():
    jobs = expand(["algo=apa,ppo", "lambda=0.1,0.3", "iterations=3"])
    assert jobs == [
        ["algo=apa", "lambda=0.1", "iterations=3"],
        ["algo=apa", "lambda=0.3", "iterations=3"],
        ["algo=ppo", "lambda=0.1", "iterations=3"],
        ["algo=ppo", "lambda=0.3", "iterations=3"],
    ]


def test_what_tells_the_jobs_of_a_sweep_apart():
    assert told_apart(["algo=apa", "lambda=0.1,1", "seed=0,1"])[:3] == [
        "lambda=0.1 seed=0",
        "lambda=0.1 seed=1",
        "lambda=1 seed=0",
    ]
    assert told_apart(["algo=apa", "seed=0"]) == [""]


@pytest.mark.parametrize("key", ["resume", "fork"])
def test_a_jobs_folder_that_is_not_there_is_named_as_it_was_written(key):
    folder = "outputs/sweeps/lam/lambda=1,seed=0"
    for written in (folder, f"'{folder}'"):
        with pytest.raises(ConfigError, match=f"^{key}: there is no run in {folder}$"):
            checked_jobs([f"{key}={written}"], False, None, ())


def test_directory_names_have_no_separators():
    assert composing.directory_name("model.path=/a/b,seed=0") == "model.path=_a_b,seed=0"


def test_a_resumed_run_stays_in_its_directory():
    assert composing.run_directory_name("new", None) == "outputs/new"
    assert composing.run_directory_name("new", "outputs/old") == "outputs/old"
    assert composing.run_directory_name("new", "outputs/old/checkpoints/iteration_000004") == "outputs/old"


LOADED = "import sys; heavy = {'torch', 'transformers', 'wandb', 'matplotlib', 'datasets', 'accelerate'}"


def test_checking_words_loads_no_heavy_package(tmp_path):
    code = (
        f"{LOADED}\nimport apa_cli.cli.train, apa_cli.cli.sft, apa_cli.cli.reward, apa_cli.cli.compare\n"
        "from apa_cli.config.compose import compose\nfrom apa_cli.config.build import build\n"
        "for words in ([], ['algo=ppo'], ['algo=awr', 'reward=vader', 'dataset=story_openings']):\n"
        "    build(compose(words))\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


STARTS = """
import contextlib, importlib, io, json
loaded, endings = {}, []
for name in ("train", "sft", "reward", "evaluate", "export", "chat", "bench"):
    for words in (["--help"], ["lambd=1"], ["--cfg", "job"]):
        sys.argv = [f"apa-{name}", *words]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
            try:
                importlib.import_module(f"apa_cli.cli.{name}").main()
                endings.append([0, said.getvalue().count(chr(10))])
            except SystemExit as end:
                endings.append([end.code, said.getvalue().count(chr(10))])
        loaded[" ".join(sys.argv)] = sorted(heavy & set(sys.modules))
print(json.dumps([loaded, endings]))
"""


def test_help_wrong_words_and_cfg_load_no_heavy_package_in_any_command(tmp_path):
    """`--cfg job` of a command that needs a run is answered as a wrong word is."""
    done = subprocess.run(
        [sys.executable, "-c", LOADED + STARTS], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    loaded, endings = json.loads(done.stdout)
    assert len(loaded) == 21 and not [words for words, packages in loaded.items() if packages]
    needs_a_run = [[0, 0], [2, 1], [2, 1]]
    assert endings == 3 * [[0, 0], [2, 1], [0, 0]] + 3 * needs_a_run + [[0, 0], [2, 1], [0, 0]]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [("lambd=1",), ("-m", "lambda=0.1,x"), ("--cfg", "job", "lambd=1"), ("seed=[1",)])
def test_the_command_answers_wrong_words_with_one_line_and_status_2(tmp_path, words):
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("apa-train: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_cfg_job_prints_the_configuration_and_writes_nothing(tmp_path):
    done = run("--cfg", "job", "lambda=0.25", cwd=tmp_path)
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["lambda"] == 0.25
    assert not list(tmp_path.iterdir())


def test_help_names_every_key_group_and_option(tmp_path):
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0
    for word in ("lambda=0.1", "optimizer.lr=", "algo=", "apa*", "ppo", "awr", "--config-dir", "-m", "resume="):
        assert word in done.stdout
    for name in yaml.safe_load((CONF / "config.yaml").read_text()):
        if name not in ("defaults", "hydra"):
            assert f"  {name}=" in done.stdout
