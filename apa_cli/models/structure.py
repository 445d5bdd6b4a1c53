"""Structure of a loaded model: trunk and blocks, frozen parts, number of parameters, and frozen copies."""

from __future__ import annotations

import copy
from typing import TypeVar, cast

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from apa_cli.errors import ConfigError, UserError

ModelT = TypeVar("ModelT", bound=nn.Module)


def move_to_device(model: ModelT, device: torch.device) -> ModelT:
    """Return the same model with its tensors on `device`; `PreTrainedModel.to` has no usable type."""
    cast(nn.Module, model).to(device)
    return model


def get_trunk(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model without its output head; a model without a head is its own trunk."""
    trunk = cast(PreTrainedModel, model.base_model)
    if trunk is model and model.get_output_embeddings() is not None:
        # Llama 4's text model does not have its trunk under the name that `base_model` expects.
        trunk = next((part for part in model.children() if isinstance(part, PreTrainedModel)), model)
    return trunk


def get_state_width(model: PreTrainedModel) -> int:
    """Return the number of features of a language model's last hidden state, the input of its output head.

    It is not the blocks' width if the trunk projects its output, as OPT 350M's does.
    """
    return cast(nn.Linear, model.get_output_embeddings()).in_features


def find_blocks(trunk: PreTrainedModel) -> nn.ModuleList:
    """Return the transformer blocks of a trunk: its outermost list of as many modules as the model has blocks.

    Raise UserError if the trunk has no such list, or several.
    """
    count = trunk.config.num_hidden_layers
    parts = [(name, part) for name, part in trunk.named_modules() if isinstance(part, nn.ModuleList)]
    depths = {part: name.count(".") for name, part in parts if len(part) == count}
    stacks = [part for part, depth in depths.items() if depth == min(depths.values())]
    if len(stacks) != 1:
        raise UserError(f"model: cannot find the {count} blocks of a {trunk.config.model_type} model")
    return stacks[0]


def freeze_all_but_top(model: PreTrainedModel, trainable_layers: int) -> None:
    """Freeze the model except its top `trainable_layers` blocks, the norm after them, and an untied output head.

    Raise ConfigError if the model has fewer blocks.
    """
    trunk = get_trunk(model)
    stack = find_blocks(trunk)
    count = len(stack)
    if trainable_layers > count:
        raise ConfigError(f"model.trainable_layers: {trainable_layers} is more than the model's {count} blocks")
    head = model.get_output_embeddings()
    is_tied = head is None or head.weight is model.get_input_embeddings().weight
    model.requires_grad_(False)
    for part in [*stack[count - trainable_layers :], *find_parts_after(trunk, stack), *([] if is_tied else [head])]:
        part.requires_grad_(True)


def find_parts_after(trunk: PreTrainedModel, stack: nn.ModuleList) -> list[nn.Module]:
    """Return the modules beside the blocks that follow them, such as the last norm.

    OPT declares its norm before the blocks: without weights after them, the layer norms beside them are meant.
    """
    parts = list(next(part for part in trunk.modules() if stack in part.children()).children())
    after = [part for part in parts[parts.index(stack) + 1 :] if any(True for _ in part.parameters())]
    return after or [part for part in parts if isinstance(part, nn.LayerNorm)]


def make_frozen_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Return an untrained copy in evaluation mode whose parameters have the given dtype."""
    frozen = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in frozen.parameters():  # not the buffers: rotary frequencies keep their precision
        parameter.data = parameter.data.to(dtype)
    return frozen


def count_parameters(model: nn.Module) -> int:
    """Return the number of the model's parameters, trained or not."""
    return sum(parameter.numel() for parameter in model.parameters())


# --- context length -----------------------------------------------------------------------------------------

RECURRENT_MODELS = ("rwkv",)
"""Model types whose configuration names a context length that limits nothing but the training kernel."""


def get_context_length(model: PreTrainedModel) -> int | None:
    """Return the number of tokens that the model supports in one sequence; None if it has no limit.

    A position table whose first rows are for padding, as RoBERTa's, has as many positions less.
    """
    lengths = [
        part.num_embeddings - part.padding_idx - 1
        for name, part in model.named_modules()
        if isinstance(part, nn.Embedding) and "position" in name and part.padding_idx is not None
    ]
    configured = compute_context_length(model.config)
    return min([*lengths, *([] if configured is None else [configured])], default=None)


def compute_context_length(config: PretrainedConfig) -> int | None:
    """Return the context length that a configuration states, in tokens; None if it states none.

    A sliding window is no limit, and neither is ALiBi (2108.12409). Rotary frequencies that are scaled by a factor
    extend the context (linear; YaRN, 2309.00071), unless the configuration scales some layers only: then its length is
    the extended one. Frequencies that depend on the longest sequence of a batch (dynamic, longrope) support only
    lengths at which they are still the original ones; beyond, a token's log-prob depends on the rest of its batch.
    """
    config = config.get_text_config()
    length = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    if getattr(config, "alibi", False) or config.model_type in RECURRENT_MODELS or not length or length < 0:
        return None
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    if kind in ("linear", "yarn"):
        return int(max(length, (original or length) * factor))
    return int(min(length, original or length)) if kind == "longrope" else int(length)
