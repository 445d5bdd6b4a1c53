"""The output head: log-probs of chosen tokens from the states before it, without the logits of a whole batch.

The head, a linear layer to the vocabulary, is most of a small model's work and nearly all of its memory. Here its
logits are computed a piece of the tokens at a time, and become, in place, what the backward pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import WithoutAdapter, underlying

PIECE = 2**25
"""Logits that are computed at a time, in numbers: 128 MiB in float32."""
KEPT = 2**28
"""Bytes of logits that a forward pass leaves for its backward pass, which computes those beyond once more."""


def pieces(rows: int, vocabulary: int) -> list[slice]:
    """Nearly equal parts of `rows` tokens, each of at most `PIECE` logits, and of one token at least; none is longer
    than the first."""
    most = max(1, PIECE // vocabulary)
    size = math.ceil(rows / max(1, math.ceil(rows / most))) or 1
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class ChosenLogprobs(torch.autograd.Function):
    """log softmax((states · weightᵀ + bias) / temperature)[token] in float32, for each row of states.

    The gradient to the logits is −(softmax − one-hot) / temperature. The forward pass turns the logits into that
    difference, in their own precision, so that the backward pass is nothing but its products with weight and states.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float, keep: bool
    ) -> Tensor:
        """states [N, h], weight [V, h], bias [V], token_ids [N] → [N]; `keep` where a backward pass may follow."""
        logprobs = torch.empty(len(states), device=states.device)
        low, offset = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        room = KEPT // (len(weight) * states.element_size()) if keep else 0
        kept: list[Tensor] = []
        for part in pieces(len(states), len(weight)):
            logits = nn.functional.linear(states[part], low, offset)
            logprobs[part] = to_difference(logits, token_ids[part], temperature)
            if part.stop <= room:
                kept.append(logits)
            del logits
        ctx.save_for_backward(states, weight, bias, token_ids, *kept)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states, weight, bias, token_ids, *kept = ctx.saved_tensors
        to_states, to_weight, to_bias = ctx.needs_input_grad[:3]
        low, offset = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        scale = (-gradient / ctx.temperature).unsqueeze(-1)
        of_states = torch.empty_like(states) if to_states else None
        of_weight = torch.zeros_like(weight) if to_weight else None
        of_bias = torch.zeros_like(bias) if to_bias else None
        for number, part in enumerate(pieces(len(states), len(weight))):
            if number < len(kept):
                difference = kept[number]
            else:
                difference = nn.functional.linear(states[part], low, offset)
                to_difference(difference, token_ids[part], ctx.temperature)
            if to_states:
                of_states[part] = scale[part] * (difference @ low)
            scaled = (scale[part] * states[part]).to(difference.dtype)
            if to_weight:
                of_weight += (difference.T @ scaled).to(weight.dtype)
            if to_bias:
                of_bias += difference.T @ scale[part].squeeze(-1).to(difference.dtype)
            del difference
        return of_states, of_weight, of_bias, None, None, None


def to_difference(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature)[token], [n] float32; `logits` [n, V] becomes softmax − one-hot.

    All in float32. log softmax(x)[token] is x[token] − max x + log max softmax(x): nothing of [n, V] is logged.
    """
    wide = logits.float()
    if temperature != 1:
        wide = wide.div_(temperature) if wide is logits else wide / temperature
    chosen = token_ids.unsqueeze(-1)
    above = wide.gather(-1, chosen) - wide.amax(-1, keepdim=True)
    torch.softmax(wide, -1, out=wide)
    logprobs = above + wide.amax(-1, keepdim=True).log()
    wide.scatter_add_(-1, chosen, wide.new_full(chosen.shape, -1.0))
    if wide is not logits:
        logits.copy_(wide)
    return logprobs.squeeze(-1)


def chosen_logprobs(
    states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
) -> Tensor:
    """`ChosenLogprobs` in the precision that autocast asks for. states [N, h], token_ids [N] → [N] float32."""
    kind = states.device.type
    states = states.to(torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype)
    inputs = [x for x in (states, weight, bias) if x is not None]
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    more = matmul.rounded(len(states)) - len(states)
    rows, token_ids = nn.functional.pad(states, (0, 0, 0, more)), nn.functional.pad(token_ids, (0, more))
    with torch.autocast(kind, enabled=False):
        return ChosenLogprobs.apply(rows, weight, bias, token_ids, temperature, keep)[: len(states)]


# Which models

_linear: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""What `linear_head` found out."""


def linear_head(model: PreTrainedModel | WithoutAdapter) -> nn.Linear | None:
    """The model's head, where it is a plain linear layer and what it returns are the model's logits, untouched.

    Some models scale or cap them afterwards. That is found out by one pass with a single token in which the head
    returns a tensor of zeros: the model must hand on that very tensor.
    """
    whole = underlying(model)
    head = whole.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    if whole not in _linear:
        zeros = torch.zeros(1, 1, head.out_features, device=whole.device)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=whole.device)
        with torch.no_grad(), in_place_of(head, lambda states: zeros):
            logits = whole(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        _linear[whole] = logits is zeros and zeros._version == 0
    return head if _linear[whole] else None


@contextmanager
def in_place_of(head: nn.Linear, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """In the block the head returns `compute(states)`. It is called where it always is, under its own hooks."""
    head.forward = compute
    try:
        yield
    finally:
        del head.forward
