"""Fixtures of the throw-away algorithms: their yamls, logged data, and runs in one and in two processes."""

import json
from pathlib import Path

import pytest

from tests.conftest import keep_last_overrides

CONF = str(Path(__file__).parent / "conf")
WORDS = ["a", "we", "sky", "moon", "oaken", "queue", "tree", "try", "rhythm", "idea", "so", "you"]


@pytest.fixture(scope="session")
def make_contract_config(small_overrides):
    """make_contract_config(*overrides) → the checked Config of a small run, with the yamls of this folder."""
    from apa_cli.config.build import build_config
    from apa_cli.config.compose import compose

    def make(*overrides: str):
        return build_config(compose(keep_last_overrides([*small_overrides, *overrides]), CONF), CONF)

    return make


@pytest.fixture(scope="session")
def make_contract_trainer(make_contract_config, tmp_path_factory):
    """make_contract_trainer(*overrides) → the trainer of a small run before its first iteration; it prints nothing."""
    from apa_cli.runs.console import Console
    from apa_cli.training.build import build_trainer

    def make(*overrides: str):
        config = make_contract_config(*overrides)
        with Console(None, 1, quiet=True) as console:
            trainer = build_trainer(config, tmp_path_factory.mktemp("trainer"), None, None, console)
        trainer.progress.algorithm = config.algo.initial_state()
        return trainer

    return make


@pytest.fixture(scope="session")
def train_contract(make_contract_config):
    """train_contract(directory, *overrides) → the directory of a small run in this process, without curves.png."""
    from apa_cli.training.launch import start_training

    def run(directory: Path, *overrides: str) -> Path:
        config = make_contract_config(f"name={directory.name}", *overrides)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("apa_cli.training.results.plot_curves", lambda directory: None)
            start_training(config, directory, None)
        return directory

    return run


@pytest.fixture(scope="session")
def train_on_ranks(make_contract_config):
    """train_on_ranks(directory, processes, *overrides) → the directory of a small run; see `train_and_compare`."""
    from apa_cli.distributed.spawn import spawn_processes
    from apa_cli.distributed.world import SINGLE_PROCESS
    from tests.contract.ranks import train_and_compare

    def run(directory: Path, processes: int, *overrides: str) -> Path:
        config = make_contract_config("launch.timeout=60", *overrides)
        if processes == 1:
            train_and_compare(SINGLE_PROCESS, config, directory)
        else:
            spawn_processes(config.launch, processes, train_and_compare, config, directory)
        return directory

    return run


@pytest.fixture(scope="session")
def logged_data(tmp_path_factory) -> list[str]:
    """Overrides of 30 story openings with a logged response, its score, and a pair of responses, two rows a prompt.

    Responses have one to nine words of different numbers of vowels; a score is the number of words less 5.
    """
    from apa_cli.datasets.story_openings import StoryOpenings

    folder = tmp_path_factory.mktemp("logged")
    for split, count in (("train", 30), ("test", 6)):
        rows = []
        for number, example in enumerate(StoryOpenings(30, 6, 0, []).load(split)[:count]):
            for shift in (0, 5):
                texts = [
                    " " + " ".join(WORDS[(number * 7 + shift + k * i) % len(WORDS)] for i in range(length))
                    for k, length in ((1, 1 + (number + shift) % 9), (5, 2 + number % 4))
                ]
                score = float((number + shift) % 9 - 4)
                rows.append({"prompt": example.prompt, "response": texts[0], "score": score, "chosen": texts[0],
                             "rejected": texts[1]})  # fmt: skip
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["dataset=jsonl", f"dataset.path={folder}", "~dataset.train_prompts", "~dataset.test_prompts"]
