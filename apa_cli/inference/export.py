"""apa-export: a run's policy as a plain `transformers` folder with a model card, checked before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.inference.model_card import model_card
from apa_cli.inference.trained import last_iteration, load_trained, model_folder, name_of
from apa_cli.models.loading import TORCH_DTYPES, load_tokenizer, loaded
from apa_cli.models.lora import layers, merged_tensors
from apa_cli.runs.console import Console
from apa_cli.runs.records import located_run
from apa_cli.settings import Config
from apa_cli.tensor_ops import token_logprobs
from apa_cli.training.build import launch

CHECKED_REPLIES = 8
"""Replies whose log-probs are compared, the last of samples.jsonl."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""The largest difference of a token's log-prob that is let pass, by the coarser of the two models' precisions: a
bfloat16 has 8 bits, so a logit around 16 is right to about 0.06, and every layer rounds."""


def start_export(config: Config) -> None:
    """Writes the folder, or nothing at all where the check fails."""
    directory, checkpoint = located_run(config.run.run)
    target = Path(config.export.folder or directory / name_of("export", checkpoint)).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"export.folder: {target} is not empty; give another export.folder=")
    device = launch(config.launch)
    with Console(None, 0, live=False) as console:
        tokenizer = load_tokenizer(config.model, config.model.path)
        policy = stored_policy(config, device)
        samples = (directory / "samples.jsonl").read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in samples if line][-CHECKED_REPLIES:]
        expected = text_logprobs(policy, tokenizer, rows)
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            dtype = TORCH_DTYPES[config.export.dtype] if config.export.dtype else policy.dtype
            write(policy, tokenizer, beside, dtype)
            again = stored_model(beside, config).to(device)
            difference = largest_difference(expected, text_logprobs(again, tokenizer, rows))
            check(difference, max(TOLERANCE[policy.dtype], TOLERANCE[dtype]))
            card = model_card(directory, checkpoint, last_iteration(config), dtype)
            (beside / "README.md").write_text(card, encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            beside.rename(target)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        count = sum(len(row) for row in expected)
        stored = str(dtype).removeprefix("torch.")
        console.say(
            f"wrote {target}: the policy after iteration {last_iteration(config)}, in {stored}; "
            f"loaded again, its log-probs of {count} held-out tokens differ by at most {difference:.2g} nats"
        )


def stored_policy(config: Config, device: torch.device) -> PreTrainedModel:
    """The policy as its run has stored it: a finished run's model/, in its own precision, or a checkpoint's."""
    directory, checkpoint = located_run(config.run.run)
    if checkpoint is not None:
        return load_trained(config, device)
    return stored_model(model_folder(directory), config).to(device)


def stored_model(folder: Path, config: Config) -> PreTrainedModel:
    """A model in the precision in which it is stored."""
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": config.model.trust_remote_code}
    return loaded(AutoModelForCausalLM.from_pretrained, str(folder), "export", **options)


def write(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype) -> None:
    """The plain folder; a LoRA adapter is merged before anything is rounded to `dtype`."""
    tensors = merged_tensors(policy) if layers(policy) else policy.state_dict()
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    policy.save_pretrained(folder, state_dict=tensors)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)


def largest_difference(expected: list[Tensor], found: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))


def check(difference: float, allowed: float) -> None:
    """UserError for a model that is not the policy."""
    if not difference <= allowed:
        raise UserError(
            f"export: loaded again the model's log-probs differ from the policy's by up to {difference:.3g} nats, more "
            f"than {allowed:g}; nothing is kept"
        )


@torch.no_grad()
def text_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> list[Tensor]:
    """log p of every token but the first of each prompt with its reply, float32."""
    model.eval()
    found = []
    for row in rows:
        ids = tokenizer(row["prompt"] + row["response"], return_tensors="pt")["input_ids"].to(model.device)
        found.append(token_logprobs(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])[0].cpu())
    return found
