"""The policy of a run, of one of its checkpoints, or of `model.path`, as apa-eval, apa-export and apa-chat load it."""

from __future__ import annotations

import json
from dataclasses import replace
from enum import Enum
from pathlib import Path

import torch
from transformers import PreTrainedModel

from apa_cli.datasets.dialogue import ASSISTANT
from apa_cli.errors import UserError
from apa_cli.models.loading import load_policy
from apa_cli.models.prompting import chat_text
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.records import located_run
from apa_cli.settings import Config, Quantization
from apa_cli.training.build import check_training, training_model


def load_trained(config: Config, device: torch.device) -> PreTrainedModel:
    """The policy that `run=` names, or without it the model of `model.path`; in the precision of training.

    A run's is its model/; a checkpoint's is put together as apa-train does it, a LoRA adapter in place.
    """
    lora = config.lora.rank > 0
    if config.run.run is None:
        return load_policy(config.model, config.model.path).to(device)
    directory, checkpoint = located_run(config.run.run)
    if checkpoint is None:
        settings = replace(config.model, quantization=Quantization.none)
        return load_policy(settings, str(model_folder(directory)), frozen_base=lora).to(device)
    check_training(config)
    model, _ = training_model(config, load_policy(config.model, config.model.path, frozen_base=lora))
    tensors, _ = checkpoints.load(checkpoint)
    checkpoints.load_module(model.policy, tensors["policy"], trained_only=True)
    return model.policy.to(device)


def model_folder(directory: Path) -> Path:
    """The trained model that a run leaves when it ends. UserError where it has not ended."""
    folder = directory / "model"
    if not (folder / "config.json").is_file():
        raise UserError(f"run: {directory} has no model/, for it has not ended; a checkpoint of it can be named")
    return folder


def last_iteration(config: Config) -> int:
    """The iteration after which the policy was as it is: the run's last, or the checkpoint's."""
    directory, checkpoint = located_run(config.run.run)
    if checkpoint is not None:
        return json.loads((checkpoint / "state.json").read_text())["iteration"]
    return json.loads((directory / "metrics.jsonl").read_text().splitlines()[-1])["iteration"]


class PromptKind(Enum):
    """What a run's prompts are: plain text, a dialogue in HH's form, or one in the tokenizer's chat template."""

    text = "text"
    dialogue = "dialogue"
    chat = "chat"


def an_evaluated_prompt(directory: Path) -> tuple[str, PromptKind]:
    """The text of the run's first held-out prompt as its reward saw it, and what kind it is, see `PromptFormat`."""
    with (directory / "samples.jsonl").open(encoding="utf-8") as rows:
        prompt = json.loads(next(rows))["prompt"]
    if prompt.endswith(chat_text([])):
        return prompt, PromptKind.chat
    return prompt, PromptKind.dialogue if prompt.endswith(ASSISTANT) else PromptKind.text


def name_of(base: str, checkpoint: Path | None, ending: str = "") -> str:
    """The name of what is made of a run, or of a checkpoint of it: export, or export_iteration_000020."""
    return f"{base}{ending}" if checkpoint is None else f"{base}_{checkpoint.name}{ending}"
