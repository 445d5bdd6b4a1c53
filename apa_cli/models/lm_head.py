"""Output head: log-probs and other statistics of tokens from hidden states, without the logits of a whole batch.

The head, a linear layer to the vocabulary, takes most of a small model's time and nearly all of its memory. Its logits
are computed for a chunk of tokens at a time and overwritten with their gradient, which the backward pass needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.models.lora import AdapterDisabledModel, unwrap_model
from apa_cli.tensor_ops import apply_temperature

LOGITS_PER_CHUNK = 2**25
"""Number of logits computed at a time: 128 MiB in float32."""
MAX_SAVED_BYTES = 2**28
"""Bytes of logits that a forward pass saves for its backward pass, which recomputes the others."""


def split_into_chunks(rows: int, vocab_size: int) -> list[slice]:
    """Split `rows` tokens into nearly equal chunks of at most `LOGITS_PER_CHUNK` logits, but at least one token.

    No chunk is longer than the first.
    """
    most = max(1, LOGITS_PER_CHUNK // vocab_size)
    size = math.ceil(rows / max(1, math.ceil(rows / most))) or 1
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


class HeadLogprobs(torch.autograd.Function):
    """log softmax((states · weightᵀ + bias) / temperature)[token] in float32, for each row of states.

    The gradient with respect to the logits is −(softmax − one-hot) / temperature. The forward pass overwrites the
    logits with softmax − one-hot, in their own precision, so that the backward pass only multiplies by weight and
    states.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float, save: bool
    ) -> Tensor:
        """Map states [N, h], weight [V, h], bias [V] and token_ids [N] to [N]; `save` if a backward pass may follow."""
        logprobs = torch.empty(len(states), device=states.device)
        low_weight, low_bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        saved_rows = MAX_SAVED_BYTES // (len(weight) * states.element_size()) if save else 0
        saved: list[Tensor] = []
        for chunk in split_into_chunks(len(states), len(weight)):
            logits = nn.functional.linear(states[chunk], low_weight, low_bias)
            logprobs[chunk] = compute_logprobs_in_place(logits, token_ids[chunk], temperature)
            if chunk.stop <= saved_rows:
                saved.append(logits)
            del logits
        ctx.save_for_backward(states, weight, bias, token_ids, *saved)
        ctx.temperature = temperature
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states, weight and bias; `gradient` [N] is that of the log-probs."""
        states, weight, bias, token_ids, *saved = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        low_weight, low_bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        scale = (-gradient / ctx.temperature).unsqueeze(-1)
        states_grad = torch.empty_like(states) if needs_states else None
        weight_grad = torch.zeros_like(weight) if needs_weight else None
        bias_grad = torch.zeros_like(bias) if needs_bias else None
        for number, chunk in enumerate(split_into_chunks(len(states), len(weight))):
            if number < len(saved):
                difference = saved[number]
            else:
                difference = nn.functional.linear(states[chunk], low_weight, low_bias)
                compute_logprobs_in_place(difference, token_ids[chunk], ctx.temperature)
            if states_grad is not None:
                states_grad[chunk] = scale[chunk] * (difference @ low_weight)
            scaled = (scale[chunk] * states[chunk]).to(difference.dtype)
            if weight_grad is not None:
                weight_grad += (difference.T @ scaled).to(weight.dtype)
            if bias_grad is not None:
                bias_grad += difference.T @ scale[chunk].squeeze(-1).to(difference.dtype)
            del difference
        return states_grad, weight_grad, bias_grad, None, None, None


def compute_logprobs_in_place(logits: Tensor, token_ids: Tensor, temperature: float) -> Tensor:
    """Return log softmax(logits / temperature)[token], [n] float32, and overwrite logits [n, V] with softmax − one-hot.

    Computed in float32. log softmax(x)[token] is x[token] − max x + log max softmax(x), so that no logarithm of [n, V]
    is taken.
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


def compute_head_logprobs(
    states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
) -> Tensor:
    """Return the head's log-probs of given tokens, states [N, h], token_ids [N] → [N] float32; see `HeadLogprobs`.

    The logits have autocast's precision, or without autocast the weight's. Rows are padded to a shape that `cpu_matmul`
    computes fast.
    """
    rows, row_tokens = prepare_rows(states, weight, token_ids)
    inputs = [x for x in (rows, weight, bias) if x is not None]
    save = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    with torch.autocast(states.device.type, enabled=False):
        return HeadLogprobs.apply(rows, weight, bias, row_tokens, temperature, save)[: len(states)]


def prepare_rows(states: Tensor, weight: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return states [N, h] in the precision of the logits, and token_ids [N], both padded to more rows.

    The precision is autocast's, or without autocast the weight's. `cpu_matmul` computes the number of rows fast.
    """
    device = states.device.type
    states = states.to(torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype)
    more = matmul.round_positions(len(states)) - len(states)
    return nn.functional.pad(states, (0, 0, 0, more)), nn.functional.pad(token_ids, (0, more))


# --- statistics of the whole distribution -------------------------------------------------------------------


class TokenStatistics(NamedTuple):
    """Statistics of softmax(logits / temperature) and a token, for N rows of states; [N] float32 each, in nats."""

    logprobs: Tensor
    """Log-prob of the token; bit-identical to that of `compute_head_logprobs`."""
    chosen: Tensor
    """Logit of the token, over temperature."""
    logsumexp: Tensor
    """Logsumexp of the logits over temperature."""
    entropy: Tensor
    """Entropy, exact."""
    mean_logprob: Tensor
    """Mean of the log-probs over the vocabulary."""


class HeadStatistics(torch.autograd.Function):
    """`TokenStatistics` of the logits states · weightᵀ + bias, as the rows of one tensor.

    With x = logits / temperature, p = softmax x, H the entropy and V the size of the vocabulary:

        d logprob / dx = onehot − p        d chosen / dx = onehot          d logsumexp / dx = p
        dH / dx = −p (log p + H)           d mean_logprob / dx = 1/V − p

    Nothing of size V is saved: the backward pass computes the logits again.
    """

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
    ) -> Tensor:
        """Map states [N, h], weight [V, h], bias [V] and token_ids [N] to [5, N]."""
        statistics = torch.empty(len(TokenStatistics._fields), len(states), device=states.device)
        low_weight, low_bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        for chunk in split_into_chunks(len(states), len(weight)):
            logits = nn.functional.linear(states[chunk], low_weight, low_bias)
            statistics[:, chunk] = torch.stack(compute_token_statistics(logits, token_ids[chunk], temperature))
        ctx.save_for_backward(states, weight, bias, token_ids)
        ctx.temperature = temperature
        return statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of states, weight and bias; `gradient` [5, N] is that of the statistics."""
        states, weight, bias, token_ids = ctx.saved_tensors
        needs_states, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        low_weight, low_bias = weight.to(states.dtype), None if bias is None else bias.to(states.dtype)
        states_grad = torch.empty_like(states) if needs_states else None
        weight_grad = torch.zeros_like(weight) if needs_weight else None
        bias_grad = torch.zeros_like(bias) if needs_bias else None
        for chunk in split_into_chunks(len(states), len(weight)):
            logits = nn.functional.linear(states[chunk], low_weight, low_bias)
            slope = compute_logit_gradient(logits, token_ids[chunk], ctx.temperature, gradient[:, chunk])
            if bias_grad is not None:
                bias_grad += slope.sum(0).to(bias.dtype)
            slope = slope.to(states.dtype)
            if states_grad is not None:
                states_grad[chunk] = slope @ low_weight
            if weight_grad is not None:
                weight_grad += (slope.T @ states[chunk]).to(weight.dtype)
            del logits, slope
        return states_grad, weight_grad, bias_grad, None, None


def compute_log_softmax(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return log softmax(x) and softmax(x) [n, V] and logsumexp x [n, 1] for x = logits / temperature, in float32.

    In the operations of `compute_logprobs_in_place`, so that log-probs are bit-identical.
    """
    wide = apply_temperature(logits, temperature)
    highest = wide.amax(-1, keepdim=True)
    probabilities = torch.softmax(wide, -1)
    highest_logprob = probabilities.amax(-1, keepdim=True).log()
    return (wide - highest).add_(highest_logprob), probabilities, highest - highest_logprob


def compute_token_statistics(logits: Tensor, token_ids: Tensor, temperature: float) -> TokenStatistics:
    """Return the statistics of logits [n, V] and token_ids [n]."""
    tokens = token_ids.unsqueeze(-1)
    logprobs, probabilities, logsumexp = compute_log_softmax(logits, temperature)
    return TokenStatistics(
        logprobs=logprobs.gather(-1, tokens).squeeze(-1),
        chosen=apply_temperature(logits.gather(-1, tokens), temperature).squeeze(-1),
        logsumexp=logsumexp.squeeze(-1),
        entropy=-(probabilities * logprobs).sum(-1),
        mean_logprob=logprobs.mean(-1),
    )


def compute_logit_gradient(logits: Tensor, token_ids: Tensor, temperature: float, gradient: Tensor) -> Tensor:
    """Return the gradient of logits [n, V] in float32, given that of their statistics [5, n]; see `HeadStatistics`."""
    given = TokenStatistics(*gradient.unsqueeze(-1))
    logprobs, probabilities, _ = compute_log_softmax(logits, temperature)
    entropy = -(probabilities * logprobs).sum(-1, keepdim=True)
    slope = logprobs.add_(entropy).mul_(-given.entropy).add_(given.logsumexp - given.logprobs - given.mean_logprob)
    slope = slope.mul_(probabilities).add_(given.mean_logprob / logits.shape[-1])
    slope.scatter_add_(-1, token_ids.unsqueeze(-1), given.logprobs + given.chosen)
    return slope if temperature == 1 else slope.div_(temperature)


def compute_head_statistics(
    states: Tensor, weight: Tensor, bias: Tensor | None, token_ids: Tensor, temperature: float
) -> TokenStatistics:
    """Return the statistics of the head's distribution for states [N, h] and token_ids [N]; see `HeadStatistics`.

    The logits' precision is that of `compute_head_logprobs`.
    """
    rows, row_tokens = prepare_rows(states, weight, token_ids)
    with torch.autocast(states.device.type, enabled=False):
        statistics = HeadStatistics.apply(rows, weight, bias, row_tokens, temperature)
    return TokenStatistics(*statistics[:, : len(states)].unbind())


# --- finding and overriding a model's head ------------------------------------------------------------------

_has_linear_head: WeakKeyDictionary[PreTrainedModel, bool] = WeakKeyDictionary()
"""Results of the probes of `find_linear_head`."""


def find_linear_head(model: PreTrainedModel | AdapterDisabledModel) -> nn.Linear | None:
    """Return the model's head if it is a plain linear layer whose output the model returns unchanged, else None.

    Some models scale or cap the logits afterwards. The first call probes for that with one pass of a single token in
    which the head returns a tensor of zeros: the model must return that very tensor, unmodified.
    """
    model = unwrap_model(model)
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in vars(head):
        return None
    if model not in _has_linear_head:
        zeros = torch.zeros(1, 1, head.out_features, device=model.device)
        ids = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        with torch.no_grad(), override_forward(head, lambda states: zeros):
            logits = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits
        _has_linear_head[model] = logits is zeros and zeros._version == 0
    return head if _has_linear_head[model] else None


@contextmanager
def override_forward(head: nn.Linear, compute: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, let the head return `compute(states)`; its hooks still run."""
    vars(head)["forward"] = compute
    try:
        yield
    finally:
        del vars(head)["forward"]
