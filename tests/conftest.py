"""A tiny model made once for all tests, and training runs inside this process."""

import gc
import json
import sys
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
"""The words of a small run, without the model and the reward's file. Story openings are made faster than the
embedded dialogues."""

REWARD = '''\
"""A deterministic reward: the share of vowels, less a little for every character."""


def vowels(prompts, responses):
    return [sum(map(text.lower().count, "aeiou")) / (len(text) + 1) - 0.002 * len(text) for text in responses]
'''


def overriding(words: list[str]) -> list[str]:
    """The words, of each key only the last; `~key` takes back an earlier word for that key."""
    last = {word.lstrip("+~").split("=")[0]: word for word in words}
    return [word for word in last.values() if not word.startswith("~")]


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
    gc.freeze()  # what is imported by now is not searched again by the collection at each run's end
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
def small_words(tiny, tmp_path_factory) -> list[str]:
    """The words of a small run on the tiny model with a deterministic reward function."""
    file = tmp_path_factory.mktemp("rewards") / "vowels.py"
    file.write_text(REWARD)
    return [*SMALL, f"model.path={tiny}", f"reward.target={file}:vowels"]


@pytest.fixture(scope="session")
def configured(small_words):
    """configured(*words) → the checked Config of a small run with these words on top."""
    from apa_cli.config.build import build
    from apa_cli.config.compose import compose

    def make(*words: str):
        return build(compose(overriding([*small_words, *words])))

    return make


@pytest.fixture(scope="session")
def make_trainer(configured, tmp_path_factory):
    """make_trainer(*words, folder=) → the trainer of a small run before its first iteration; it prints nothing."""
    from apa_cli.runs.console import Console
    from apa_cli.training.build import build_trainer

    def make(*words: str, folder: Path | None = None):
        config = configured(*words)
        with Console(None, 1, quiet=True) as console:
            trainer = build_trainer(config, folder or tmp_path_factory.mktemp("trainer"), None, None, console)
        trainer.progress.algorithm = config.algo.initial_state()
        return trainer

    return make


@pytest.fixture(scope="session")
def train(configured):
    """train(directory, *words, curves=False) → the directory of a small run, done in this process.

    Drawing takes longer than all the rest, so there is no curves.png unless `curves` is true.
    """
    from apa_cli.training.launch import start_training

    def run(directory: Path, *words: str, curves: bool = False) -> Path:
        config = configured(f"name={directory.name}", *words)
        with pytest.MonkeyPatch.context() as patch:
            if not curves:
                patch.setattr("apa_cli.training.results.plot_curves", lambda directory: None, raising=False)
            start_training(config, directory, None)
        return directory

    return run


@pytest.fixture
def run_train(train, tmp_path):
    """run_train(*words, name=, curves=) → the directory of a small run in the test's own folder."""

    def run(*words: str, name: str = "run", curves: bool = False) -> Path:
        return train(tmp_path / name, *words, curves=curves)

    return run


@pytest.fixture(scope="session")
def records():
    """records(file.jsonl) → its objects."""
    return lambda file: [json.loads(line) for line in Path(file).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def comparable(records):
    """comparable(metrics.jsonl) → its objects without what the clock and the machine decide."""
    machine = ("time/", "throughput/", "memory/")

    def read(file: Path) -> list[dict]:
        return [{name: value for name, value in row.items() if not name.startswith(machine)} for row in records(file)]

    return read


@pytest.fixture(autouse=True)
def pytorchs_own_products():
    """No test goes on with the products that another one chose."""
    yield
    if "apa_cli.hardware.cpu_matmul" in sys.modules:
        from apa_cli.hardware import cpu_matmul as matmul
        from apa_cli.settings import MatmulLibrary

        matmul.select_matmul(MatmulLibrary.torch)
