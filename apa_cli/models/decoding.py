"""Weights as the drawing of tokens, one position of each row at a time, multiplies them fastest."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from apa_cli import matmul
from apa_cli.models.lora import WithoutAdapter, underlying

MOST = 2**31
"""Bytes of weights, as they are multiplied, up to which a CPU holds a second copy of them."""


@contextmanager
def prepared(model: PreTrainedModel | WithoutAdapter) -> Iterator[None]:
    """In the block, which computes no gradients, the model's linear layers multiply by copies of their weights.

    Autocast would otherwise convert them again for every token; on a CPU they are also put into the order in which
    oneDNN reads them. The weights of the model stay what they are, and must not change in the block.
    """
    kind = model.device.type
    low = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    layers = [m for m in underlying(model).modules() if type(m) in (nn.Linear, Conv1D) and "forward" not in vars(m)]
    size = sum(m.weight.numel() * (low or m.weight.dtype).itemsize for m in layers)
    changed = []
    if kind != "cpu" or size <= MOST:
        for layer in layers:
            product = product_with(layer, low or layer.weight.dtype)
            if product is not None:
                layer.forward = product
                changed.append(layer)
    try:
        yield
    finally:
        for layer in changed:
            del layer.forward


def product_with(layer: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """`layer.forward` in the given precision; None where it is best as it is."""
    weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
    if not weight.is_floating_point():
        return None
    held, bias = weight.detach().to(dtype), layer.bias
    bias = None if bias is None else bias.detach().to(dtype)
    multiply = matmul.product_with(held)
    if multiply is None:
        if held.dtype is weight.dtype:
            return None

        def multiply(rows: Tensor, bias: Tensor | None) -> Tensor:
            return nn.functional.linear(rows, held, bias)

    return lambda inputs: multiply(inputs.to(dtype), bias)
