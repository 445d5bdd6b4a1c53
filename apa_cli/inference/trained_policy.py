"""The policy that apa-eval, apa-export and apa-chat load: a run's, a checkpoint's, or the model of `model.path`."""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from pathlib import Path

import torch
from transformers import PreTrainedModel

from apa_cli.datasets.dialogue import ASSISTANT
from apa_cli.models.loading import load_policy
from apa_cli.models.prompting import format_chat
from apa_cli.models.structure import move_to_device
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.records import RecordedRun
from apa_cli.settings import Config, Quantization
from apa_cli.training.models import build_training_model, check_training_options


def load_trained_policy(config: Config, run: RecordedRun | None, device: torch.device) -> PreTrainedModel:
    """Load the policy of `run`, or without a run the model of `model.path`, in the precision of training.

    A run's policy is its model/; a checkpoint's is built as apa-train builds it, with a LoRA adapter not merged. Raise
    UserError if the run has not finished and no checkpoint of it is named.
    """
    has_adapter = config.lora.rank > 0
    if run is None:
        return move_to_device(load_policy(config.model, config.model.resolved_path), device)
    if run.checkpoint is None:
        settings = replace(config.model, quantization=Quantization.none)
        return move_to_device(load_policy(settings, str(run.model_folder), frozen_base=has_adapter), device)
    check_training_options(config)
    base = load_policy(config.model, config.model.resolved_path, frozen_base=has_adapter)
    model, _ = build_training_model(config, base)
    tensors, _ = checkpoints.load_checkpoint(run.checkpoint)
    checkpoints.load_module(model.policy, tensors["policy"], trained_only=True)
    return move_to_device(model.policy, device)


class PromptKind(Enum):
    """Kind of a prompt: plain text, a dialogue in HH's format, or a dialogue in the tokenizer's chat template."""

    text = "text"
    dialogue = "dialogue"
    chat = "chat"


def read_first_prompt(run: RecordedRun) -> tuple[str, PromptKind]:
    """Return the run's first held-out prompt, as the reward reads it, and its kind; see `PromptFormat`."""
    prompt = run.samples[0]["prompt"]
    if prompt.endswith(format_chat([])):
        return prompt, PromptKind.chat
    return prompt, PromptKind.dialogue if prompt.endswith(ASSISTANT) else PromptKind.text


def get_output_path(run: RecordedRun, base: str, suffix: str = "") -> Path:
    """Return the path in the run's directory for `base`, such as export, or export_iteration_000020 of a checkpoint."""
    name = base if run.checkpoint is None else f"{base}_{run.checkpoint.name}"
    return run.directory / f"{name}{suffix}"
