"""Reward models: sequence classifiers on prompt + response, loading, building and scoring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from apa_cli.models.loading import TORCH_DTYPES, loaded, source, with_pad
from apa_cli.settings import DType
from apa_cli.types import UserError

ADAPTER = "adapter_config.json"


def load_reward_model(path: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen classifier in the compute dtype, and its tokenizer padding on the right.

    A LoRA adapter is merged into its base model; where it has no tokenizer of its own, the base model's is taken.
    """
    kind = TORCH_DTYPES[DType(dtype)]
    words_path = path
    if file_of(path, ADAPTER) is None:
        model = loaded(AutoModelForSequenceClassification.from_pretrained, path, "reward.path", dtype=kind)
    else:
        model, base = merged_adapter(path, kind)
        words_path = path if file_of(path, "tokenizer_config.json") else base
    tokenizer = with_pad(loaded(AutoTokenizer.from_pretrained, words_path, "reward.path", padding_side="right"))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval().requires_grad_(False), tokenizer


def merged_adapter(path: str, dtype: torch.dtype) -> tuple[PreTrainedModel, str]:
    """A one-output classifier with the LoRA adapter in `path` merged in, and its base model's folder or hub id."""
    from peft import PeftModel
    from peft.utils import load_peft_weights

    settings = json.loads(Path(file_of(path, ADAPTER)).read_text(encoding="utf-8"))
    task, base = settings.get("task_type"), settings.get("base_model_name_or_path")
    if task != "SEQ_CLS" or not base:
        raise UserError(
            f"reward.path: {path} is an adapter of task {task} on {base}; a reward model's is of task SEQ_CLS on a model"
        )
    model = loaded(
        AutoModelForSequenceClassification.from_pretrained,
        base,
        f"reward.path: {path} is an adapter on {base}",
        num_labels=1,
        dtype=dtype,
    )
    where = str(Path(path).expanduser()) if Path(path).expanduser().is_dir() else path
    try:
        if not any("score." in name or "classifier." in name for name in load_peft_weights(where, device="cpu")):
            raise UserError(f"reward.path: the adapter in {path} has no score head")
        return PeftModel.from_pretrained(model, where).merge_and_unload(), base
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise UserError(f"reward.path: cannot load the adapter in {path}: {' '.join(str(error).split())}") from error


def file_of(path: str, name: str) -> str | None:
    """A file of a model's folder or hub repository; None where there is none, or no way to look."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    try:
        return cached_file(source(path, "reward.path"), name)
    except OSError:
        return None


def output_number(model: PreTrainedModel, output: int | str, path: str) -> int:
    """The classifier's output that a number or a label names. UserError listing the outputs for any other."""
    labels = {int(number): label for number, label in model.config.id2label.items()}
    for number, label in labels.items():
        if output in (number, label):
            return number
    known = ", ".join(f"{number} ({label})" for number, label in sorted(labels.items()))
    raise UserError(f"reward.output: {path} has no output {output!r}; there are {known}")


def score_mean(model: PreTrainedModel, path: str) -> float:
    """The mean score on its training replies, as apa-reward wrote it into the model's config.json."""
    mean = getattr(model.config, "score_mean", None)
    if mean is None:
        raise UserError(f"reward.centered: the config.json of {path} holds no score_mean")
    return float(mean)


def build_reward_model(policy_path: str, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A one-output classifier on the trunk of a causal model, in float32; its head starts at zero."""
    config = loaded(AutoConfig.from_pretrained, policy_path, "model.path")
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = loaded(
            AutoModelForSequenceClassification.from_pretrained,
            policy_path,
            "model.path",
            config=config,
            dtype=torch.float32,
        )
    torch.nn.init.zeros_(model.score.weight)
    return model.eval()


def text_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, longest: int) -> list[int]:
    """Tokens of prompt + response; what is too long loses prompt text on the left, and reply text last."""
    tokenizer.truncation_side = "left"
    return tokenizer(prompt + response, truncation=True, max_length=longest)["input_ids"]


def padded(rows: list[list[int]], pad: int, device: torch.device | str) -> dict[str, Tensor]:
    """Model inputs of token rows, padded on the right."""
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
    }


@torch.no_grad()
def in_batches(
    rows: list[list[int]],
    microbatch: int,
    pad: int,
    device: torch.device | str,
    score: Callable[[dict[str, Tensor]], Tensor],
) -> list[float]:
    """`score(model inputs)`, [B], of each token row, in batches sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), microbatch):
        chunk = order[start : start + microbatch]
        inputs = padded([rows[i] for i in chunk], pad, device)
        for i, value in zip(chunk, score(inputs).float().tolist(), strict=True):
            scores[i] = value
    return scores


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    microbatch: int,
    longest: int,
    output: int = 0,
) -> list[float]:
    """The given output of the classifier on each (prompt, response)."""
    rows = [text_tokens(tokenizer, prompt, response, longest) for prompt, response in pairs]
    return in_batches(
        rows, microbatch, tokenizer.pad_token_id, model.device, lambda inputs: model(**inputs).logits[:, output]
    )
