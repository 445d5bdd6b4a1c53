"""Checked configurations, and the one line that answers each wrong override."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.hydra_api import expand_sweep, find_config_dir, list_groups
from apa_cli.errors import ConfigError
from apa_cli.types import DATA, INIT, Needs
from apa_cli.user_code import import_object

CONF = find_config_dir()
YAMLS = sorted(path.relative_to(CONF) for path in CONF.rglob("*.yaml"))


def built(*words, extra_dir=None):
    return build_config(compose(list(words), extra_dir))


def refused(*words, extra_dir=None):
    with pytest.raises(ConfigError) as caught:
        built(*words, extra_dir=extra_dir)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_default_is_apa_at_a_tenth():
    config = built()
    assert type(config.algo).__name__ == "APA"
    assert config.algo.lambda_ == 0.1
    assert config.run.microbatch_size == config.run.minibatch_size


ALGORITHMS = sorted(list_groups(None)["algo"])


def find_algorithm(plan: str) -> str:
    """The first algorithm that can train on this plan."""
    name = import_object(yaml.safe_load((CONF / "plan" / f"{plan}.yaml").read_text())["_target_"]).name
    return next(algorithm for algorithm in ALGORITHMS if name in built(f"algo={algorithm}").algo.plans)


@pytest.mark.parametrize("path", [p for p in YAMLS if len(p.parts) > 1 and not p.name.startswith("_")], ids=str)
def test_every_yaml_builds_its_section(path):
    group, option = path.parts[0], str(Path(*path.parts[1:]).with_suffix(""))
    text = (CONF / path).read_text()
    lists = {"parts": "[vader]", "paths": "[x]", "url": "https://x"}
    missing = [f"{group}.{key}={lists.get(key, 'x')}" for key, value in yaml.safe_load(text).items() if value == "???"]
    if option == "stories_vader":
        missing = ["model.path=x"]
    if group == "plan":
        missing.append(f"algo={find_algorithm(option)}")
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
    "lr=1": ["lr: ", "optimizer.lr"],
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
    "critic=[{use: vadr}]": ["critic", "separate"],
    "launch=auto": ["launch"],
    "++lora.alpha=${oc.decode:[1}": ["lora.alpha"],
    "minibatch_size=-0.5": ["minibatch_size: -0.5"],
    "name=${oc.env:SECRET}": ["name", "SECRET"],
    "guard.action=shout": ["guard.action", "warn, stop"],
    "stop_at_kl=0": ["stop_at_kl", "greater than 0"],
    "reward.timeout=3": ["reward.timeout"],
    "dry_run=maybe": ["dry_run", "true or false"],
    "algo.advantage_estimator=gea": ["algo.advantage_estimator", "gae, monte_carlo, group_mean"],
    "algo.gae_lambda=1.1": ["algo.gae_lambda", "1.1", "at most 1"],
    "sampling.top_p=0": ["sampling.top_p", "greater than 0"],
    "sampling.stop_strings=x": ["sampling.stop_strings", "'x'", "list"],
    "sampling.stop_strings=[null]": ["sampling.stop_strings", "[None] has null in it"],
    "optimizer.betas=[0.9]": ["optimizer.betas", "two numbers"],
    "optimizer.betas=[0.9,1]": ["optimizer.betas"],
    "minibatch_size=5": ["rollout_batch_size", "64", "5"],
    "microbatch_size=3": ["minibatch_size", "16", "3"],
    "samples_per_prompt=3": ["rollout_batch_size", "64", "3"],
    "samples_per_prompt=x": ["samples_per_prompt", "'x'", "whole number"],
    "samples_per_prompt=0": ["samples_per_prompt", "at least 1"],
    "plan=onlin": ["plan", "'online'"],
    "plan=[]": ["plan", "a section"],
    "+plan.nmae=1": ["plan.nmae"],
    "guide=lokal": ["guide", "'local'"],
    "guide=local": ["guide.path"],
    "guide.top_pp=1": ["guide.top_pp", "'guide.top_p'"],
    "guide.temprature=1": ["guide.temprature", "'guide.temperature'"],
    "guide.top_p=0": ["guide.top_p", "greater than 0"],
    "guide.temperature=0": ["guide.temperature", "greater than 0"],
    "guide.dtype=float16": ["guide.dtype", "float32, bfloat16"],
    "reference.log_kll=false": ["reference.log_kll", "'reference.log_kl'"],
    "reference.log_kl=maybe": ["reference.log_kl", "true or false"],
    "reward=function": ["reward.target"],
    "model=local": ["model.path"],
    "algo.lambda_=0.2": ["lambda"],
    "algo._target_=nowhere.Nothing": ["algo._target_", "cannot import nowhere "],
    "algo._target_=pathlib.Path": ["algo._target_", "dataclass"],
    "model.architecture=3": ["model.architecture"],
    "optimizer=null": ["optimizer", "a section with keys is needed"],
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
def test_a_wrong_override_is_one_line_that_names_the_key_and_the_nearest(word):
    message = refused(word)
    for part in WRONG[word]:
        assert part in message


def test_the_guide_is_the_sft_model_unless_another_is_named():
    guide = built().guide
    assert (guide.path, guide.temperature, guide.top_k, guide.top_p) == (None, 1.0, 50, 0.92)
    assert built("guide=local", "guide.path=X").guide.path == built("guide.path=X").guide.path == "X"
    assert built("model=llama_7b").guide.dtype.value == "bfloat16"  # as the model


# --- what algorithm and plan need ---------------------------------------------------------------------------


def test_samples_per_prompt_is_the_algorithms_own_number_unless_given():
    config = built()
    assert config.run.samples_per_prompt == config.raw["samples_per_prompt"] == 1
    config = built("algo.advantage_estimator=group_mean")
    assert config.run.samples_per_prompt == config.raw["samples_per_prompt"] == 2
    assert built("algo.advantage_estimator=group_mean", "samples_per_prompt=8").run.samples_per_prompt == 8
    assert refused("algo.advantage_estimator=group_mean", "samples_per_prompt=1") == (
        "samples_per_prompt: the algorithm with these settings needs at least 2, got 1"
    )
    assert refused("algo.advantage_estimator=group_mean", "rollout_batch_size=9", "minibatch_size=3") == (
        "rollout_batch_size: 9 is not a multiple of samples_per_prompt 2"
    )


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_with_its_own_number_of_samples(algorithm):
    config = built(f"algo={algorithm}")
    needs = config.needs
    assert config.run.samples_per_prompt == needs.samples_per_prompt >= needs.least_samples
    assert needs.samples_per_prompt % needs.samples_multiple == 0 and config.plan.name in config.algo.plans


PAIRED = """\
from dataclasses import dataclass

from apa_cli.algorithms.apa import APA
from apa_cli.algorithms.plans import Online
from apa_cli.types import DATA, INIT, Needs


@dataclass(frozen=True)
class Paired(APA):
    plans = ("online", "logged")

    def needs(self):
        return Needs(samplers=(INIT,), samples_per_prompt=4, least_samples=2, samples_multiple=2)


@dataclass(frozen=True)
class Logged(Online):
    name = "logged"

    def needs(self, needs):
        return Needs(samplers=(*needs.samplers, DATA), samples_per_prompt=6)
"""


@pytest.fixture
def paired(tmp_path):
    """(override for an algorithm of pairs, override for a plan that only this algorithm takes)."""
    (tmp_path / "paired.py").write_text(PAIRED)
    return f"algo._target_={tmp_path}/paired.py:Paired", f"plan._target_={tmp_path}/paired.py:Logged"


def test_samples_per_prompt_must_be_a_multiple_if_the_algorithm_needs_one(paired):
    assert built(paired[0], "samples_per_prompt=8").run.samples_per_prompt == 8
    assert refused(paired[0], "samples_per_prompt=3", "rollout_batch_size=96") == (
        "samples_per_prompt: the algorithm needs a multiple of 2, got 3"
    )


def test_the_plan_has_the_last_word_on_what_is_needed(paired):
    assert built(paired[0]).needs.samplers == (INIT,)
    config = built(*paired, "rollout_batch_size=96")
    assert config.needs == Needs(samplers=(INIT, DATA), samples_per_prompt=6)
    assert config.run.samples_per_prompt == config.raw["samples_per_prompt"] == 6


def test_a_plan_on_which_the_algorithm_cannot_train_is_refused(paired):
    assert refused(paired[1]) == "plan: APA cannot train on logged; give plan=online"


def test_a_limit_of_kl_needs_the_kl():
    assert built("stop_at_kl=3").reference.log_kl and not built("reference.log_kl=false").reference.log_kl
    assert refused("stop_at_kl=3", "reference.log_kl=false") == (
        "stop_at_kl: kl/sequence is not measured with reference.log_kl=false; leave one of the two out"
    )
    adaptive = built("algo=ppo", "algo.kl_controller=adaptive", "reference.log_kl=false")
    assert "init" in adaptive.needs.passes["response"]  # the controller's KL is measured nevertheless


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


def test_escapes_in_texts_are_read_as_in_yaml(tmp_path):
    """Neither a shell nor Hydra reads them; Hydra keeps a backslash that stands before no quote."""
    written = [r"\n", r"\n\nHuman:", r"a\tb\r", r"a\\nb", r"\d+", "\n"]
    read = ["\n", "\n\nHuman:", "a\tb\r", r"a\nb", r"\d+", "\n"]
    strings = ",".join(f'"{text}"' for text in written)
    overrides = [f"sampling.stop_strings=[{strings}]", "dataset=prompts", f"dataset.path={tmp_path}/prompts.txt"]
    texts = [f'dataset.prefix="{"".join(written)}"', f'dataset.suffix="{"".join(reversed(written))}"']
    config = build_config(compose([*overrides, *texts]))
    assert config.sampling.stop_strings == read
    assert (config.dataset.prefix, config.dataset.suffix) == ("".join(read), "".join(reversed(read)))


def test_a_sweep_is_every_combination():
    jobs = expand_sweep(["algo=apa,ppo", "lambda=0.1,0.3", "iterations=3"])
    assert jobs == [
        ["algo=apa", "lambda=0.1", "iterations=3"],
        ["algo=apa", "lambda=0.3", "iterations=3"],
        ["algo=ppo", "lambda=0.1", "iterations=3"],
        ["algo=ppo", "lambda=0.3", "iterations=3"],
    ]


LOADED = "import sys; heavy = {'torch', 'transformers', 'wandb', 'matplotlib', 'datasets', 'accelerate'}"


def test_checking_a_configuration_loads_no_heavy_package(tmp_path):
    code = (
        f"{LOADED}\nimport apa_cli.cli.train, apa_cli.cli.sft, apa_cli.cli.reward, apa_cli.cli.compare\n"
        "from apa_cli.config.compose import compose\nfrom apa_cli.config.build import build_config\n"
        "for words in ([], ['algo=ppo'], ['algo=awr', 'reward=vader', 'dataset=story_openings']):\n"
        "    build_config(compose(words))\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
