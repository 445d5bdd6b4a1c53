"""What a pass through a model costs, read off the model itself: two positions go through it, and are watched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apa_cli.hardware.roofline import Cost
from apa_cli.models.critic import Critic
from apa_cli.models.forward import TrainingModel
from apa_cli.models.lora import WithoutAdapter, adapter, underlying

Call = Callable[[dict[str, Tensor]], Any]


def policy_cost(model: PreTrainedModel | WithoutAdapter) -> Cost:
    """A causal language model, its output head included."""
    whole = underlying(model)
    return watched(whole, lambda inputs: model(**inputs, use_cache=False, logits_to_keep=1))


def classifier_cost(model: PreTrainedModel) -> Cost:
    """A sequence classifier, its score at every position included."""
    return watched(model, lambda inputs: model(**inputs))


def values_cost(model: TrainingModel, name: str) -> Cost:
    """A critic's values alone: its own trunk, or the policy's, and its head."""
    critic = model.critics[name]
    if critic.backbone is not None:
        trunk = watched(critic.backbone, lambda inputs: critic.backbone(**inputs, use_cache=False))
    else:
        shared = model.policy.base_model
        with ExitStack() as active:
            if critic.adapter is not None:
                active.enter_context(adapter(model.policy, critic.adapter))
            trunk = watched(shared, lambda inputs: shared(**inputs, use_cache=False))
    return trunk + value_head_cost(critic)


def value_head_cost(critic: Critic) -> Cost:
    weights = sum(weights_of(layer) for layer in critic.head.modules() if isinstance(layer, nn.Linear))
    return Cost(0, 0, 0, 0, 2 * weights, 4 * weights, weights, 0)


def training_cost(model: TrainingModel) -> Cost:
    """One pass of the update: the policy's and each critic's; a head on the policy's trunk adds no trunk."""
    cost = policy_cost(model.policy)
    for name, critic in model.critics.items():
        cost = cost + (value_head_cost(critic) if critic.on_trunk else values_cost(model, name))
    return cost


def weights_of(layer: nn.Linear | Conv1D) -> int:
    """Rows times columns, however a quantized layer packs them."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def watched(model: nn.Module, call: Call) -> Cost:
    """The cost of `call(inputs)`, a pass through `model`, by the linear layers and blocks that it uses.

    Experts that a model keeps in one tensor are no linear layers, and are not counted.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    config = model.config.get_text_config()
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=model.device)}
    used: list[tuple[nn.Module, bool]] = []  # linear layer, whether its input needs a gradient
    blocks: list[bool] = []  # of each block whether its output needs one

    def note_linear(layer: nn.Module, given: tuple[Tensor, ...]) -> None:
        used.append((layer, given[0].requires_grad))

    def note_block(block: nn.Module, given: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        blocks.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    with hooked(model, config.num_hidden_layers, note_linear, note_block), torch.enable_grad():
        call(inputs)
    forward = backward = head_forward = head_backward = 0
    for layer, input_gradient in used:
        size = weights_of(layer)
        gradients = 2 * size * (int(layer.weight.requires_grad) + int(input_gradient))
        if layer is head:
            head_forward, head_backward = 2 * size, gradients
        else:
            forward, backward = forward + 2 * size, backward + gradients
    heads, _, size = attention_heads(config)
    width = heads * size
    return Cost(
        linear=forward,
        linear_backward=backward,
        attention=4 * config.num_hidden_layers * width,
        attention_backward=8 * sum(blocks) * width,
        head=head_forward,
        head_backward=head_backward,
        weights=sum(weights_of(layer) for layer in {id(layer): layer for layer, _ in used}.values()),
        cached=cached_numbers(config),
    )


def attention_heads(config: PretrainedConfig) -> tuple[int, int, int]:
    """Heads of a layer, those that the key-value cache holds, and the size of one; 0 where a model has none."""
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def cached_numbers(config: PretrainedConfig) -> int:
    """Numbers that the key-value cache holds per position."""
    _, heads, size = attention_heads(config)
    return 2 * config.num_hidden_layers * heads * size


@contextmanager
def hooked(
    model: nn.Module, count: int, note_linear: Callable[..., None], note_block: Callable[..., None]
) -> Iterator[None]:
    """Calls `note_linear` before every linear layer, and `note_block` after each of the model's `count` blocks."""
    handles = [
        layer.register_forward_pre_hook(note_linear)
        for layer in model.modules()
        if isinstance(layer, nn.Linear | Conv1D)
    ]
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    handles += [block.register_forward_hook(note_block) for block in (stacks[0] if stacks else ())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
