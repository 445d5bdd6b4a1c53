"""Progress of a run, and the training state that its checkpoints hold."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel
from apa_cli.pool import Pool
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.files import POOLS
from apa_cli.tensor_ops import is_rounding
from apa_cli.training.guard import GuardState
from apa_cli.training.responses_per_prompt import ROW_KEYS
from apa_cli.types import State

KEPT = "kept"
"""Name of the pool `Progress.kept`, which no pool in an algorithm's state may have."""

SFT_SCORE_SECTIONS = ("dataset", "reward", "sampling", "model")
"""Sections that the SFT model's held-out scores depend on, besides evaluation.seed."""


@dataclass
class Progress:
    """Everything that a checkpoint holds besides weights and optimizer. The field names are keys of state.json."""

    iteration: int = 0
    """Finished iterations."""
    samples: int = 0
    """Responses sampled so far."""
    optimizer_steps: int = 0
    """Optimizer steps so far."""
    algorithm: State = field(default_factory=dict)
    kept: Pool = field(default_factory=Pool)
    """Rows of the rollout plans whose rows are sampled once per prompt."""
    sft_scores: dict[str, list[float]] = field(default_factory=dict)
    """Scores of the SFT model on the held-out prompts, by reward, see `Evaluator.evaluate`; empty before the start."""
    sft_responses: list[str] = field(default_factory=list)
    """The SFT model's responses that `sft_scores` score; empty in checkpoints of earlier versions."""
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
        """Record `reward`, the score after the current iteration, if it is higher, beyond rounding, than the best."""
        best = self.best_reward
        if best is None or (reward > best and not is_rounding(reward - best, best)):
            self.best_reward, self.best_iteration = reward, self.iteration

    def forget_best(self) -> None:
        """Forget the best score, since scores on other prompts or by another reward are not comparable."""
        self.best_reward = self.best_iteration = None


def digest_sft_settings(raw: dict[str, Any]) -> str:
    """Return a digest of the settings that the SFT model's held-out scores depend on."""
    return digest({"seed": raw["evaluation"]["seed"]} | {key: raw[key] for key in SFT_SCORE_SECTIONS})


def digest_kept_settings(raw: dict[str, Any], inputs: dict[str, str]) -> str:
    """Return a digest of the settings that the kept responses to training prompts and their scores depend on.

    `inputs` are the digests of the run's inputs, of which the relevant ones count too.
    """
    sections = (*SFT_SCORE_SECTIONS, "seed", "penalty", "plan", "guide")
    chosen = {key: value for key, value in inputs.items() if key.partition(".")[0] in sections}
    return digest({key: raw[key] for key in sections} | {"inputs": chosen})


def select_sft_inputs(inputs: dict[str, str]) -> dict[str, str]:
    """Return the digests of the inputs that the SFT model's held-out scores depend on."""
    sections = (*SFT_SCORE_SECTIONS, "evaluation")
    return {key: value for key, value in inputs.items() if key.partition(".")[0] in sections}


def digest(settings: dict[str, Any]) -> str:
    """Return the SHA-256 of settings, in hexadecimal."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def check_state(state: State) -> None:
    """Raise ValueError, naming the entry's path, if a checkpoint cannot hold an algorithm's state."""
    _, _, pools = checkpoints.split_state(state)
    if KEPT in pools:
        raise ValueError(f"state {KEPT}: the trainer has a pool of this name; give the algorithm's pool another key")


def save_pools(progress: Progress, folder: Path) -> None:
    """Bring the files of the run's pools up to date; rank 0 calls this before it writes a checkpoint.

    Raise UserError if a file cannot be written.
    """
    _, _, pools = checkpoints.split_state(progress.algorithm)
    for name, pool in {**pools, KEPT: progress.kept}.items():
        pool.save(checkpoints.get_pool_file(folder, name))


def check_pools(checkpoint: Path) -> None:
    """Raise UserError, with file and line, if a pool that a checkpoint needs is damaged."""
    kept = checkpoints.read_pools(checkpoint).get(KEPT, Pool())
    for number, row in enumerate(kept.rows(range(len(kept))), 1):
        if missing := sorted(ROW_KEYS - row.keys()):
            file = checkpoints.get_pool_file(checkpoint.parent.parent / POOLS, KEPT)
            raise UserError(f"{file}, line {number}: lacks {missing[0]!r}")


def collect_state(
    progress: Progress,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    moving_reference: PreTrainedModel | None,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return a checkpoint's tensors by file and name, and its plain values.

    Sharded tensors are gathered, so every rank must call this. Raise ValueError if the algorithm's state cannot be
    saved, see `check_state`.
    """
    check_state(progress.algorithm)
    tensors = {
        "policy": checkpoints.gather_module_tensors(model.policy, trained_only=True),
        "critics": checkpoints.gather_module_tensors(model.critics, trained_only=True),
        "optimizer": checkpoints.gather_optimizer_tensors(optimizer),
    }
    if targets := checkpoints.gather_module_tensors(model.targets):
        tensors["targets"] = targets
    if moving_reference is not None:
        tensors["moving_reference"] = checkpoints.gather_module_tensors(moving_reference)
    algorithm, of_algorithm, _ = checkpoints.split_state(progress.algorithm)
    kept, _, _ = checkpoints.split_state({KEPT: progress.kept})
    tensors["algorithm"] = {name: copy_for_file(tensor) for name, tensor in of_algorithm.items()}
    return tensors, {**vars(progress), "algorithm": algorithm, **kept}


def copy_for_file(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor that safetensors can write: contiguous, and sharing no memory."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def restore_state(
    tensors: dict[str, dict[str, Tensor]],
    values: dict[str, Any],
    initial: State,
    model: TrainingModel,
    optimizer: torch.optim.Optimizer,
    moving_reference: PreTrainedModel | None,
    pools: Path,
) -> Progress:
    """Load what `collect_state` returned into the models and the optimizer, and return the progress.

    A fork may change the algorithm: `initial` supplies entries of its state that the checkpoint lacks, and critics
    other than those of the checkpoint start anew. `pools` is the folder of pools of the run that owns the checkpoint.
    """
    checkpoints.load_module(model.policy, tensors["policy"], trained_only=True)
    saved_optimizer = tensors["optimizer"]
    if {name.partition(".")[0] for name in tensors["critics"]} == set(model.critics):
        checkpoints.load_module(model.critics, tensors["critics"], trained_only=True)
        restore_targets(model, tensors.get("targets"))
    else:
        saved_optimizer = select_policy_state(saved_optimizer, len(model.policy_parameters()))
    checkpoints.load_optimizer(optimizer, saved_optimizer)
    if moving_reference is not None and "moving_reference" in tensors:  # a fork's reference may not have moved yet
        checkpoints.load_module(moving_reference, tensors["moving_reference"])
    # Checkpoints from before nested states have the state's tensors in the file alone, without markers.
    unmarked = {name: tensor for name, tensor in tensors["algorithm"].items() if "/" not in name}
    values = checkpoints.join_state(values, tensors["algorithm"], pools)
    return Progress(**{**values, "algorithm": {**initial, **unmarked, **values["algorithm"]}})


def select_policy_state(optimizer: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return the entries of a saved optimizer of the policy's parameters, which are the first `count`."""
    return {name: tensor for name, tensor in optimizer.items() if int(name.partition(".")[0]) < count}


def restore_targets(model: TrainingModel, saved: dict[str, Tensor] | None) -> None:
    """Load the critics' Polyak copies, or copy the restored critics if the checkpoint has no copies."""
    if not model.targets:
        return
    if saved is None:
        tensors = checkpoints.gather_module_tensors(model.critics)
        saved = {name: tensors[name] for name in checkpoints.collect_tensors(model.targets, trained_only=False)}
    checkpoints.load_module(model.targets, saved)
