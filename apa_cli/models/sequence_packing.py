"""Sequence packing: sequences of different lengths concatenated in one row, without padding. CPU only.

Attention, the only part in which positions see each other, is computed for each sequence separately; the rest of the
model is computed for all positions at once.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import AdapterDisabledModel, unwrap_model
from apa_cli.models.structure import get_trunk

ATTENTION_NAME = "sdpa_by_sequence"
"""Name under which `transformers` knows `attend_per_sequence`."""

RESTRICTION_OPTIONS = ("sliding_window", "position_bias", "indices", "block_indices")
"""Options by which layers restrict attention; `attend_per_sequence` supports none of them."""

MIN_PADDING_PER_SEQUENCE = 4
"""Mean number of padded positions per sequence from which on packing is faster (measured). With less padding, separate
attention costs more time than packing saves."""

MAX_FLOAT32_KEYS = 128
"""Number of keys up to which half-precision attention is computed in float32, which is faster on a CPU. Attention of a
single query is computed in float32 for any number of keys."""

_probe_calls: list[bool] | None = None
"""During a probe: for each call of `attend_per_sequence` with several sequences, True if it supports all options."""

_packing_support: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Results of the probes of `can_pack`, by trunk."""


def attend_per_sequence(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute `transformers`' scaled dot-product attention; with `sequence_lengths`, causal within each sequence.

    query, key, value [1, heads, Σ lengths, dim] → [1, Σ lengths, heads, dim].
    """
    lengths = options.pop("sequence_lengths", None)
    if lengths is None:
        return attend_in_fast_precision(module, query, key, value, attention_mask, **options), None
    options.pop("is_causal", None)
    if _probe_calls is not None:
        has_packing_mask = attention_mask is not None and attention_mask.numel() == 1
        _probe_calls.append(has_packing_mask and all(options.get(name) is None for name in RESTRICTION_OPTIONS))
    parts = zip(query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True)
    outputs = [attend_in_fast_precision(module, q, k, v, None, is_causal=True, **options) for q, k, v in parts]
    return torch.cat(outputs, dim=1), None


def attend_in_fast_precision(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **options: Any
) -> Tensor:
    """Compute `transformers`' scaled dot-product attention in float32 if that is faster; the result has query's dtype.

    Keys and values may have another precision: a KV cache holds them in float32.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    dtype = query.dtype
    if _probe_calls is not None or (query.shape[2] > 1 and key.shape[2] > MAX_FLOAT32_KEYS):
        return sdpa_attention_forward(module, query, key.to(dtype), value.to(dtype), mask, **options)[0]
    query, key, value = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (query, key, value))
    if mask is not None and mask.is_floating_point():
        mask = mask.to(query.dtype)
    with torch.autocast("cpu", enabled=False):
        result, _ = sdpa_attention_forward(module, query, key, value, mask, **options)
    return result.to(dtype)


def pack_inputs(input_ids: Tensor, position_ids: Tensor, lengths: list[int]) -> dict[str, Any]:
    """Return model inputs for the tokens [Σ lengths] of concatenated sequences.

    A further sequence of zeros is appended if a longer row has faster matrix products; see `cpu_matmul`.
    """
    if more := matmul.round_positions(len(input_ids)) - len(input_ids):
        input_ids = nn.functional.pad(input_ids, (0, more))
        position_ids = torch.cat([position_ids, torch.arange(more, device=position_ids.device)])
        lengths = [*lengths, more]
    return {
        "input_ids": input_ids.unsqueeze(0),
        "position_ids": position_ids.unsqueeze(0),
        # `transformers` passes on a mask of four dimensions as it is, and `attend_per_sequence` does not read it.
        "attention_mask": input_ids.new_ones(1, 1, 1, 1, dtype=torch.bool),
        "sequence_lengths": lengths,
    }


def can_pack(model: PreTrainedModel | AdapterDisabledModel) -> bool:
    """Return True if the model's outputs for packed sequences equal the outputs for each sequence alone.

    The first call for a model runs `probe_packing`, which sets `attend_per_sequence` as the attention of a model that
    can pack.
    """
    trunk = get_trunk(unwrap_model(model))
    if trunk not in _packing_support:
        has_sdpa = trunk.config._attn_implementation in ("sdpa", ATTENTION_NAME)
        _packing_support[trunk] = trunk.device.type == "cpu" and has_sdpa and probe_packing(trunk)
    return _packing_support[trunk]


@torch.no_grad()
def probe_packing(trunk: PreTrainedModel) -> bool:
    """Return True if two short sequences give the same hidden states packed as alone.

    All layers must call `attend_per_sequence` with supported options. If the probe succeeds, the trunk's attention is
    `attend_per_sequence` from then on; else it stays `sdpa`.
    """
    global _probe_calls
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config = trunk.config.get_text_config()
    if any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "output_router_logits")):
        return False  # two short sequences would not show the effect of these
    AttentionInterface.register(ATTENTION_NAME, attend_per_sequence)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
    config._attn_implementation = "sdpa"
    ids, positions = torch.tensor([1, 2, 3, 4, 5]) % config.vocab_size, torch.tensor([0, 1, 2, 0, 1])
    _probe_calls = []
    try:
        outputs = [
            trunk(input_ids=part.unsqueeze(0), attention_mask=torch.ones(1, len(part)), use_cache=False)
            for part in ids.split([3, 2])
        ]
        config._attn_implementation = ATTENTION_NAME
        packed = trunk(**pack_inputs(ids, positions, [3, 2]), use_cache=False).last_hidden_state[0, : len(ids)]
        is_supported = len(_probe_calls) == config.num_hidden_layers and all(_probe_calls)
        alone = torch.cat([output.last_hidden_state[0] for output in outputs])
        tolerance = 1e-4 if alone.dtype is torch.float32 else 0.05
        is_equal = is_supported and float((packed - alone).abs().max()) <= tolerance * float(alone.abs().max())
    except Exception:  # models raise all kinds of errors for inputs that they do not expect
        is_equal = False
    _probe_calls = None
    if not is_equal:
        config._attn_implementation = "sdpa"
    return is_equal
