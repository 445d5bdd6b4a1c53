"""KV-cache layers for decoding: preallocated buffers that are rarely copied, and static buffers for CUDA graphs."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import LongTensor, Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from apa_cli.models.lora import AdapterDisabledModel, unwrap_model
from apa_cli.models.sequence_packing import can_pack


class PreallocatedCacheLayer(DynamicLayer):
    """Keys and values [B, heads, S, dim] in buffers with spare room, so that appending a token rarely copies them."""

    SPARE_TOKENS = 128
    """Tokens of spare room in new buffers."""

    def __init__(self, min_dtype: torch.dtype | None = None):
        """Create an empty layer; `min_dtype` is the lowest precision of its keys and values (None: the model's own)."""
        super().__init__()
        self.min_dtype = min_dtype
        self.buffers: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, heads, new, dim] and return all of them, [B, heads, S, dim]."""
        if self.min_dtype is not None:
            dtype = torch.promote_types(key_states.dtype, self.min_dtype)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length, count = self.get_seq_length(), key_states.shape[-2]
        if self.buffers is None or length + count > self.buffers[0].shape[-2]:
            room = length + count + self.SPARE_TOKENS
            key_buffer, value_buffer = (
                states.new_empty(*states.shape[:2], room, states.shape[3]) for states in (key_states, value_states)
            )
            if self.keys is not None and self.values is not None and length:
                key_buffer[:, :, :length] = self.keys
                value_buffer[:, :, :length] = self.values
            self.buffers = key_buffer, value_buffer
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, length : length + count] = states
        keys, values = (buffer[:, :, : length + count] for buffer in self.buffers)
        self.keys, self.values = keys, values
        return keys, values

    def reorder_cache(self, beam_idx: LongTensor) -> None:
        """Select rows of the batch; the next token gets new buffers."""
        super().reorder_cache(beam_idx)
        self.buffers = None

    def reset(self) -> None:
        """Release all memory."""
        self.keys = self.values = self.buffers = None
        self.is_initialized = False


class StaticCacheLayer(DynamicLayer):
    """Keys and values [B, heads, S, dim] at fixed addresses; S counts all tokens to come, which attention masks."""

    def __init__(self, layer: PreallocatedCacheLayer, extra_tokens: int, cache_position: Tensor):
        """Take over the content of `layer`, which is released, with zeros for `extra_tokens` behind it.

        `cache_position` [1] is the position of the next token, advanced by the decoder.
        """
        super().__init__()
        self.cache_position = cache_position
        assert layer.keys is not None and layer.values is not None
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, extra_tokens)) for x in (layer.keys, layer.values))
        self.is_initialized = True
        layer.reset()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write one token's keys and values [B, heads, 1, dim] in place and return the whole buffers."""
        keys, values = self.keys, self.values
        assert keys is not None and values is not None
        keys.index_copy_(2, self.cache_position, key_states.to(keys.dtype))
        values.index_copy_(2, self.cache_position, value_states.to(values.dtype))
        return keys, values


def build_kv_cache(model: PreTrainedModel | AdapterDisabledModel) -> DynamicCache:
    """Return a cache of `PreallocatedCacheLayer`s; layers of other types, such as sliding windows, stay as they are."""
    cache = DynamicCache(config=model.config)
    min_dtype = torch.float32 if can_pack(model) else None  # packed attention on a CPU computes in float32
    cache.layers = [
        PreallocatedCacheLayer(min_dtype) if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    return cache


def make_static_cache(cache: DynamicCache, extra_tokens: int, cache_position: Tensor) -> DynamicCache:
    """Return a cache of `StaticCacheLayer`s that takes over the content of `cache`, with room for `extra_tokens`.

    Raise TypeError if a layer is not preallocated, such as a sliding window's.
    """
    layers = []
    for layer in cache.layers:
        if not isinstance(layer, PreallocatedCacheLayer):
            raise TypeError(f"{type(layer).__name__} has no static counterpart")
        layers.append(layer)
    static = DynamicCache()
    static.layers = [StaticCacheLayer(layer, extra_tokens, cache_position) for layer in layers]
    return static


def find_cache_argument(model: PreTrainedModel | AdapterDisabledModel) -> str:
    """Return the name of the model's cache argument: `past_key_values`, or `cache` in newer transformers."""
    return "cache" if "cache" in inspect.signature(unwrap_model(model).forward).parameters else "past_key_values"
