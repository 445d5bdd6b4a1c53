"""Reward models: sequence classifiers on prompt + response, loading, building and scoring."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from apa_cli.models.loading import TORCH_DTYPES, loaded, with_pad
from apa_cli.settings import DType


def load_reward_model(path: str, device: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen classifier in the compute dtype, and its tokenizer padding on the right."""
    tokenizer = loaded(AutoTokenizer.from_pretrained, path, "reward.path", padding_side="right")
    model = loaded(
        AutoModelForSequenceClassification.from_pretrained,
        path,
        "reward.path",
        dtype=TORCH_DTYPES[DType(dtype)],
    )
    tokenizer = with_pad(tokenizer)
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.to(device).eval().requires_grad_(False), tokenizer


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
def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    microbatch: int,
    longest: int,
    output: int = 0,
) -> list[float]:
    """The given output of the classifier on each (prompt, response), in batches sorted by length."""
    rows = [text_tokens(tokenizer, prompt, response, longest) for prompt, response in pairs]
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), microbatch):
        chunk = order[start : start + microbatch]
        inputs = padded([rows[i] for i in chunk], tokenizer.pad_token_id, model.device)
        for i, value in zip(chunk, model(**inputs).logits[:, output].float().tolist(), strict=True):
            scores[i] = value
    return scores
