"""Faster linear layers for decoding on a CPU, whose products have one position per row."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import AdapterDisabledModel, unwrap_model

MAX_COPY_BYTES = 2**31
"""Bytes of packed weights up to which a second copy of them is held."""


@contextmanager
def use_fast_linears(model: PreTrainedModel | AdapterDisabledModel) -> Iterator[None]:
    """Within the block, let linear layers on a CPU multiply by packed copies of their weights, without gradients.

    The copies have autocast's dtype and oneDNN's memory layout. The model's weights are unchanged and must not be
    changed in the block. Models whose copies exceed `MAX_COPY_BYTES` keep their layers.
    """
    autocast_dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    layers = [
        module
        for module in unwrap_model(model).modules()
        if isinstance(module, nn.Linear | Conv1D)
        and type(module) in (nn.Linear, Conv1D)  # a subclass may compute something else
        and "forward" not in vars(module)
    ]
    size = sum(layer.weight.numel() * (autocast_dtype or layer.weight.dtype).itemsize for layer in layers)
    replaced = []
    try:
        for layer in layers if model.device.type == "cpu" and size <= MAX_COPY_BYTES else []:
            forward = make_fast_forward(layer, autocast_dtype or layer.weight.dtype)
            if forward is not None:
                vars(layer)["forward"] = forward
                replaced.append(layer)
        yield
    finally:
        for layer in replaced:
            del vars(layer)["forward"]


def make_fast_forward(layer: nn.Linear | Conv1D, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """Return a faster forward function of the layer in this dtype; None if there is none."""
    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    multiply = matmul.prepack_linear(weight.detach().to(dtype)) if weight.is_floating_point() else None
    if multiply is None:
        return None
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return lambda inputs: multiply(inputs.to(dtype), bias)
