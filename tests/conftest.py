"""Fixtures of the session: a tiny model, the configuration of a small run, and training runs inside this process."""

import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

SMALL = (
    "model=local",
    "dataset=story_openings",
    "reward=function",
    "dataset.train_prompts=60",
    "dataset.test_prompts=10",
    "iterations=3",
    "optimizer.lr=3e-4",
    "optimizer.critic_lr=1e-3",
    "optimizer.lr_scheduler=constant",
    "rollout_batch_size=8",
    "minibatch_size=4",
    "microbatch_size=4",
    "sampling.max_prompt_tokens=100",
    "sampling.max_new_tokens=12",
    "sampling.microbatch_size=8",
    "evaluation.prompts=6",
    "evaluation.print_samples=1",
    "checkpoint.every=1",
    "launch.device=cpu",
    "launch.threads=1",
)
"""Overrides of a small run, without the model and the file of the reward. Story openings are generated faster than
embedded dialogues."""

REWARD = '''\
"""A deterministic reward: the share of vowels, less a little for every character."""


def vowels(prompts, responses):
    return [sum(map(text.lower().count, "aeiou")) / (len(text) + 1) - 0.002 * len(text) for text in responses]
'''


def keep_last_overrides(overrides: list[str]) -> list[str]:
    """Return the last override of each key; `~key` removes an earlier override of that key."""
    last = {override.lstrip("+~").split("=")[0]: override for override in overrides}
    return [override for override in last.values() if not override.startswith("~")]


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real models and tokenizers beside the repository."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("no folder `shared` with real models beside the repository")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """The folder of a tiny model and its tokenizer, see `save_dialogue_model`."""
    from tests.builders import save_dialogue_model

    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_dialogue_model(folder)
    gc.collect()
    gc.freeze()  # the collection at each run's end then skips all modules imported so far
    return folder


@pytest.fixture(scope="session")
def make_classifier(tiny, tmp_path_factory):
    """make_classifier(seed, **configuration) → the folder of a GPT-NeoX classifier with the tiny model's tokenizer."""
    from tests.builders import save_classifier

    def make(seed: int = 0, **changes) -> Path:
        folder = tmp_path_factory.mktemp("classifier")
        save_classifier(folder, tiny, seed, **changes)
        return folder

    return make


@pytest.fixture(scope="session")
def small_overrides(tiny, tmp_path_factory) -> list[str]:
    """Overrides of a small run on the tiny model with a deterministic reward function."""
    file = tmp_path_factory.mktemp("rewards") / "vowels.py"
    file.write_text(REWARD)
    return [*SMALL, f"model.path={tiny}", f"reward.target={file}:vowels"]


@pytest.fixture(scope="session")
def make_config(small_overrides):
    """make_config(*overrides) → the checked Config of a small run with these further overrides."""
    from apa_cli.config.build import build_config
    from apa_cli.config.compose import compose

    def make(*overrides: str):
        return build_config(compose(keep_last_overrides([*small_overrides, *overrides])))

    return make


@pytest.fixture(scope="session")
def make_trainer(make_config, tmp_path_factory):
    """make_trainer(*overrides, folder=, **parts) → the trainer of a small run before its first iteration.

    It prints nothing. `parts` replace fields of the Config, such as `plan`.
    """
    from apa_cli.runs.console import Console
    from apa_cli.training.build import build_trainer

    def make(*overrides: str, folder: Path | None = None, **parts):
        config = replace(make_config(*overrides), **parts)
        with Console(None, 1, quiet=True) as console:
            trainer = build_trainer(config, folder or tmp_path_factory.mktemp("trainer"), None, None, console)
        trainer.set_progress(replace(trainer.progress, algorithm=config.algo.initial_state()))
        return trainer

    return make


@pytest.fixture(scope="session")
def train(make_config):
    """train(directory, *overrides, curves=False) → the directory of a small run in this process.

    Plotting takes longer than all the rest, so there is no curves.png unless `curves` is true.
    """
    from apa_cli.training.launch import start_training

    def run(directory: Path, *overrides: str, curves: bool = False) -> Path:
        config = make_config(f"name={directory.name}", *overrides)
        with pytest.MonkeyPatch.context() as patch:
            if not curves:
                patch.setattr("apa_cli.training.results.plot_curves", lambda directory: None, raising=False)
            start_training(config, directory, None)
        return directory

    return run


@pytest.fixture
def run_train(train, tmp_path):
    """run_train(*overrides, name=, curves=) → the directory of a small run in the test's own folder."""

    def run(*overrides: str, name: str = "run", curves: bool = False) -> Path:
        return train(tmp_path / name, *overrides, curves=curves)

    return run


@pytest.fixture(scope="session")
def records():
    """records(file.jsonl) → its objects."""
    return lambda file: [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def comparable(records):
    """comparable(metrics.jsonl) → its objects without the metrics that depend on the clock and the machine."""
    machine = ("time/", "throughput/", "memory/")

    def read(file: Path) -> list[dict]:
        return [{name: value for name, value in row.items() if not name.startswith(machine)} for row in records(file)]

    return read


@pytest.fixture(autouse=True)
def reset_matmul_library():
    """Compute matrix products by PyTorch again after a test that selected another library."""
    yield
    if "apa_cli.hardware.cpu_matmul" in sys.modules:
        from apa_cli.hardware import cpu_matmul as matmul
        from apa_cli.settings import MatmulLibrary

        matmul.select_matmul(MatmulLibrary.torch)
