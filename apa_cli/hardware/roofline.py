"""The least that an iteration's passes can cost: floating-point operations and bytes, by arithmetic alone.

Only what the true tokens need is counted; padding, rows that ended early and logits that nobody reads are not. A
multiply-add is two operations (FLOPs). Counted are matrix products: a linear layer of p weights takes 2p per position;
attention takes 4 times its width (heads · size of a head, over all layers) for each pair of a position and one that it
sees. A causal position sees itself and what is before it, so S positions have S(S + 1)/2 pairs, not S². The output
head is counted where logits are needed: once per response token.

Bytes are those of weights and of the key-value cache. Activations are left out: how often they travel to memory is the
implementation's choice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT32 = 4
"""Bytes of a trained weight, its gradient, and each of AdamW's two moments."""
OPTIMIZER_TRANSFERS = 7
"""AdamW reads a weight, its gradient and two moments, and writes the weight and the moments."""


@dataclass(frozen=True)
class Cost:
    """What one pass through a model costs. Costs add up: a policy's and its critic's."""

    linear: int
    """FLOPs per position, forward."""
    linear_backward: int
    """FLOPs per position, backward: 2p for the weights' gradient where they are trained, 2p for the input's where it
    needs one."""
    attention: int
    """FLOPs per pair of positions, forward."""
    attention_backward: int
    """The same backward: twice the forward in each block that is differentiated."""
    head: int
    """FLOPs per response token, forward."""
    head_backward: int
    weights: int
    """Weights of the linear layers and the head that a pass reads."""
    cached: int
    """Numbers that the key-value cache holds per position."""

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(mine + its for mine, its in zip(vars(self).values(), vars(other).values(), strict=True)))


@dataclass(frozen=True)
class Work:
    """What a phase of an iteration must do."""

    tokens: int
    """What it is counted in: response tokens drawn in sampling, else positions."""
    flops: int
    bytes: int

    def seconds(self, matrix_rate: float, copy_rate: float) -> float:
        """The floor: the longer of FLOPs over FLOP/s and bytes over bytes/s."""
        return max(self.flops / matrix_rate, self.bytes / copy_rate)


def pairs(lengths: Sequence[int]) -> int:
    """Pairs of positions that causal attention relates, in sequences of these lengths."""
    return sum(length * (length + 1) // 2 for length in lengths)


def inputs(prompts: Sequence[int], responses: Sequence[int]) -> list[int]:
    """Positions that are computed of each sequence: nothing is predicted from the last response token."""
    return [prompt + response - 1 for prompt, response in zip(prompts, responses, strict=True)]


def forward_flops(cost: Cost, lengths: Sequence[int], outputs: int) -> int:
    """One forward pass over sequences of these lengths, with logits for `outputs` tokens in all."""
    return sum(lengths) * cost.linear + pairs(lengths) * cost.attention + outputs * cost.head


def backward_flops(cost: Cost, lengths: Sequence[int], outputs: int, recomputed: bool) -> int:
    """The backward pass; with activations `recomputed`, the trunk's forward pass again."""
    again = forward_flops(cost, lengths, 0) if recomputed else 0
    gradients = sum(lengths) * cost.linear_backward + pairs(lengths) * cost.attention_backward
    return again + gradients + outputs * cost.head_backward


def forward_work(cost: Cost, lengths: Sequence[int], outputs: int, rows: int, itemsize: int) -> Work:
    """A forward pass, `rows` sequences at a time: all weights are read for each, `itemsize` bytes a number."""
    passes = math.ceil(len(lengths) / rows)
    return Work(sum(lengths), forward_flops(cost, lengths, outputs), passes * cost.weights * itemsize)


def sampling_work(cost: Cost, prompts: Sequence[int], responses: Sequence[int], rows: int, itemsize: int) -> Work:
    """Drawing responses with a key-value cache, at most `rows` side by side.

    A step reads all weights once; there are as many as the longest response has tokens, or as `rows` rows that are
    never idle need. To draw token t + 1 the keys and values of the prompt and t tokens are read; each is written once.
    """
    lengths, drawn = inputs(prompts, responses), sum(responses)
    steps = max(max(responses), math.ceil(drawn / rows))
    reads = pairs(lengths) - pairs(prompts)
    moved = steps * cost.weights + (reads + sum(lengths)) * cost.cached
    return Work(drawn, forward_flops(cost, lengths, drawn), moved * itemsize)


def update_work(
    cost: Cost,
    trained: int,
    prompts: Sequence[int],
    responses: Sequence[int],
    epochs: int,
    steps: int,
    passes: int,
    itemsize: int,
    recomputed: bool,
) -> Work:
    """All of an iteration's updates: `steps` of the optimizer on `trained` parameters, `passes` over microbatches.

    A pass reads the weights forward and backward and adds to the gradients; the first pass of a step only writes them.
    """
    lengths, outputs = inputs(prompts, responses), sum(responses)
    once = forward_flops(cost, lengths, outputs) + backward_flops(cost, lengths, outputs, recomputed)
    gradients = 2 * passes - steps
    moved = 2 * passes * cost.weights * itemsize + (gradients + steps * OPTIMIZER_TRANSFERS) * trained * FLOAT32
    return Work(epochs * sum(lengths), epochs * once, moved)
