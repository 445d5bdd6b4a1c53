"""Fixtures of the throw-away algorithms: configurations with their yamls, trainers, runs, and logged data."""

import json
from collections.abc import Callable
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
def write_logged_data(tmp_path_factory):
    """write_logged_data(has_score) → overrides of a data set of 30 prompts with two logged responses each.

    The rows for which `has_score(number)` is true have a score, −4 to 4. Each has a chosen response, the logged one,
    and, except for every fourth, a rejected one. Responses have one to nine words.
    """
    from apa_cli.datasets.story_openings import StoryOpenings

    def choose_words(first: int, step: int, count: int) -> str:
        return "".join(f" {WORDS[(first + step * i) % len(WORDS)]}" for i in range(count))

    def write(has_score: Callable[[int], bool]) -> list[str]:
        folder = tmp_path_factory.mktemp("logged")
        for split in ("train", "test"):
            prompts = [example.prompt for example in StoryOpenings(30, 6, 0, []).load(split)]
            rows = []
            for number, prompt in enumerate(prompts + prompts):
                response = choose_words(7 * number, 1, 1 + number % 9)
                row = {"prompt": prompt, "response": response, "chosen": response}
                row |= {"score": float(number % 9 - 4)} if has_score(number) else {}
                row |= {"rejected": choose_words(number, 5, 2 + number % 4)} if number % 4 else {}
                rows.append(row)
            (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return ["dataset=jsonl", f"dataset.path={folder}", "~dataset.train_prompts", "~dataset.test_prompts"]

    return write


@pytest.fixture(scope="session")
def logged_data(write_logged_data) -> list[str]:
    """Overrides of a data set whose logged responses all have scores; see `write_logged_data`."""
    return write_logged_data(lambda number: True)


@pytest.fixture(scope="session")
def half_scored_data(write_logged_data) -> list[str]:
    """Overrides of a data set in which every second logged response has a score; see `write_logged_data`."""
    return write_logged_data(lambda number: number % 2 == 0)
