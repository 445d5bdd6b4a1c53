"""Whole runs of every algorithm of conf/algo: repeatable, resumable after SIGKILL, independent of how they are split.

The model has a vocabulary of eleven words. With so few, a random number is hardly ever within rounding of the boundary
between two tokens, so that runs which round in another way sample the same responses.
"""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from apa_cli.config.hydra_api import list_groups
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.training.updater import Updater
from tests.builders import build_tiny_policy, build_word_tokenizer

ALGORITHMS = sorted(list_groups(None)["algo"])
OVERRIDES = {"ppo": ["algo.kl_controller=adaptive", "algo.kl_horizon=16"]}
"""Algorithm → settings with which more of its state changes."""

REWARD = """
def share_of_e(prompts, responses):
    return [response.split().count("e") / 8 + 0.01 * len(response) for response in responses]


def count_e(prompts, responses):
    return [float(response.split().count("e")) for response in responses]
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def small_overrides(tmp_path_factory) -> list[str]:
    """Overrides of a small run on a model of eleven words; the prompts of iteration 2 come up again from 3 on."""
    from apa_cli.models.loading import save_model

    folder = tmp_path_factory.mktemp("words")
    save_model(build_tiny_policy(), build_word_tokenizer(), folder / "model")
    rng = np.random.default_rng(0)
    prompts = {" ".join(rng.choice(list("bcdefghij"), rng.integers(1, 7))) for _ in range(20)}
    (folder / "prompts.txt").write_text("\n".join(sorted(prompts)))
    (folder / "rewards.py").write_text(REWARD)
    return [
        "model=local", f"model.path={folder}/model", "dataset=prompts", f"dataset.path={folder}/prompts.txt",
        "dataset.held_out_every=3", "reward=function", f"reward.target={folder}/rewards.py:share_of_e",
        "iterations=4", "rollout_batch_size=8", "minibatch_size=4", "microbatch_size=4", "optimizer.lr=1e-3",
        "optimizer.critic_lr=1e-3", "sampling.max_prompt_tokens=8", "sampling.max_new_tokens=8",
        "sampling.microbatch_size=8", "evaluation.every=2", "evaluation.prompts=6", "evaluation.print_samples=0",
        "checkpoint.every=1", "checkpoint.keep_last=4", "launch.device=cpu", "launch.threads=1",
    ]  # fmt: skip
