"""Nothing that is read runs code, and no secret of the environment is written down."""

import json
import os
import pickle
import re
import shutil
import sys
from contextlib import nullcontext
from functools import partial

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from apa_cli.cli import chat, evaluate, export
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import ConfigError, UserError
from apa_cli.models.loading import load_policy
from apa_cli.rewards.base import Placement
from apa_cli.rewards.gptj_rm import GPTJReward

look = partial(compose_from_run, uses_reward=lambda cfg: False)
"""compose_from_run for a command that asks no reward."""


@pytest.fixture(scope="module")
def run(train, tmp_path_factory):
    return train(tmp_path_factory.mktemp("trusted") / "run", "iterations=1")


@pytest.fixture
def tampered(run, tmp_path):
    """tampered(key, value) → a copy of the run with another value in its config.yaml."""

    def make(key: str, value) -> str:
        shutil.copytree(run, tmp_path / "copy")
        file = tmp_path / "copy" / "config.yaml"
        config = node = yaml.safe_load(file.read_text())
        *above, last = key.split(".")
        for name in above:
            node = node[name]
        node[last] = value
        file.write_text(yaml.safe_dump(config))
        return f"run={tmp_path}/copy"

    return make


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A module that writes a file when it is imported; trap() says whether that has happened."""
    (tmp_path / "trap_module.py").write_text(
        f"from dataclasses import dataclass\nopen({str(tmp_path / 'sprung')!r}, 'w').close()\n\n\n"
        "@dataclass(frozen=True)\nclass Trap:\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield (tmp_path / "sprung").exists
    sys.modules.pop("trap_module", None)


TRAP = "trap_module.Trap"


# --- a run's config.yaml ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("algo._target_", TRAP),
        ("plan._target_", TRAP),
        ("reward._target_", TRAP),
        ("dataset._target_", TRAP),
        ("reward", {"_target_": "apa_cli.rewards.sum.SumReward", "parts": [{"use": "vader", "_target_": TRAP}]}),
        ("evaluation.rewards", [{"use": "vader", "_target_": TRAP}]),
        ("evaluation.rewards", [{"use": "sum", "parts": [{"use": "vader", "_target_": TRAP}]}]),
    ],
)
def test_a_target_that_only_the_runs_configuration_names_is_not_imported(key, value, tampered, trap):
    with pytest.raises(ConfigError, match=rf"_target_: .*config\.yaml has '{TRAP}'.*to import it") as caught:
        build_config(look([tampered(key, value)]))
    assert "\n" not in str(caught.value)
    assert not trap()


def test_one_that_is_hidden_behind_a_reference_is_not_imported_either(tampered, trap):
    hidden = "${oc.decode:'[{use: vader, _target_: trap_module.Trap}]'}"
    with pytest.raises(ConfigError, match=r"^evaluation\.rewards: .*config\.yaml has the reference"):
        build_config(look([tampered("evaluation.rewards", hidden)]))
    assert not trap()


def test_a_target_that_a_word_or_the_users_own_folder_names_is_imported(tampered, trap, tmp_path):
    words = [tampered("reward._target_", TRAP), f"reward._target_={TRAP}"]
    with pytest.raises(ConfigError, match=r"reward\._target_: trap_module\.Trap is not a subclass"):
        build_config(look(words))
    assert trap()
    (tmp_path / "own" / "reward").mkdir(parents=True)
    (tmp_path / "own" / "reward" / "mine.yaml").write_text(f"_target_: {TRAP}\n")
    look(words[:1], str(tmp_path / "own"))


def test_a_runs_own_configuration_is_taken(run):
    assert type(build_config(look([f"run={run}"])).algo).__name__ == "APA"


def test_a_reward_function_is_named_again_where_it_is_asked(run, trap, tmp_path, capfd, monkeypatch):
    copy = shutil.copytree(run, tmp_path / "copy")
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(re.sub(r"target: .*:vowels", "target: trap_module:Trap", text))
    for main, words, refused in (
        (evaluate.main, [], True),
        (evaluate.main, ["reward=vader"], False),
        (chat.main, ["chat.score=true"], True),
        (chat.main, [], False),
        (chat.main, ["chat.score=no"], False),
        (export.main, [], False),
    ):
        monkeypatch.setattr(sys, "argv", ["it", f"run={copy}", *words, "--cfg", "job"])
        with pytest.raises(SystemExit) if refused else nullcontext():
            main()
        said = (
            f"reward.target: config.yaml of {copy} has 'trap_module:Trap', which runs code; give "
            "reward.target=trap_module:Trap"
        )
        assert (said in capfd.readouterr().err) == refused
    assert not trap()


def test_another_runs_consent_to_remote_code_is_none(tampered):
    words = [tampered("model.trust_remote_code", True)]
    assert build_config(look(words)).model.trust_remote_code is False
    assert build_config(look([*words, "model.trust_remote_code=true"])).model.trust_remote_code is True


def test_yaml_cannot_make_objects(run, tmp_path):
    shutil.copytree(run, tmp_path / "copy")
    with (tmp_path / "copy" / "config.yaml").open("a") as file:
        file.write(f"extra: !!python/object/apply:os.system ['touch {tmp_path}/sprung']\n")
    with pytest.raises(ConfigError, match=r"config\.yaml or environment\.json of .* cannot be read"):
        look([f"run={tmp_path}/copy"])
    assert not (tmp_path / "sprung").exists()


# --- weights ---------------------------------------------------------------------------------------------------


class Spring:
    """Unpickled, it makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_the_trap_would_spring(tmp_path):
    pickle.loads(pickle.dumps(Spring(tmp_path / "sprung")))
    assert (tmp_path / "sprung").is_dir()


def test_a_models_pickled_weights_run_nothing(tiny, make_config, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"weight": Spring(tmp_path / "sprung")}, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"^model\.path: cannot load ") as caught:
        load_policy(make_config().model, str(tmp_path / "model"))
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()


def test_an_adapters_pickled_weights_run_nothing(tiny, make_config, tmp_path):
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(target_modules=["query_key_value"]))
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    torch.save({"weight": Spring(tmp_path / "sprung")}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(UserError, match=r"^model\.path: cannot load ") as caught:
        load_policy(make_config().model, str(tmp_path / "adapter"))
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()


def test_the_published_reward_models_pickle_runs_nothing(tiny, tmp_path):
    torch.save({"v_head.weight": Spring(tmp_path / "sprung")}, tmp_path / "hf_ckpt.pt")
    sizes = {"vocab_size": 600, "n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    reward = GPTJReward(str(tmp_path), "hf_ckpt.pt", str(tiny), sizes, None, 8, 64)
    with pytest.raises(UserError, match=r"^reward\.file: .* is not a file of tensors") as caught:
        reward.load(Placement("cpu", "float32"))
    assert "\n" not in str(caught.value) and not (tmp_path / "sprung").exists()


def test_remote_code_is_not_run_unless_asked_for(tiny, make_config, tmp_path):
    shutil.copytree(tiny, tmp_path / "model")
    config = json.loads((tiny / "config.json").read_text())
    config |= {"model_type": "own_kind", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "own.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w').close()\n")
    with pytest.raises(UserError, match=r"^model\.path: cannot load ") as caught:
        load_policy(make_config().model, str(tmp_path / "model"))
    assert "trust_remote_code" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_a_run_leaves_tensors_and_text_and_no_pickle(run):
    files = [file for file in run.rglob("*") if file.is_file()]
    assert len(files) > 10
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as tensors:
                list(tensors.keys())
        else:
            file.read_text(encoding="utf-8")
            assert file.name == ".lock" or file.suffix in (".json", ".jsonl", ".yaml", ".log", ".jinja")


# --- secrets ---------------------------------------------------------------------------------------------------

SECRETS = {"WANDB_API_KEY": "0123456789" * 4, "HF_TOKEN": "hf_abcdefghijkl", "MY_SCORE_TOKEN": "hush-hush-hush"}


@pytest.fixture
def secrets(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    return SECRETS


def test_no_secret_of_the_environment_is_written(secrets, run_train, monkeypatch):
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    spec = "{use: http, url: 'http://127.0.0.1:9/', token_env: MY_SCORE_TOKEN, weight: 0, retries: 0}"
    monkeypatch.setattr("apa_cli.rewards.http.HTTPReward.post", lambda *_: b'{"scores": [0, 0, 0, 0, 0, 0]}')
    words = ["tracking=wandb", "tracking.mode=offline", f"evaluation.rewards=[{spec}]", "iterations=1"]
    run = run_train(*words)
    assert "MY_SCORE_TOKEN" in (run / "config.yaml").read_text()
    files = [file for file in run.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files)
    for file in files:
        content = file.read_bytes()
        assert not [name for name, value in secrets.items() if value.encode() in content], file


@pytest.mark.parametrize(
    "word", ["tracking.project={}", "evaluation.rewards=[{{use: http, url: 'https://x/?key={}'}}]"]
)
def test_a_secret_in_a_word_is_refused(word, secrets):
    for name, value in secrets.items():
        with pytest.raises(
            ConfigError, match=rf"^[\w.\[\]]+: contains the value of the environment variable {name}"
        ) as e:
            build_config(compose([word.format(value)]))
        assert value not in str(e.value)


@pytest.mark.parametrize("name", ["HF_TOKEN", "ANYTHING"])
def test_a_word_cannot_refer_to_the_environment(name, secrets, monkeypatch):
    monkeypatch.setenv("ANYTHING", "hidden-value")
    with pytest.raises(ConfigError, match=rf"^tracking\.project: {name} cannot be referred to") as caught:
        build_config(compose([f"tracking.project=${{oc.env:{name}}}"]))
    assert "hidden" not in str(caught.value) and "hf_" not in str(caught.value)
    monkeypatch.setenv("HOME", "/some/home")
    assert build_config(compose(["stages.cache_dir=${oc.env:HOME}/x"])).stages.cache_dir == "/some/home/x"
