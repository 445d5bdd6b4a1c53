"""Whole runs of every algorithm of conf/algo: repeatable, resumable after SIGKILL, independent of how work is split.

The model has a vocabulary of eleven words. With so few, a random number is hardly ever within rounding of the boundary
between two tokens, so that runs that round in another way sample the same responses.
"""

import multiprocessing
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from apa_cli.config.hydra_api import list_groups
from apa_cli.models.loading import save_model
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.training.updater import Updater
from tests.builders import build_tiny_policy, build_word_tokenizer
from tests.forks import kill_at_call

ALGORITHMS = sorted(list_groups(None)["algo"])
OVERRIDES = {"ppo": ["algo.kl_controller=adaptive", "algo.kl_horizon=16"]}
"""Algorithm → settings with which more of its state changes."""
LORA = ["lora=default", "lora.rank=2", "optimizer.lr=3e-3", "optimizer.critic_lr=3e-3"]

REWARDS = """
def favor_e(prompts, responses):
    return [response.split().count("e") / 8 + 0.01 * len(response) for response in responses]


def count_e(prompts, responses):
    return [float(response.split().count("e")) for response in responses]
"""

pytestmark = pytest.mark.slow
each_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """Overrides of a small run on the model of eleven words.

    Of 13 prompts or so, eight per iteration with one response each, some come up again in iteration 2, and new ones do.
    """
    folder = tmp_path_factory.mktemp("words")
    save_model(build_tiny_policy(), build_word_tokenizer(), folder / "model")
    rng = np.random.default_rng(0)
    prompts = {" ".join(rng.choice(list("bcdefghij"), rng.integers(1, 7))) for _ in range(20)}
    (folder / "prompts.txt").write_text("\n".join(sorted(prompts)))
    (folder / "rewards.py").write_text(REWARDS)
    return [
        "model.path=" + str(folder / "model"), "dataset=prompts", f"dataset.path={folder}/prompts.txt",
        "dataset.held_out_every=3", "~dataset.train_prompts", "~dataset.test_prompts",
        f"reward.target={folder}/rewards.py:favor_e", "iterations=4", "optimizer.lr=1e-3",
        "sampling.max_prompt_tokens=8", "sampling.max_new_tokens=8", "evaluation.every=2", "checkpoint.keep_last=4",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def run_algorithm(train, words):
    """run_algorithm(name, directory, *overrides) → the directory of that algorithm's small run."""

    def run(name: str, directory: Path, *overrides: str) -> Path:
        return train(directory, *words, f"algo={name}", *OVERRIDES.get(name, []), *overrides)

    return run


@pytest.fixture(scope="module")
def uninterrupted(run_algorithm, tmp_path_factory):
    """uninterrupted(name, *overrides) → the directory of a run of four iterations, trained once."""
    runs = {}

    def make(*arguments: str) -> Path:
        if arguments not in runs:
            name, *overrides = arguments
            runs[arguments] = run_algorithm(name, tmp_path_factory.mktemp(name) / "run", *overrides)
        return runs[arguments]

    return make


@pytest.fixture(scope="module")
def assert_same_bits(comparable, records):
    """assert_same_bits(run, whole): the same records, states, weights and pools to the bit."""

    def check(run: Path, whole: Path) -> None:
        assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
        assert records(run / "samples.jsonl") == records(whole / "samples.jsonl")
        names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, whole)]
        assert names[0] == names[1]
        tensors, state = checkpoints.load_checkpoint(run / "checkpoints" / names[0][-1])
        expected_tensors, expected_state = checkpoints.load_checkpoint(whole / "checkpoints" / names[0][-1])
        assert state == expected_state and tensors.keys() == expected_tensors.keys()
        for group, expected in expected_tensors.items():
            assert tensors[group].keys() == expected.keys()
            assert not [name for name, tensor in tensors[group].items() if not torch.equal(tensor, expected[name])]
        assert read_files(run / "pools") == read_files(whole / "pools")
        assert read_files(run / "model") == read_files(whole / "model")

    return check


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder by name; none if there is no such folder."""
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


@pytest.fixture(scope="module")
def assert_same_numbers(comparable, records):
    """assert_same_numbers(run, whole): iterations 0 to 2 have equal texts, and metrics equal up to rounding.

    1e-4 relative or 1e-6 absolute; of a KL per response, a sum of eight differences that are each rounded, 8e-6.
    """

    def check(run: Path, whole: Path) -> None:
        rows, expected_rows = comparable(run / "metrics.jsonl"), comparable(whole / "metrics.jsonl")
        assert [row["iteration"] for row in rows] == [0, 1, 2]
        for row, expected in zip(rows, expected_rows[:3], strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                if name == "dpo/accuracy" and row["iteration"] == 1:
                    continue  # the margins of the first step are rounding alone, whose sign it counts
                absolute = 8e-6 if name in ("kl/sequence", "eval/kl_exact") else 1e-6
                assert row[name] == pytest.approx(value, rel=1e-4, abs=absolute), (row["iteration"], name)
        texts = [[row for row in records(folder / "samples.jsonl") if row["iteration"] <= 2] for folder in (run, whole)]
        assert texts[0] and [row["response"] for row in texts[0]] == [row["response"] for row in texts[1]]

    return check


# --- the same numbers ---------------------------------------------------------------------------------------


@each_algorithm
def test_same_seed_gives_the_same_bits(name, uninterrupted, run_algorithm, assert_same_bits, tmp_path):
    assert_same_bits(run_algorithm(name, tmp_path / "run"), uninterrupted(name))


@each_algorithm
def test_microbatches_change_no_number(name, uninterrupted, run_algorithm, assert_same_numbers, tmp_path):
    split = ["microbatch_size=1", "sampling.microbatch_size=3", "iterations=2"]
    assert_same_numbers(run_algorithm(name, tmp_path / "run", *split), uninterrupted(name))


@each_algorithm
def test_two_processes_give_the_numbers_of_one(name, uninterrupted, run_algorithm, assert_same_numbers, tmp_path):
    """With minibatches of two responses, a pair leaves the second process without a row."""
    sizes = ["minibatch_size=2", "microbatch_size=2"]
    run = run_algorithm(name, tmp_path / "run", *sizes, "launch.processes=2", "iterations=2")
    assert (run / "logs" / "rank_1.log").is_file()
    assert_same_numbers(run, uninterrupted(name, *sizes))


# --- kills and resumes --------------------------------------------------------------------------------------


MOMENTS = {"update": (Updater, "step_optimizer", 6), "save": (checkpoints, "save_checkpoint", 2)}
"""Moments in iteration 2 of a run with four optimizer steps per iteration and a checkpoint after each."""


@pytest.mark.parametrize("moment", MOMENTS)
@each_algorithm
def test_killed_run_resumes_to_the_same_bits(name, moment, uninterrupted, run_algorithm, assert_same_bits, tmp_path):
    run = tmp_path / "run"

    def train_until_killed() -> None:
        kill_at_call(*MOMENTS[moment], after=False)
        run_algorithm(name, run)

    child = multiprocessing.get_context("fork").Process(target=train_until_killed)
    child.start()
    child.join(120)
    assert child.exitcode == -signal.SIGKILL
    assert [path.name for path in checkpoints.list_checkpoints(run / "checkpoints")] == ["iteration_000001"]
    run_algorithm(name, run, "resume=auto")
    assert_same_bits(run, uninterrupted(name))


@each_algorithm
def test_run_with_lora_resumes_to_the_same_bits(name, uninterrupted, run_algorithm, assert_same_bits, tmp_path):
    run = run_algorithm(name, tmp_path / "run", *LORA, "iterations=2")
    run_algorithm(name, run, *LORA, "resume=auto")
    assert_same_bits(run, uninterrupted(name, *LORA))


# --- learning -----------------------------------------------------------------------------------------------


@each_algorithm
def test_score_rises(name, run_algorithm, words, records, tmp_path):
    reward = next(word for word in words if word.startswith("reward.target=")).replace("favor_e", "count_e")
    run = run_algorithm(
        name, tmp_path / "run", reward, "iterations=6", "rollout_batch_size=64", "minibatch_size=16",
        "microbatch_size=16", "sampling.microbatch_size=64", "optimizer.lr=1e-2", "optimizer.critic_lr=1e-2",
        "evaluation.every=0", "checkpoint.every=0",
    )  # fmt: skip
    scores = [row["reward/mean"] for row in records(run / "metrics.jsonl")[1:]]
    # About 0.5 of up to eight tokens is e at the start; 4 and more are at the end.
    assert scores[-1] > scores[0] + 2.5
