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

from apa_cli.errors import UserError
from apa_cli.models.loading import TORCH_DTYPES, load_merged, loaded, source, whole, with_pad
from apa_cli.models.lora import adapter_base, is_adapter
from apa_cli.settings import DType, ModelSettings


def load_reward_model(path: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen classifier on the CPU in the compute dtype, and its tokenizer padding on the right.

    A LoRA adapter is merged into its base model; where it has no tokenizer of its own, the base model's is taken.
    """
    words, options = path, {"dtype": TORCH_DTYPES[DType(dtype)], "trust_remote_code": False}
    source(path, "reward.path")
    load = whole(AutoModelForSequenceClassification.from_pretrained)
    if is_adapter(path):
        check_adapter(path)
        load, options["num_labels"] = AutoModelForSequenceClassification.from_pretrained, 1  # the head is the adapter's
        words = path if file_of(path, "tokenizer_config.json") else adapter_base(path)
    model = load_merged(load, path, "reward.path", **options)
    own = {"padding_side": "right", "trust_remote_code": False}
    tokenizer = with_pad(loaded(AutoTokenizer.from_pretrained, words, "reward.path", **own))
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by `transformers` where there is none
        raise UserError(f"reward.path: {words} holds no tokenizer")
    highest, size = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if highest >= size:
        raise UserError(f"reward.path: the highest token of {words} is number {highest}, the model has {size}")
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval().requires_grad_(False), tokenizer


def check_adapter(path: str) -> None:
    """UserError for an adapter of another task, or without the score head, which would then be random."""
    from peft.utils import load_peft_weights

    task = json.loads(Path(file_of(path, "adapter_config.json")).read_text(encoding="utf-8")).get("task_type")
    if task != "SEQ_CLS":
        raise UserError(f"reward.path: {path} is an adapter of task {task}; a reward model's is SEQ_CLS")
    tensors = loaded(lambda where: load_peft_weights(where, device="cpu"), path, "reward.path")
    if not any(".score." in name or ".classifier." in name for name in tensors):
        raise UserError(f"reward.path: the adapter in {path} holds no score head; modules_to_save must name it")


def file_of(path: str, name: str) -> str | None:
    """A file of a model's folder or hub repository; None where there is none, or no way to look."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    try:
        return cached_file(path, name)
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


def build_reward_model(
    settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, seed: int, frozen_base: bool = False
) -> PreTrainedModel:
    """A one-output classifier on the trunk of the model in `model.path`; its head starts at zero.

    In float32, or with `frozen_base` (for LoRA) in the compute dtype.
    """
    path = settings.path
    config = loaded(
        AutoConfig.from_pretrained,
        adapter_base(path) if is_adapter(path) else path,
        "model.path",
        trust_remote_code=settings.trust_remote_code,
    )
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = load_merged(
            AutoModelForSequenceClassification.from_pretrained,
            path,
            "model.path",
            config=config,
            dtype=TORCH_DTYPES[settings.dtype] if frozen_base else torch.float32,
            attn_implementation=settings.attn_implementation,
            trust_remote_code=settings.trust_remote_code,
        )
    torch.nn.init.zeros_(model.score.weight)
    return model.eval()


def longest_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, longest: int) -> int:
    """Tokens that a text may have: `longest`, or as many as the model and its tokenizer have room for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(longest, tokenizer.model_max_length, positions or longest)


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
    device: torch.device | str,
    output: int = 0,
) -> list[float]:
    """The given output of the classifier on each (prompt, response)."""
    rows = [text_tokens(tokenizer, prompt, response, longest) for prompt, response in pairs]
    return in_batches(
        rows, microbatch, tokenizer.pad_token_id, device, lambda inputs: model(**inputs).logits[:, output]
    )
