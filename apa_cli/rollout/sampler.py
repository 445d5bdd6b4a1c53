"""Drawing responses token by token, by inverse CDF from given uniform numbers, with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicLayer

from apa_cli.models.packing import packs
from apa_cli.settings import SamplingSettings
from apa_cli.tensor_ops import tempered

EOS, STOP, LENGTH = "eos", "stop", "length"


@dataclass(frozen=True)
class Sampled:
    """Responses in the order of their prompts."""

    tokens: list[list[int]]
    """The chosen tokens, the terminating one included."""
    logprobs: list[list[float]]
    """log π of each, of the whole distribution at the sampling temperature."""
    endings: list[str]


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The first token whose cumulative probability reaches u · total. [B, V], u [B] in (0, 1] → [B] int64.

    The sum is cumulated in float64; a token of probability 0 is never drawn.
    """
    cumulative = probabilities.double().cumsum(-1)
    threshold = uniforms.double() * cumulative[:, -1]
    return torch.searchsorted(cumulative, threshold.unsqueeze(-1)).squeeze(-1).clamp(max=cumulative.shape[1] - 1)


def truncated(probabilities: Tensor, top_k: int, top_p: float) -> Tensor:
    """Probabilities [B, V] with all but the `top_k` likeliest (0: all) and the `top_p` nucleus (1: all) set to 0."""
    if top_k and top_k < probabilities.shape[-1]:
        least = probabilities.topk(top_k, dim=-1).values[:, -1:]
        probabilities = probabilities.masked_fill(probabilities < least, 0.0)
    if top_p < 1:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        kept = ordered.masked_fill(before >= top_p * ordered.sum(-1, keepdim=True), 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities


class StopStrings:
    """Finds stop strings in the decoded text of responses as they grow."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: list[str]):
        self.tokenizer = tokenizer
        self.strings = [string for string in strings if string]
        self.window = 2 * max((len(string) for string in self.strings), default=0) + 8

    def completed(self, tokens: list[int]) -> bool:
        """Whether the last token completes one: it is looked for in the text of the last few tokens."""
        if not self.strings:
            return False
        text = self.tokenizer.decode(tokens[-self.window :], skip_special_tokens=True)
        return any(string in text for string in self.strings)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    uniforms: np.ndarray,
    settings: SamplingSettings,
    end_tokens: frozenset[int],
    prefixes: list[list[int]] | None = None,
) -> Sampled:
    """One response to each prompt (token ids), from uniforms [N, T]: response i's draws use row i, in order.

    `prefixes` are the tokens at the end of each prompt that belong to the response already; a stop string may begin
    in them. Prompts are sorted by length and drawn `settings.microbatch` at a time; the result does not depend on it.
    """
    packs(model)  # found out before the first token: attention may round otherwise from then on
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, tuple[list[int], list[float], str]] = {}
    for start in range(0, len(order), settings.microbatch):
        chunk = order[start : start + settings.microbatch]
        begun = [prefixes[i] if prefixes else [] for i in chunk]
        drawn = _sample_chunk(
            model, tokenizer, [prompts[i] for i in chunk], begun, uniforms[chunk], settings, end_tokens
        )
        results.update(zip(chunk, drawn, strict=True))
    rows = [results[i] for i in range(len(prompts))]
    return Sampled([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def _sample_chunk(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    begun: list[list[int]],
    uniforms: np.ndarray,
    settings: SamplingSettings,
    end_tokens: frozenset[int],
) -> list[tuple[list[int], list[float], str]]:
    """Each response's tokens, log-probs and ending. When half of the rows have ended, those that run go on alone."""
    device, length = model.device, uniforms.shape[1]
    ids, attention = left_padded(prompts, tokenizer.pad_token_id, device)
    draws = torch.from_numpy(uniforms).to(device)
    stops = StopStrings(tokenizer, settings.stop_strings)
    grown: list[list[int]] = [[] for _ in prompts]
    endings = [LENGTH] * len(prompts)
    rows = list(range(len(prompts)))
    places = torch.arange(len(prompts), device=device)
    logprobs = torch.zeros(len(prompts), length, device=device)
    running = set(rows)
    cache = roomy_cache(model.config)
    positions = (attention.cumsum(1) - 1).clamp(min=0)
    for t in range(length):
        output = model(
            input_ids=ids,
            attention_mask=attention,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        log_pi = tempered(output.logits[:, -1], settings.temperature).log_softmax(-1)
        token = inverse_cdf(truncated(log_pi.exp(), settings.top_k, settings.top_p), draws[:, t])
        logprobs[places, t] = log_pi.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        for i, token_id in zip(rows, token.tolist(), strict=True):
            if i in running:
                grown[i].append(token_id)
                if token_id in end_tokens or stops.completed(begun[i] + grown[i]):
                    endings[i] = EOS if token_id in end_tokens else STOP
                    running.discard(i)
        if not running:
            break
        ids = token.unsqueeze(-1)
        attention = torch.cat([attention, attention.new_ones(len(rows), 1)], dim=1)
        positions = positions[:, -1:] + 1
        if 2 * len(running) <= len(rows):
            kept = torch.tensor([place for place, i in enumerate(rows) if i in running], device=device)
            rows = [i for i in rows if i in running]
            cache.reorder_cache(kept)
            ids, attention, positions, draws, places = (x[kept] for x in (ids, attention, positions, draws, places))
    table = logprobs.cpu().tolist()
    return [(row, table[i][: len(row)], endings[i]) for i, row in enumerate(grown)]


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, S, dim] with room behind them, so that another token's do not move those before."""

    ROOM = 128
    """Tokens."""
    rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What was held with these behind it."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, count = self.get_seq_length(), key_states.shape[-2]
        if self.rooms is None or held + count > self.rooms[0].shape[-2]:
            rooms = tuple(
                new.new_empty(*new.shape[:2], held + count + self.ROOM, new.shape[3])
                for new in (key_states, value_states)
            )
            if held:
                for room, states in zip(rooms, (self.keys, self.values), strict=True):
                    room[:, :, :held] = states
            self.rooms = rooms
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, held : held + count] = states
        self.keys, self.values = (room[:, :, : held + count] for room in self.rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps these rows."""
        super().reorder_cache(beam_idx)
        self.rooms = None


def roomy_cache(config: PreTrainedConfig) -> DynamicCache:
    """A cache of `RoomyLayer`s; layers of a kind of their own stay as they are."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def left_padded(rows: list[list[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids [N, P] int64 padded on the left, and their mask [N, P] int64."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def right_padded(rows: list[list], pad: float, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of numbers as one tensor [N, width], padded on the right."""
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=dtype)
