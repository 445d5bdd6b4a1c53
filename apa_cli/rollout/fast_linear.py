"""Weights as the drawing of tokens, one position of each row at a time, multiplies them fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import WithoutAdapter, underlying

MOST = 2**31
"""Bytes of weights, as they are multiplied, up to which a second copy of them is held."""


@contextmanager
def prepared(model: PreTrainedModel | WithoutAdapter) -> Iterator[None]:
    """On a CPU: in the block, which computes no gradients, linear layers multiply by copies of their weights.

    These are in the precision that autocast asks for, and in the order in which oneDNN reads them. The weights of the
    model stay what they are, and must not change in the block.
    """
    low = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
    layers = [m for m in underlying(model).modules() if type(m) in (nn.Linear, Conv1D) and "forward" not in vars(m)]
    size = sum(m.weight.numel() * (low or m.weight.dtype).itemsize for m in layers)
    changed = []
    try:
        for layer in layers if model.device.type == "cpu" and size <= MOST else []:
            product = product_with(layer, low or layer.weight.dtype)
            if product is not None:
                layer.forward = product
                changed.append(layer)
        yield
    finally:
        for layer in changed:
            del layer.forward


def product_with(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """`layer.forward` in the given precision; None where it is best as it is."""
    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    multiply = matmul.product_with(weight.detach().to(dtype)) if weight.is_floating_point() else None
    if multiply is None:
        return None
    bias = None if layer.bias is None else layer.bias.detach().to(dtype)
    return lambda inputs: multiply(inputs.to(dtype), bias)
