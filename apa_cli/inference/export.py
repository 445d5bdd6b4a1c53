"""apa-export: a run's policy as a plain `transformers` folder with a model card, verified before it gets its name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError, get_first_line
from apa_cli.file_modes import apply_umask
from apa_cli.inference.model_card import format_model_card
from apa_cli.inference.trained_policy import get_output_path, load_trained_policy
from apa_cli.models.loading import TORCH_DTYPES, load_pretrained, load_tokenizer
from apa_cli.models.lora import find_lora_layers, merge_adapter_tensors
from apa_cli.models.structure import get_context_length, move_to_device
from apa_cli.models.tokenization import encode_text
from apa_cli.runs.console import Console
from apa_cli.runs.records import RecordedRun
from apa_cli.settings import Config
from apa_cli.tensor_ops import token_logprobs
from apa_cli.training.build import set_up_device

CHECKED_RESPONSES = 8
"""Number of responses, the last of samples.jsonl, whose log-probs are compared."""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest accepted difference of a token's log-prob, in nats, by the coarser of the two models' precisions. A bfloat16
has 8 significant bits, so a logit around 16 is exact to about 0.06, and every layer rounds."""


def export_policy(config: Config, run: RecordedRun) -> None:
    """Write the policy of `run` to `export.folder`, or by default to the run's directory.

    The model is written under a temporary name and reloaded. Raise UserError, and leave no files, if its log-probs then
    differ from the policy's. Raise UserError if the folder exists and is not empty.
    """
    target = Path(config.export.folder or get_output_path(run, "export")).expanduser()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UserError(f"export.folder: {target} is not empty; give another export.folder=")
    device = set_up_device(config.launch)
    with Console(None, 0, live=False) as console:
        tokenizer = load_tokenizer(config.model, config.model.resolved_path)
        policy = load_stored_policy(config, run, device)
        rows = run.samples[-CHECKED_RESPONSES:]
        expected = compute_text_logprobs(policy, tokenizer, rows)
        unfinished = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            dtype = TORCH_DTYPES[config.export.dtype] if config.export.dtype else policy.dtype
            save_plain_folder(policy, tokenizer, unfinished, dtype)
            reloaded = move_to_device(load_stored_model(unfinished, config), device)
            difference = compute_max_difference(expected, compute_text_logprobs(reloaded, tokenizer, rows))
            check_difference(difference, max(TOLERANCE[policy.dtype], TOLERANCE[dtype]))
            (unfinished / "README.md").write_text(format_model_card(run, dtype), encoding="utf-8")
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
        except OSError as error:
            raise UserError(
                f"export.folder: {target} cannot be written ({error.strerror or get_first_line(error)})"
            ) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        tokens = sum(len(row) for row in expected)
        precision = str(dtype).removeprefix("torch.")
        console.say(
            f"wrote {target}: the policy after iteration {run.iteration}, in {precision}; "
            f"reloaded, its log-probs of {tokens} held-out tokens differ by at most {difference:.2g} nats"
        )


def load_stored_policy(config: Config, run: RecordedRun, device: torch.device) -> PreTrainedModel:
    """Load the policy as the run has stored it: a checkpoint's, or model/ in the stored precision."""
    if run.checkpoint is not None:
        return load_trained_policy(config, run, device)
    return move_to_device(load_stored_model(run.model_folder, config), device)


def load_stored_model(folder: Path, config: Config) -> PreTrainedModel:
    """Load a model in its stored precision."""
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": config.model.trust_remote_code}
    return load_pretrained(AutoModelForCausalLM.from_pretrained, str(folder), "export", **options)


def save_plain_folder(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype
) -> None:
    """Write model and tokenizer to `folder`; a LoRA adapter is merged before anything is rounded to `dtype`."""
    tensors = merge_adapter_tensors(policy) if find_lora_layers(policy) else policy.state_dict()
    tensors = {name: value.to(dtype) if value.is_floating_point() else value for name, value in tensors.items()}
    policy.save_pretrained(folder, state_dict=tensors)
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = str(dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tokenizer.save_pretrained(folder)
    apply_umask(folder)


def compute_max_difference(expected: list[Tensor], actual: list[Tensor]) -> float:
    """Return the largest absolute difference between paired tensors."""
    return max(float((a - b).abs().max()) for a, b in zip(expected, actual, strict=True))


def check_difference(difference: float, tolerance: float) -> None:
    """Raise UserError unless the difference, in nats, is within the tolerance; NaN is not."""
    if not difference <= tolerance:
        raise UserError(
            f"export: the log-probs of the reloaded model differ from the policy's by up to {difference:.3g} nats, "
            f"more than {tolerance:g}; nothing was written"
        )


@torch.no_grad()
def compute_text_logprobs(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]]
) -> list[Tensor]:
    """Return the float32 log-probs of prompt + response, without the first token, for each row of samples.jsonl."""
    model.eval()
    logprobs = []
    for row in rows:
        # A chat's plain text may be longer than what the policy read.
        text = encode_text(tokenizer, row["prompt"] + row["response"])[: get_context_length(model)]
        ids = torch.tensor([text], device=model.device)
        logprobs.append(token_logprobs(model(input_ids=ids, use_cache=False).logits[:, :-1], ids[:, 1:])[0].cpu())
    return logprobs
