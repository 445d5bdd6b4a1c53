"""Roofline of an iteration: the minimum FLOPs and bytes of its passes, by arithmetic alone.

Only work for real tokens is counted: no padding, no rows that ended early, no unused logits. FLOPs are those of matrix
products, a multiply-add being two. A linear layer of p weights takes 2p FLOPs per position. Attention takes 4 times its
width (heads · head size, summed over layers) for each pair of a position and a position it attends to. A causal
position attends to itself and all positions before it, so S positions have S(S + 1)/2 pairs, not S². The output head is
counted once per response token, the only positions whose logits are needed.

Bytes are those of weights and of the KV cache. Activations are left out: how often they move to and from memory depends
on the implementation.

Source of the method: Williams, Waterman and Patterson, "Roofline: an insightful visual performance model for multicore
architectures", 2009.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT32 = 4
"""Bytes of one number: a trained weight, its gradient, or one of AdamW's two moments."""
OPTIMIZER_TRANSFERS = 7
"""Transfers per weight and step: AdamW reads the weight, its gradient and two moments, writes the weight and both
moments."""


@dataclass(frozen=True)
class ModelCost:
    """Cost of one pass through a model. Costs add up, for instance a policy's and its critic's."""

    linear: int
    """FLOPs per position, forward."""
    linear_backward: int
    """FLOPs per position, backward: 2p for the gradient of trained weights, and 2p for that of the input if needed."""
    attention: int
    """FLOPs per pair of positions, forward."""
    attention_backward: int
    """FLOPs per pair of positions, backward: twice the forward in each differentiated block."""
    head: int
    """FLOPs per response token, forward."""
    head_backward: int
    """FLOPs per response token, backward."""
    weights: int
    """Number of weights of linear layers and head that a pass reads."""
    kv_cache_numbers: int
    """Numbers that the KV cache holds per position."""

    def __add__(self, other: ModelCost) -> ModelCost:
        return ModelCost(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Work:
    """Minimum work of one phase of an iteration."""

    tokens: int
    """Unit of the phase's throughput: response tokens in sampling, else positions."""
    flops: int
    """Floating-point operations."""
    bytes: int
    """Bytes read and written."""

    def min_seconds(self, matrix_rate: float, copy_rate: float) -> float:
        """Return the roofline's lower bound in seconds: max(flops / matrix_rate, bytes / copy_rate).

        `matrix_rate` is in FLOP/s, `copy_rate` in bytes/s.
        """
        return max(self.flops / matrix_rate, self.bytes / copy_rate)


def count_attention_pairs(lengths: Sequence[int]) -> int:
    """Return the number of position pairs of causal attention in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def count_input_positions(prompts: Sequence[int], responses: Sequence[int]) -> list[int]:
    """Return the computed positions of each sequence: all but the last response token, which predicts nothing."""
    return [prompt + response - 1 for prompt, response in zip(prompts, responses, strict=True)]


def count_forward_flops(cost: ModelCost, lengths: Sequence[int], outputs: int) -> int:
    """Return the FLOPs of a forward pass over sequences of these lengths, with logits for `outputs` tokens in all."""
    return sum(lengths) * cost.linear + count_attention_pairs(lengths) * cost.attention + outputs * cost.head


def count_backward_flops(cost: ModelCost, lengths: Sequence[int], outputs: int, recomputed: bool) -> int:
    """Return the FLOPs of a backward pass; with activations `recomputed`, the trunk's forward pass is counted again."""
    recomputation = count_forward_flops(cost, lengths, 0) if recomputed else 0
    gradients = sum(lengths) * cost.linear_backward + count_attention_pairs(lengths) * cost.attention_backward
    return recomputation + gradients + outputs * cost.head_backward


def estimate_forward_work(cost: ModelCost, lengths: Sequence[int], outputs: int, rows: int, itemsize: int) -> Work:
    """Return the work of a forward pass in microbatches of `rows` sequences, with `itemsize` bytes per number.

    Each microbatch reads all weights once.
    """
    passes = math.ceil(len(lengths) / rows)
    return Work(sum(lengths), count_forward_flops(cost, lengths, outputs), passes * cost.weights * itemsize)


def estimate_sampling_work(
    cost: ModelCost, prompts: Sequence[int], responses: Sequence[int], rows: int, itemsize: int
) -> Work:
    """Return the work of sampling responses with a KV cache, at most `rows` in parallel.

    A decode step reads all weights once. The number of steps is the larger of the longest response's length and the
    tokens divided by `rows`. Sampling token t + 1 reads the keys and values of the prompt and t tokens; each position's
    keys and values are written once.
    """
    lengths, tokens = count_input_positions(prompts, responses), sum(responses)
    steps = max(max(responses), math.ceil(tokens / rows))
    reads = count_attention_pairs(lengths) - count_attention_pairs(prompts)
    transfers = steps * cost.weights + (reads + sum(lengths)) * cost.kv_cache_numbers
    return Work(tokens, count_forward_flops(cost, lengths, tokens), transfers * itemsize)


def estimate_update_work(
    cost: ModelCost,
    trained: int,
    prompts: Sequence[int],
    responses: Sequence[int],
    epochs: int,
    steps: int,
    passes: int,
    itemsize: int,
    recomputed: bool,
) -> Work:
    """Return the work of an iteration's updates: `epochs` over the sequences, with activations `recomputed` or not.

    `steps` optimizer steps on `trained` parameters take `passes` forward and backward passes over microbatches. A pass
    reads the weights twice and adds to the gradients (a read and a write each); the first pass of a step only writes
    the gradients.
    """
    lengths, outputs = count_input_positions(prompts, responses), sum(responses)
    epoch_flops = count_forward_flops(cost, lengths, outputs) + count_backward_flops(cost, lengths, outputs, recomputed)
    gradient_transfers = 2 * passes - steps
    weight_bytes = 2 * passes * cost.weights * itemsize
    trained_bytes = (gradient_transfers + steps * OPTIMIZER_TRANSFERS) * trained * FLOAT32
    return Work(epochs * sum(lengths), epochs * epoch_flops, weight_bytes + trained_bytes)
