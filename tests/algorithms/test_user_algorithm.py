"""A pairwise algorithm of a user's own, from files outside the package: IPO (2310.12036), on the bare contract."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.types import PolicyOutput
from apa_cli.user_code import import_object
from tests.builders import make_mask, make_rollout

ALGORITHM = '''\
"""Identity Preference Optimization (2310.12036)."""

from dataclasses import dataclass
from typing import Annotated

from apa_cli.algorithms.base import Algorithm
from apa_cli.algorithms.pairs import PAIR_MASK, fold_pairs, log_ratio_difference
from apa_cli.types import Batch, Loss, LossTerm, Metric, Needs, Positive


@dataclass(frozen=True)
class IPO(Algorithm):
    """Squared error between the log-ratio difference of better and worse response and 1 / 2τ."""

    color = "#0f766e"
    lambda_meaning = "pull to the reference"

    tau: Annotated[float, Positive]

    def needs(self):
        passes = {"response": ("reference",), "worse": ("reference",)}
        return Needs(passes=passes, samples_per_prompt=2, least_samples=2, samples_multiple=2)

    def process_rollout(self, rollout, state, rng, encode):
        return fold_pairs(rollout, "worse", better_first=True), state

    def prepare(self, rollout, state):
        return Batch.from_rollout(rollout), state

    def loss(self, batch, output):
        difference = log_ratio_difference(batch, output, "worse", "reference")
        metrics = {"ipo/difference": Metric(difference.detach(), PAIR_MASK)}
        return Loss([LossTerm("policy", (difference - 1 / (2 * self.tau)) ** 2, PAIR_MASK, 1.0)], metrics)
'''
YAML = """\
# @package _global_
# Identity Preference Optimization (2310.12036).
defaults:
  - _self_

# λ: τ, the pull to the reference.
lambda: 0.5

algo:
  _target_: my_pairwise.py:IPO
  # τ, set by `lambda`.
  tau: ${lambda}
"""


@pytest.fixture
def project(tmp_path) -> Path:
    """A folder with the user's module and yaml."""
    (tmp_path / "my_pairwise.py").write_text(ALGORITHM)
    (tmp_path / "my_conf" / "algo").mkdir(parents=True)
    (tmp_path / "my_conf" / "algo" / "ipo.yaml").write_text(YAML)
    return tmp_path


def run_apa_train(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    """Run the installed command with the user's algorithm in the folder."""
    command = [Path(sys.executable).parent / "apa-train", "--config-dir", "my_conf", "algo=ipo", *overrides]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_loss_by_hand(project, monkeypatch):
    monkeypatch.chdir(project)
    algorithm = build_config(compose(["algo=ipo", "lambda=0.25"], str(project / "my_conf"))).algo
    mask, groups = make_mask([2, 1, 1, 1]), torch.tensor([0, 0, 1, 1])
    reference = torch.tensor([[-1.0, -1.0], [-2.0, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
    scores = torch.tensor([0.0, 1.0, 2.0, 2.0])
    rollout = make_rollout(mask, scores=scores, groups=groups, logprobs={"reference": reference})
    pairs, _ = algorithm.process_rollout(rollout, {}, np.random.default_rng(0), None)
    batch, _ = algorithm.prepare(pairs, {})
    # the second response is the better: (−1.5 + 2) − (0.75 + 0.5) = −0.75, less 1/(2 · 0.25) = 2; the tie is masked
    worse = PolicyOutput(torch.tensor([[-0.25, -0.5], [-1.0, 0.0]]), {})
    output = PolicyOutput(torch.tensor([[-1.5, 0.0], [-1.0, 0.0]]), {}, related={"worse": worse})
    (term,) = algorithm.loss(batch, output).terms
    assert term.values.tolist() == [2.75**2, 4.0]
    assert batch.masks["pair"].tolist() == [True, False]


def test_the_command_checks_the_users_fields(project):
    done = run_apa_train(project, "lambda=0", "iterations=2")
    assert (done.returncode, done.stderr) == (2, "apa-train: lambda: 0.0 must be greater than 0\n")
    done = run_apa_train(project, "samples_per_prompt=3", "rollout_batch_size=6", "minibatch_size=6")
    assert done.returncode == 2 and done.stderr.startswith("apa-train: samples_per_prompt: ")


@pytest.mark.slow
def test_the_command_trains_it(project, small_overrides, records):
    overrides = [each for each in small_overrides if "critic" not in each]  # IPO has no critic
    done = run_apa_train(project, *overrides, "name=ipo", "iterations=2", "samples_per_prompt=4")
    assert done.returncode == 0, done.stderr
    folder = project / "outputs" / "ipo"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["algorithm"] == {
        "label": "IPO", "color": "#0f766e", "lambda_meaning": "pull to the reference"
    }  # fmt: skip
    rows = records(folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    # before the first update every log-ratio is 0 and the loss 1/(2 · 0.5)² = 1; later it is not
    assert all(row["loss/policy"] != 1 and row["ipo/difference"] != 0 for row in rows[1:])
    assert not any(name.startswith("value/") for row in rows for name in row)  # there is no critic


def test_the_pairwise_example_of_the_manual_by_hand(tmp_path, monkeypatch):
    """Two pairs with β = 0.5: margins 0.5 · ((−1 + 2) − (−3 + 1)) = 1.5 and 0.5 · ((−2 + 2) − (−1 + 2)) = −0.5."""
    page = (Path(__file__).resolve().parents[2] / "apa_cli/pages/extending.md").read_text(encoding="utf-8")
    (tmp_path / "my_slic.py").write_text(page.partition("# my_slic.py\n")[2].partition("```")[0])
    monkeypatch.chdir(tmp_path)
    slic = import_object("my_slic.py:SLiC")(beta=0.5)
    mask = torch.ones(4, 1, dtype=torch.bool)
    reference = torch.tensor([[-1.0], [-2.0], [-2.0], [-2.0]])  # of samples 0, 1 to prompt 0 and 2, 3 to prompt 1
    rollout = make_rollout(
        mask, scores=torch.tensor([0.0, 1.0, 3.0, 2.0]), groups=torch.tensor([0, 0, 1, 1]),
        logprobs={"reference": reference},
    )  # fmt: skip
    rollout, state = slic.process_rollout(rollout, {}, None, None)
    batch, _ = slic.prepare(rollout, state)
    better, worse = torch.tensor([[-1.0], [-2.0]]), torch.tensor([[-3.0], [-1.0]])  # sample 1 is the better of prompt 0
    output = PolicyOutput(better, {}, related={"second": PolicyOutput(worse, {})})
    loss = slic.loss(batch, output)
    assert loss.metrics["slic/margin"].values.tolist() == [1.5, -0.5]
    assert loss.terms[0].values.tolist() == [0.0, 1.5] and loss.terms[0].mask == "pair"
