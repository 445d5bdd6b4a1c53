"""Progress of a run, and the training state that its checkpoints hold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.models.forward import TrainingModel
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.training.guard import GuardState
from apa_cli.types import State

SFT_SCORE_SECTIONS = ("dataset", "reward", "sampling", "model")
"""Sections that the SFT model's held-out scores depend on, besides evaluation.seed."""


@dataclass
class Progress:
    """Everything that a checkpoint holds besides weights and optimizer. The field names are keys of state.json."""

    iteration: int = 0
    """Finished iterations."""
    samples: int = 0
    """Responses sampled so far."""
    algorithm: State = field(default_factory=dict)
    sft_scores: dict[str, list[float]] = field(default_factory=dict)
    """Scores of the SFT model on the held-out prompts, by reward, see `Evaluator.evaluate`; empty before the start."""
    measured_by: str | None = None
    """Digest of the settings that `sft_scores` depend on."""
    best_iteration: int | None = None
    best_reward: float | None = None
    """Highest eval/reward_mean so far, and the iteration that reached it."""
    kl: float = 0.0
    """kl/sequence of the last iteration, nats per response."""
    watch: dict[str, Any] = field(default_factory=lambda: asdict(GuardState()))
    """Fields of the guard's `GuardState`."""
    unrecorded: dict[str, float] | None = None
    """Metrics of the last iteration if they are not logged yet because a reward failed in its evaluation."""

    def update_best(self, reward: float) -> None:
        """Record `reward`, the score after the current iteration, if it is higher than the best so far."""
        if self.best_reward is None or reward > self.best_reward:
            self.best_reward, self.best_iteration = reward, self.iteration

    def forget_best(self) -> None:
        """Forget the best score, since scores on other prompts or by another reward are not comparable."""
        self.best_reward = self.best_iteration = None


def digest_sft_settings(raw: dict[str, Any]) -> str:
    """Return a digest of the settings that the SFT model's held-out scores depend on."""
    settings = {"seed": raw["evaluation"]["seed"]} | {key: raw[key] for key in SFT_SCORE_SECTIONS}
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def collect_state(
    progress: Progress,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    moving_reference: PreTrainedModel | None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return a checkpoint's tensors by file and name, and its plain values.

    Sharded tensors are gathered, so every rank must call this.
    """
    tensors = {
        "policy": checkpoints.gather_module_tensors(model.policy, trained_only=True),
        "critics": checkpoints.gather_module_tensors(model.critics, trained_only=True),
        "optimizer": checkpoints.gather_optimizer_tensors(optimizer),
    }
    if moving_reference is not None:
        tensors["moving_reference"] = checkpoints.gather_module_tensors(moving_reference)
    values = dict(vars(progress))
    algorithm = values.pop("algorithm")
    values["algorithm"] = {name: value for name, value in algorithm.items() if not isinstance(value, Tensor)}
    tensors["algorithm"] = {name: value for name, value in algorithm.items() if isinstance(value, Tensor)}
    return tensors, values


def restore_state(
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    initial: State,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    moving_reference: PreTrainedModel | None,
) -> Progress:
    """Load what `collect_state` returned into the models and the optimizer, and return the progress.

    `initial` supplies entries of the algorithm's state that the checkpoint lacks: a fork may change the algorithm.
    """
    checkpoints.load_module(model.policy, tensors["policy"], trained_only=True)
    checkpoints.load_module(model.critics, tensors["critics"], trained_only=True)
    checkpoints.load_optimizer(optimizer, tensors["optimizer"])
    if moving_reference is not None and "moving_reference" in tensors:  # a fork's reference may not have moved yet
        checkpoints.load_module(moving_reference, tensors["moving_reference"])
    algorithm = {**initial, **values["algorithm"], **tensors["algorithm"]}
    return Progress(**{**values, "algorithm": algorithm})
