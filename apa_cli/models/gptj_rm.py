"""The reward model of Dahoas/gptj-rm-static: a GPT-J body, a head read at the first end-of-text token after a text.

Its checkpoint is one file of tensors, no `transformers` folder: `transformer.*`, and `v_head.weight` [1, hidden].
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, GPTJConfig, GPTJModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from apa_cli.errors import UserError
from apa_cli.models.loading import TORCH_DTYPES, loaded, source
from apa_cli.models.reward_model import in_batches, text_tokens
from apa_cli.settings import DType

BODY, HEAD = "transformer.", "v_head.weight"
OLD_BUFFERS = re.compile(r"\.attn\.(bias|masked_bias|embed_positions)$")
"""What earlier versions of `transformers` saved with a GPT-J and this one computes: causal mask, fill, rotary table."""


class GPTJRewardModel(nn.Module):
    """[B] float32 scores of token rows [B, S]: the head's output on each row's last token."""

    def __init__(self, body: GPTJModel, head: Tensor):
        super().__init__()
        self.body, self.config = body, body.config
        self.register_buffer("head", head)  # no parameter, for its precision is another

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(hidden), device=hidden.device), attention_mask.sum(-1) - 1]
        return last.float() @ self.head[0]


def load_gptj_rm(
    path: str, file: str, tokenizer: str, architecture: dict[str, Any], longest: int, dtype: str
) -> tuple[GPTJRewardModel, PreTrainedTokenizerBase]:
    """The frozen model, its body in the compute dtype and its head in float32, and the tokenizer."""
    words = loaded(AutoTokenizer.from_pretrained, tokenizer, "reward.tokenizer", trust_remote_code=False)
    try:
        config = GPTJConfig(**architecture)
        with torch.device("meta"):
            shapes = {f"{BODY}{name}": tensor.shape for name, tensor in GPTJModel(config).state_dict().items()}
    except Exception as error:
        raise UserError(f"reward.architecture: {' '.join(str(error).split())}") from error
    if longest > config.n_positions:
        raise UserError(f"reward.max_tokens: {longest} is more than the model's {config.n_positions} positions")
    if words.eos_token_id is None or len(words) > config.vocab_size:
        raise UserError(
            f"reward.tokenizer: {tokenizer} needs an end-of-text token and at most {config.vocab_size} pieces, "
            f"the model's vocabulary; it has {len(words)}"
        )
    tensors = checkpoint_tensors(checkpoint_file(path, file))
    check_fit(tensors, {**shapes, HEAD: torch.Size([1, config.n_embd])}, file)
    head = tensors.pop(HEAD).float()
    weights = {name.removeprefix(BODY): tensor for name, tensor in tensors.items()}
    body = GPTJModel.from_pretrained(None, config=config, state_dict=weights, dtype=TORCH_DTYPES[DType(dtype)])
    return GPTJRewardModel(body, head).eval().requires_grad_(False), words


def checkpoint_file(path: str, file: str) -> Path:
    """The file in a folder or a hub repository."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if not (folder / file).is_file():
            raise UserError(f"reward.file: there is no {file} in {folder}")
        return folder / file
    try:
        return Path(cached_file(source(path, "reward.path"), file))
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"reward.path: cannot load {file} of {path}: {first}; a local folder works too") from error


def checkpoint_tensors(file: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors by name, without a wrapper's prefix and without old buffers; no code in it is run."""
    try:
        # Files of the current kind are mapped, not read: 6 billion parameters are then in memory once.
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(f"reward.file: {file} is no file of tensors: {first}") from error
    if not isinstance(found, dict) or not all(isinstance(tensor, Tensor) for tensor in found.values()):
        raise UserError(f"reward.file: {file} is no file of tensors by name")
    tensors = {name.removeprefix("module."): tensor for name, tensor in found.items()}
    return {name: tensor for name, tensor in tensors.items() if not OLD_BUFFERS.search(name)}


def check_fit(tensors: dict[str, Tensor], shapes: dict[str, torch.Size], file: str) -> None:
    """UserError naming the tensors that are missing, that have no place, or whose shape is another."""
    missing, unexpected = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or unexpected:
        faults = [
            f"{what} {some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names
        ]
        raise UserError(f"reward.file: {file} does not fit reward.architecture: {'; '.join(faults)}")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(
                f"reward.file: {name} in {file} is {list(tensors[name].shape)}, with reward.architecture it is "
                f"{list(shape)}"
            )


def some(names: Iterable[str]) -> str:
    """The first three of several names, and how many more there are."""
    ordered = sorted(names)
    return ", ".join(ordered[:3]) + (f" and {len(ordered) - 3} more" if len(ordered) > 3 else "")


def score_texts_at_end(
    model: GPTJRewardModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: list[tuple[str, str]],
    microbatch: int,
    longest: int,
    device: torch.device | str,
) -> list[float]:
    """The score of each (prompt, response): that of its text's tokens and the end-of-text token after them."""
    end = tokenizer.eos_token_id
    rows = [[*text_tokens(tokenizer, prompt, response, longest - 1), end] for prompt, response in pairs]
    return in_batches(rows, microbatch, end, device, lambda inputs: model(**inputs))
