"""Frozen copies of a model."""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel


def frozen_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A copy that is not trained, in the compute dtype."""
    copied = copy.deepcopy(model).requires_grad_(False).eval()
    for parameter in copied.parameters():  # not the buffers: rotary frequencies stay as exact as they are
        parameter.data = parameter.data.to(dtype)
    return copied
