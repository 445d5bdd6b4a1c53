"""Reward models: sequence classifiers on prompt + response; loading, building and scoring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from apa_cli.errors import UserError
from apa_cli.models.loading import (
    TORCH_DTYPES,
    ensure_pad_token,
    load_merged,
    load_pretrained,
    require_all_weights,
    resolve_model_source,
)
from apa_cli.models.lora import is_adapter, read_adapter_base, read_adapter_config
from apa_cli.settings import DType, ModelSettings


def load_reward_model(path: str, dtype: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a frozen classifier in the given dtype on the CPU, and its tokenizer, which pads on the right.

    A LoRA adapter is merged into its base model, and uses the base's tokenizer if it has none. Raise UserError if model
    or tokenizer cannot be loaded, or if the tokenizer has more tokens than the model.
    """
    resolve_model_source(path, "reward.path")
    options: dict[str, Any] = {"dtype": TORCH_DTYPES[DType(dtype)], "trust_remote_code": False}
    tokenizer_path, load = path, require_all_weights(AutoModelForSequenceClassification.from_pretrained)
    if is_adapter(path):
        check_reward_adapter(path)
        # The base lacks the head, which is the adapter's.
        load, options["num_labels"] = AutoModelForSequenceClassification.from_pretrained, 1
        tokenizer_path = path if find_model_file(path, "tokenizer_config.json") else read_adapter_base(path)
    model = load_merged(load, path, "reward.path", **options)
    options = {"padding_side": "right", "trust_remote_code": False}
    tokenizer = ensure_pad_token(
        load_pretrained(AutoTokenizer.from_pretrained, tokenizer_path, "reward.path", **options)
    )
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # `transformers` makes such a tokenizer if there is none
        raise UserError(f"reward.path: {tokenizer_path} contains no tokenizer")
    highest = max(tokenizer.get_vocab().values())
    size = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if highest >= size:
        raise UserError(
            f"reward.path: the highest token id of {tokenizer_path} is {highest}, but the model has {size} embeddings"
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.eval().requires_grad_(False), tokenizer


def check_reward_adapter(path: str) -> None:
    """Raise UserError for an adapter of another task, or without the score head, which would then be random."""
    from peft.utils import load_peft_weights

    task = read_adapter_config(path).get("task_type")
    if task != "SEQ_CLS":
        raise UserError(f"reward.path: {path} is an adapter of task {task}; a reward model needs SEQ_CLS")
    tensors = load_pretrained(lambda source: load_peft_weights(source, device="cpu"), path, "reward.path")
    if not any(".score." in name or ".classifier." in name for name in tensors):
        raise UserError(f"reward.path: the adapter in {path} has no score head; modules_to_save must name it")


def find_model_file(path: str, name: str) -> str | None:
    """Return the path of a file in a model's folder or hub repository; None if it does not exist or is unreachable."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return str(folder / name) if (folder / name).is_file() else None
    try:
        return cached_file(path, name)
    except OSError:
        return None


def find_output_index(model: PreTrainedModel, output: int | str, path: str) -> int:
    """Return the index of the classifier output with this number or label. Raise UserError listing the outputs."""
    labels = {int(number): label for number, label in (model.config.id2label or {}).items()}
    for number, label in labels.items():
        if output in (number, label):
            return number
    choices = ", ".join(f"{number} ({label})" for number, label in sorted(labels.items()))
    raise UserError(f"reward.output: {path} has no output {output!r}; there are {choices}")


def read_score_mean(model: PreTrainedModel, path: str) -> float:
    """Return the mean score that apa-reward stored in config.json. Raise UserError if there is none."""
    mean = getattr(model.config, "score_mean", None)
    if mean is None:
        raise UserError(f"reward.centered: the config.json of {path} has no score_mean; give false")
    return float(mean)


def build_reward_model(
    settings: ModelSettings, path: str, tokenizer: PreTrainedTokenizerBase, seed: int, frozen_base: bool = False
) -> PreTrainedModel:
    """Build a classifier with one output on the trunk of the model in `path`; its head starts at zero.

    The weights are float32, or with `frozen_base` (for LoRA) in the compute dtype.
    """
    config = load_pretrained(
        AutoConfig.from_pretrained,
        read_adapter_base(path) if is_adapter(path) else path,
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
    nn.init.zeros_(model.get_parameter("score.weight"))
    return model.eval()


def compute_max_text_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> int:
    """Return the length limit of a text in tokens: `max_tokens`, or fewer if model or tokenizer support fewer."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return min(max_tokens, tokenizer.model_max_length, positions or max_tokens)


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> list[int]:
    """Return the tokens of prompt + response, truncated on the left: prompt text is lost before response text."""
    tokenizer.truncation_side = "left"
    return tokenizer(prompt + response, truncation=True, max_length=max_tokens)["input_ids"]


def pad_token_rows(rows: list[list[int]], pad_id: int, device: torch.device | str) -> dict[str, Tensor]:
    """Return rows of tokens as model inputs [B, S], padded on the right."""
    width = max(len(row) for row in rows)
    return {
        "input_ids": torch.tensor([row + [pad_id] * (width - len(row)) for row in rows], device=device),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device),
    }


@torch.no_grad()
def score_in_batches(
    rows: list[list[int]],
    batch_size: int,
    pad_id: int,
    device: torch.device | str,
    score: Callable[[dict[str, Tensor]], Tensor],
) -> list[float]:
    """Return `score(model inputs)`, which is [B], for each row of tokens, computed in batches sorted by length."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = [0.0] * len(rows)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        inputs = pad_token_rows([rows[i] for i in batch], pad_id, device)
        for i, value in zip(batch, score(inputs).float().tolist(), strict=True):
            scores[i] = value
    return scores


def score_texts(
    model: Callable[..., Any],
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    batch_size: int,
    max_tokens: int,
    device: torch.device | str,
    output: int = 0,
) -> list[float]:
    """Return one output of a classifier for each (prompt, response), `batch_size` texts per forward pass."""
    rows = [encode_text(tokenizer, prompt, response, max_tokens) for prompt, response in pairs]
    pad_id = tokenizer.pad_token_id
    return score_in_batches(rows, batch_size, pad_id, device, lambda inputs: model(**inputs).logits[:, output])
