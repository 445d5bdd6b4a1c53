"""Cost of a pass through a model, measured by hooks during a pass of two positions; see `hardware.roofline`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apa_cli.hardware.roofline import ModelCost
from apa_cli.models.critic import CriticModule
from apa_cli.models.forward import TrainingModel
from apa_cli.models.lora import AdapterDisabledModel, unwrap_model, use_adapter
from apa_cli.models.structure import get_trunk

ModelCall = Callable[[dict[str, Tensor]], Any]
"""A pass through a model with the given inputs."""
LinearLayer = nn.Linear | Conv1D


def measure_policy_cost(model: PreTrainedModel | AdapterDisabledModel) -> ModelCost:
    """Return the cost of a causal language model, its output head included."""
    return measure_cost(unwrap_model(model), lambda inputs: model(**inputs, use_cache=False, logits_to_keep=1))


def measure_classifier_cost(model: PreTrainedModel) -> ModelCost:
    """Return the cost of a sequence classifier, its score at every position included."""
    return measure_cost(model, lambda inputs: model(**inputs))


def measure_critic_cost(model: TrainingModel, name: str) -> ModelCost:
    """Return the cost of one critic's values alone: of its backbone or the policy's trunk, and of its head.

    "NAME/target" is a critic's Polyak copy.
    """
    critic = model.get_critic(name)
    trunk = get_trunk(model.policy) if critic.backbone is None else critic.backbone
    with nullcontext() if critic.adapter is None else use_adapter(model.policy, critic.adapter):
        trunk_cost = measure_cost(trunk, lambda inputs: trunk(**inputs, use_cache=False))
    return trunk_cost + compute_value_head_cost(critic)


def compute_value_head_cost(critic: CriticModule) -> ModelCost:
    """Return the cost of a critic's head at each response token: 2 FLOPs per weight forward, 4 backward if trained."""
    layers = [layer for layer in critic.head.modules() if isinstance(layer, nn.Linear)]
    weights = sum(map(count_weights, layers))
    backward = 4 * weights if layers[0].weight.requires_grad else 0
    return ModelCost(0, 0, 0, 0, 2 * weights, backward, weights, 0)


def measure_training_cost(model: TrainingModel) -> ModelCost:
    """Return the cost of the update's pass: policy and critics; a head on the policy's trunk shares its pass."""
    cost = measure_policy_cost(model.policy)
    for name in model.list_critics():
        critic = model.get_critic(name)
        cost = cost + (compute_value_head_cost(critic) if critic.is_on_trunk else measure_critic_cost(model, name))
    return cost


def count_weights(layer: LinearLayer) -> int:
    """Return rows times columns of a layer's weight, also for a quantized layer, which packs its weights."""
    return layer.in_features * layer.out_features if isinstance(layer, nn.Linear) else layer.weight.numel()


def measure_cost(model: PreTrainedModel, call: ModelCall) -> ModelCost:
    """Return the cost of `call(inputs)`, a pass through `model`, from the linear layers and blocks that it uses.

    Mixture-of-experts weights in one tensor are not linear layers and are not counted.
    """
    head = model.get_output_embeddings()
    config = model.config.get_text_config()
    inputs = {"input_ids": torch.zeros(1, 2, dtype=torch.int64, device=model.device)}
    linear_calls: list[tuple[LinearLayer, bool]] = []  # each with True if the layer's input needs a gradient
    differentiated_blocks = 0

    def record_linear(layer: LinearLayer, inputs: tuple[Tensor, ...]) -> None:
        linear_calls.append((layer, inputs[0].requires_grad))

    def record_block(block: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        nonlocal differentiated_blocks
        differentiated_blocks += (output[0] if isinstance(output, tuple) else output).requires_grad

    with hook_layers(model, config.num_hidden_layers, record_linear, record_block), torch.enable_grad():
        call(inputs)
    forward = backward = head_forward = head_backward = 0
    for layer, input_needs_gradient in linear_calls:
        size = count_weights(layer)
        gradients = 2 * size * (int(layer.weight.requires_grad) + int(input_needs_gradient))
        if layer is head:
            head_forward, head_backward = 2 * size, gradients
        else:
            forward, backward = forward + 2 * size, backward + gradients
    heads, _, size = get_attention_shape(config)
    width = heads * size
    return ModelCost(
        linear=forward,
        linear_backward=backward,
        attention=4 * config.num_hidden_layers * width,
        attention_backward=8 * differentiated_blocks * width,
        head=head_forward,
        head_backward=head_backward,
        weights=sum(count_weights(layer) for layer in {id(layer): layer for layer, _ in linear_calls}.values()),
        kv_cache_numbers=count_kv_cache_numbers(config),
    )


def get_attention_shape(config: PretrainedConfig) -> tuple[int, int, int]:
    """Return a layer's number of attention heads, of key-value heads, and the head size; 0 without attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    size = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return heads, getattr(config, "num_key_value_heads", None) or heads, size


def count_kv_cache_numbers(config: PretrainedConfig) -> int:
    """Return the numbers that the KV cache holds per position."""
    _, heads, size = get_attention_shape(config)
    return 2 * config.num_hidden_layers * heads * size


@contextmanager
def hook_layers(
    model: nn.Module, block_count: int, before_linear: Callable[..., None], after_block: Callable[..., None]
) -> Iterator[None]:
    """Within the block, call `before_linear` before each linear layer and `after_block` after each model block."""
    handles = [
        layer.register_forward_pre_hook(before_linear)
        for layer in model.modules()
        if isinstance(layer, nn.Linear | Conv1D)
    ]
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == block_count]
    handles += [block.register_forward_hook(after_block) for block in (stacks[0] if stacks else ())]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
