"""The reward model Dahoas/gptj-rm-static: a GPT-J body with a linear head, read at the first EOS after a text.

Its checkpoint is one file of tensors, not a `transformers` folder: `transformer.*`, and `v_head.weight` [1, hidden].
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPTJConfig, GPTJModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from apa_cli.errors import UserError, get_first_line
from apa_cli.models.loading import TORCH_DTYPES, load_pretrained, resolve_model_source
from apa_cli.models.reward_model import score_in_batches
from apa_cli.models.reward_text import encode_reward_text
from apa_cli.settings import DType

BODY, HEAD = "transformer.", "v_head.weight"
OLD_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias|embed_positions)$")
"""Buffers that earlier versions of `transformers` saved with a GPT-J: causal mask, its fill value, rotary table."""


class GPTJRewardModel(nn.Module):
    """Scorer of token rows [B, S]: the head's output at each row's last token, [B] float32."""

    head: Tensor

    def __init__(self, body: GPTJModel, head: Tensor):
        super().__init__()
        self.body, self.config = body, body.config
        self.register_buffer("head", head)  # a buffer, since FSDP requires parameters of one precision

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the scores [B] of input_ids [B, S], padded on the right as attention_mask [B, S] says."""
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]
        return last.float() @ self.head[0]


def load_gptj_rm(
    path: str, file: str, tokenizer_path: str, architecture: dict[str, Any], max_tokens: int, dtype: str
) -> tuple[GPTJRewardModel, PreTrainedTokenizerBase]:
    """Load the frozen model, its body in the given dtype and its head in float32, and its tokenizer.

    Raise UserError if checkpoint, architecture, tokenizer and `max_tokens` do not match.
    """
    tokenizer = load_pretrained(
        AutoTokenizer.from_pretrained, tokenizer_path, "reward.tokenizer", trust_remote_code=False
    )
    try:
        config = GPTJConfig(**architecture)
        with torch.device("meta"):
            shapes = {f"{BODY}{name}": tensor.shape for name, tensor in GPTJModel(config).state_dict().items()}
    except Exception as error:  # `transformers` and torch raise many types for wrong keys and dimensions
        raise UserError(f"reward.architecture: {' '.join(str(error).split())}") from error
    if max_tokens > config.n_positions:
        raise UserError(f"reward.max_tokens: {max_tokens} is more than the model's {config.n_positions} positions")
    if tokenizer.eos_token_id is None or len(tokenizer) > config.vocab_size:
        raise UserError(
            f"reward.tokenizer: {tokenizer_path} needs an end-of-text token and at most {config.vocab_size} tokens, "
            f"the model's vocabulary, got {len(tokenizer)}"
        )
    tensors = read_checkpoint(find_checkpoint_file(path, file))
    check_tensor_shapes(tensors, {**shapes, HEAD: torch.Size([1, config.n_embd])}, file)
    head = tensors.pop(HEAD).float()
    weights = {name.removeprefix(BODY): tensor for name, tensor in tensors.items()}
    body = GPTJModel.from_pretrained(None, config=config, state_dict=weights, dtype=TORCH_DTYPES[DType(dtype)])
    return GPTJRewardModel(body, head).eval().requires_grad_(False), tokenizer


def find_checkpoint_file(path: str, file: str) -> Path:
    """Return the path of the file in a folder or hub repository. Raise UserError if it cannot be found."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise UserError(f"reward.file: there is no {file} in {folder}")
        return folder / file
    try:
        return Path(cast(str, cached_file(resolve_model_source(path, "reward.path"), file)))
    except OSError as error:
        message = f"reward.path: cannot load {file} of {path}: {get_first_line(error)}; or give a local folder"
        raise UserError(message) from error


def read_checkpoint(file: Path) -> dict[str, Tensor]:
    """Read a checkpoint's tensors by name, without a wrapper's prefix and old buffers, and execute no code in the file.

    Raise UserError if the file holds anything but tensors by name.
    """
    try:
        # Files in the zip format are memory-mapped, so that 6 billion parameters are in memory only once.
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise UserError(f"reward.file: {file} is not a file of tensors: {get_first_line(error)}") from error
    if not isinstance(checkpoint, dict) or not all(isinstance(tensor, Tensor) for tensor in checkpoint.values()):
        raise UserError(f"reward.file: {file} is not a file of tensors by name")
    tensors = {name.removeprefix("module."): tensor for name, tensor in checkpoint.items()}
    return {name: tensor for name, tensor in tensors.items() if not OLD_BUFFERS.search(name)}


def check_tensor_shapes(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], file: str) -> None:
    """Raise UserError naming tensors that are missing, that the architecture lacks, or whose shape differs from it."""
    missing, unexpected = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or unexpected:
        lists = (("missing", missing), ("unexpected", unexpected))
        faults = "; ".join(f"{kind} {format_names(names)}" for kind, names in lists if names)
        raise UserError(f"reward.file: {file} does not fit reward.architecture: {faults}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"reward.file: {name} in {file} has shape {list(tensors[name].shape)}, but by reward.architecture "
                f"{list(shape)}"
            )


def format_names(names: Iterable[str]) -> str:
    """Return the first three names in sorted order, and the number of further names, as text."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def encode_with_eos(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, max_tokens: int) -> list[int]:
    """Return the tokens of prompt + response and EOS, cut on the left to `max_tokens`."""
    return [*encode_reward_text(tokenizer, prompt, response, max_tokens - 1), tokenizer.eos_token_id]


def score_texts_at_eos(
    model: GPTJRewardModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    batch_size: int,
    max_tokens: int,
    device: torch.device | str,
) -> list[float]:
    """Return the score of each (prompt, response) at the EOS after its tokens, `batch_size` texts per forward pass."""
    eos = tokenizer.eos_token_id
    rows = [encode_with_eos(tokenizer, prompt, response, max_tokens) for prompt, response in pairs]
    return score_in_batches(rows, batch_size, eos, device, lambda inputs: model(**inputs))
