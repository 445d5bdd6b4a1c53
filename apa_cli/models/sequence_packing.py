"""Sequences of different lengths in one row, one behind the other, so that nothing is computed for padding.

On a CPU. Only attention looks from one position to another; it is taken sequence by sequence, the rest of the model
over all positions at once.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import WithoutAdapter, underlying

ATTENTION = "sdpa_by_sequence"
"""The name in `transformers` of `attention`."""

RESTRICTIONS = ("sliding_window", "position_bias", "indices", "block_indices")
"""What layers call the options by which they restrict attention; here none is kept to."""

_tried: list[bool] | None = None
"""While a model is tried: for each call of `attention` with several sequences, whether it knew all that was asked."""


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Scaled dot-product attention as `transformers` has it; with `sequence_lengths` causal in each sequence alone.

    query, key, value [1, heads, Σ lengths, dim] → [1, Σ lengths, heads, dim].
    """
    lengths = options.pop("sequence_lengths", None)
    if lengths is None:
        return in_fast_precision(module, query, key, value, attention_mask, **options), None
    options.pop("is_causal", None)
    if _tried is not None:
        plain = attention_mask is not None and attention_mask.numel() == 1
        _tried.append(plain and all(options.get(name) is None for name in RESTRICTIONS))
    parts = zip(*(x.split(lengths, dim=2) for x in (query, key, value)), strict=True)
    return torch.cat([in_fast_precision(module, *part, None, is_causal=True, **options) for part in parts], dim=1), None


WIDE = 128
"""Keys up to which attention of half precision is computed in float32, which is faster on a CPU. That of one query
always is."""


def in_fast_precision(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """`transformers`' scaled dot-product attention; the result has the query's precision, or autocast's.

    Keys and values may come in another precision: a cache holds them in float32.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    if _tried is not None or (query.shape[2] > 1 and key.shape[2] > WIDE):
        return sdpa_attention_forward(module, query, key.to(dtype), value.to(dtype), mask, **options)[0]
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    with torch.autocast("cpu", enabled=False):
        result, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return result.to(dtype)


def packed_inputs(input_ids: Tensor, position_ids: Tensor, lengths: list[int]) -> dict[str, Any]:
    """Model inputs of tokens [Σ lengths] that lie one sequence behind the other.

    Behind them comes a sequence of nothing where products of a longer row are faster.
    """
    if more := matmul.rounded(len(input_ids)) - len(input_ids):
        input_ids = nn.functional.pad(input_ids, (0, more))
        position_ids = torch.cat([position_ids, torch.arange(more, device=position_ids.device)])
        lengths = [*lengths, more]
    return {
        "input_ids": input_ids.unsqueeze(0),
        "position_ids": position_ids.unsqueeze(0),
        # A mask of four dimensions is handed on as it is: none is made, and none is read.
        "attention_mask": input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "sequence_lengths": lengths,
    }


WORTH = 4
"""Positions of padding per sequence, on average, from which on packing is faster; below, taking attention apart costs
more than it saves."""

_packs: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `packs` found out."""


def packs(model: nn.Module | WithoutAdapter) -> bool:
    """Whether packed sequences give what each gives alone; the model then takes them from here on.

    That is found out by passes over two short sequences: all layers must call `attention`, with nothing that it does
    not know, and nothing else may look from one sequence into the other.
    """
    whole = underlying(model)
    trunk = getattr(whole, "base_model", whole)
    if trunk not in _packs:
        _packs[trunk] = (
            trunk.device.type == "cpu" and trunk.config._attn_implementation in ("sdpa", ATTENTION) and tried(trunk)
        )
    return _packs[trunk]


@torch.no_grad()
def tried(trunk: nn.Module) -> bool:
    """`packs`, found out; where it is so the trunk's attention is `attention` afterwards, else what it was."""
    global _tried
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = trunk.config.get_text_config()
    if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "output_router_logits")):
        return False  # two short sequences would not show what they do
    AttentionInterface.register(ATTENTION, attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    config._attn_implementation = "sdpa"
    ids, places = torch.tensor([1, 2, 3, 4, 5]) % config.vocab_size, torch.tensor([0, 1, 2, 0, 1])
    _tried = []
    try:
        alone = [
            trunk(input_ids=part.unsqueeze(0), attention_mask=torch.ones(1, len(part)), use_cache=False)
            for part in ids.split([3, 2])
        ]
        config._attn_implementation = ATTENTION
        together = trunk(**packed_inputs(ids, places, [3, 2]), use_cache=False).last_hidden_state[0, : len(ids)]
        known = len(_tried) == config.num_hidden_layers and all(_tried)
        apart = torch.cat([output.last_hidden_state[0] for output in alone])
        near = 1e-4 if apart.dtype is torch.float32 else 0.05
        found = known and float((together - apart).abs().max()) <= near * float(apart.abs().max())
    except Exception:  # whatever a model does with inputs that it does not know
        found = False
    _tried = None
    if not found:
        config._attn_implementation = "sdpa"
    return found
