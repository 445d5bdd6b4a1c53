"""Algorithms, plans, data sets and rewards from outside the package: files and modules of the current folder."""

import re
import subprocess
import sys

import pytest
import yaml

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.config.continuation import compose_continuation
from apa_cli.config.from_run import compose_from_run
from apa_cli.errors import ConfigError

PAIRS = """\
from dataclasses import dataclass

from apa_cli.algorithms.base import Algorithm
from apa_cli.types import Loss, Needs

open("sprung", "w").close()


@dataclass(frozen=True)
class Pairs(Algorithm):
    beta: float

    def needs(self):
        return Needs(samples_per_prompt=4, least_samples=2, samples_multiple=2)

    def prepare(self, rollout, state):
        raise NotImplementedError

    def loss(self, batch, output):
        return Loss([])
"""
OPTION = "# @package _global_\nlambda: 0.5\n\nalgo:\n  _target_: {}\n  beta: ${{lambda}}\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with an algorithm in my-code/pairs.py and the folder of yamls `conf` that names it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my-code").mkdir()
    (tmp_path / "my-code" / "pairs.py").write_text(PAIRS)
    (tmp_path / "conf" / "algo").mkdir(parents=True)
    (tmp_path / "conf" / "algo" / "pairs.yaml").write_text(OPTION.format("my-code/pairs.py:Pairs"))
    return tmp_path


def build(*overrides):
    return build_config(compose(list(overrides), "conf"), "conf")


def refuse(*overrides):
    with pytest.raises(ConfigError) as caught:
        build(*overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_algorithm_in_a_file_is_built(folder):
    config = build("algo=pairs", "lambda=0.7")
    assert (type(config.algo).__name__, config.algo.label, config.algo.beta) == ("Pairs", "Pairs", 0.7)
    assert config.raw["algo"] == {"_target_": "my-code/pairs.py:Pairs", "beta": 0.7}


def test_an_algorithm_in_a_module_of_the_current_folder_is_built(folder):
    (folder / "own_pairs.py").write_text(PAIRS)
    (folder / "conf" / "algo" / "pairs.yaml").write_text(OPTION.format("own_pairs.Pairs"))
    assert build("algo=pairs").algo.beta == 0.5
    sys.modules.pop("own_pairs")


OTHERS = {
    "plan": "from apa_cli.algorithms.plans import Online as Base",
    "dataset": "from apa_cli.datasets.base import Dataset as Base",
    "reward": "from apa_cli.rewards.base import Reward as Base",
}
OTHER = """\
from dataclasses import dataclass
{}


@dataclass(frozen=True)
class Own(Base):
    number: int
    stop_strings: list[str]

    def load(self, argument):
        return []
"""


@pytest.mark.parametrize("group", OTHERS)
def test_the_other_sections_take_a_file_too(group, folder):
    (folder / "own.py").write_text(OTHER.format(OTHERS[group]))
    (folder / "conf" / group).mkdir()
    (folder / "conf" / group / "own.yaml").write_text("_target_: own.py:Own\nnumber: 3\nstop_strings: []\n")
    section = getattr(build(f"{group}=own", f"{group}.number=8"), group)
    assert type(section).__name__ == "Own" and section.number == 8
    assert refuse(f"{group}=own", f"{group}.number=x") == f"{group}.number: 'x' is not a whole number"
    assert refuse(f"{group}=own", "algo._target_=own.py:Own").startswith("algo._target_: own.py:Own is not a subclass")


FILE = r"my-code/pairs\.py"
FAULTS = {
    ("@dataclass(frozen=True)\n", ""): rf"_target_: {FILE}:Pairs is not a dataclass",
    ("def prepare(", "def prepared("): rf"_target_: {FILE}:Pairs lacks prepare",
    ("(Algorithm)", "()"): rf"_target_: {FILE}:Pairs is not a subclass of apa_cli\.algorithms\.base\.Algorithm",
    ("class Pairs", "class Other"): rf"_target_: {FILE} defines no Pairs",
    ("import Loss", "import Lossy"): rf"_target_: cannot import {FILE} \(ImportError: .*, pairs\.py, line 4\)",
    ("beta: float", "beta: float = (("): rf"_target_: cannot import {FILE} \(SyntaxError: .*pairs\.py, line 11\)\)",
    ("beta: float", "beta: 'Unknown'"): r"_target_: the type of a field is unusable \(name 'Unknown' is not defined\)",
    ("beta: float", "beta: complex"): r"_target_: the type of a field is unusable \(Unexpected type annotation.*\)",
    (
        "beta: float\n",
        "beta: float\n\n    def __post_init__(self):\n        raise ValueError('too large')\n",
    ): "too large",
}


@pytest.mark.parametrize(("old", "new"), FAULTS, ids=[old.strip() for old, _ in FAULTS])
def test_a_fault_of_the_users_class_is_one_line(old, new, folder):
    assert old in PAIRS
    (folder / "my-code" / "pairs.py").write_text(PAIRS.replace(old, new))
    assert re.fullmatch(rf"algo(\.|: ){FAULTS[old, new]}", message := refuse("algo=pairs")), message


def test_a_plan_needs_a_name(folder):
    (folder / "own.py").write_text(
        "from dataclasses import dataclass\nfrom apa_cli.algorithms.plans import Plan\n\n\n@dataclass\n"
        "class Own(Plan):\n    def rollout(self, step, rng, state):\n        return ()\n\n"
        "    def masks(self, rollout):\n        return {}\n"
    )
    assert refuse("plan._target_=own.py:Own") == "plan._target_: own.py:Own lacks name"


@pytest.mark.parametrize("value", ["null", "3", "[my-code/pairs.py:Pairs]"])
def test_a_target_is_a_text(value, folder):
    assert refuse(f"algo._target_={value}").startswith("algo._target_: FILE.py:Class or package.module.Class is needed")
    assert not (folder / "sprung").exists()


# --- commands and processes ---------------------------------------------------------------------------------


def test_the_command_needs_no_pythonpath(folder):
    code = "import sys; from apa_cli.cli.train import main; sys.argv[0] = 'apa-train'; main()"
    command = [sys.executable, "-P", "-c", code, "--config-dir", "conf", "algo=pairs", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and yaml.safe_load(done.stdout)["algo"]["beta"] == "${lambda}", done.stderr
    assert (folder / "sprung").exists()  # the class has been imported and checked
    (folder / "my-code" / "pairs.py").write_text("import nothing_there\n")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("apa-train: algo._target_: cannot import my-code/pairs.py (ModuleNotFoundError: ")


SPAWN = """
import multiprocessing
from apa_cli.config.build import build_config
from apa_cli.config.compose import compose

if __name__ == "__main__":
    config = build_config(compose(["algo=pairs"], "conf"), "conf")
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.apply(repr, (config,)))
"""


def test_a_spawned_process_gets_the_configuration(folder):
    (folder / "my-code" / "start.py").write_text(SPAWN)
    command = [sys.executable, "my-code/start.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "algo=Pairs(beta=0.5), plan=Online()" in done.stdout, done.stderr


# --- trust --------------------------------------------------------------------------------------------------


@pytest.fixture
def record(folder):
    """record(*overrides) → the directory of a run with the user's algorithm; the file has not been imported since."""

    def make(*overrides):
        run = folder / "recorded"
        run.mkdir()
        (run / "config.yaml").write_text(yaml.safe_dump(build("algo=pairs", *overrides).raw))
        (run / "environment.json").write_text('{"policy": "p", "reward": "r"}')
        (run / "metrics.jsonl").touch()
        (folder / "sprung").unlink()
        for name in [name for name in sys.modules if name.startswith("apa_cli.user_code.")]:
            del sys.modules[name]
        return run

    return make


def compose_recorded(start, run, *overrides, extra_dir=None):
    if start == "run":
        return compose_from_run([f"run={run}", *overrides], extra_dir)
    return compose_continuation([f"{start}={run}", *overrides], run, extra_dir)


@pytest.mark.parametrize("start", ["run", "resume", "fork"])
def test_a_file_that_only_a_runs_directory_names_is_not_imported(start, record, folder):
    run = record()
    with pytest.raises(ConfigError, match=r"^algo\._target_: .*; give the --config-dir of the run to import it$"):
        compose_recorded(start, run)
    (folder / "other" / "algo").mkdir(parents=True)
    (folder / "other" / "algo" / "pairs.yaml").write_text(OPTION.format("my"))  # only the beginning of the target
    (folder / "other" / "algo" / "more.yaml").write_text("# _target_: my-code/pairs.py:Pairs\n")
    with pytest.raises(ConfigError, match=r"^algo\._target_: "):
        compose_recorded(start, run, extra_dir="other")
    assert not (folder / "sprung").exists()


@pytest.mark.parametrize("start", ["run", "resume", "fork"])
def test_it_is_imported_if_the_users_yamls_name_it(start, record, folder):
    run = record("lambda=0.3")
    config = build_config(compose_recorded(start, run, extra_dir="conf"), "conf")
    assert config.algo.beta == 0.3 and config.run.samples_per_prompt == 4 and (folder / "sprung").exists()


def test_a_fork_to_another_algorithm_imports_nothing_of_the_runs(record, folder):
    config = build_config(compose_recorded("fork", record(), "algo=ppo"))
    assert type(config.algo).__name__ == "PPO" and config.run.samples_per_prompt == 4
    assert not (folder / "sprung").exists()
