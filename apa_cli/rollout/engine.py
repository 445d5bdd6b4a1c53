"""Drawing responses token by token from given uniform numbers: batches, and where each response ends."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.models.sequence_packing import packs
from apa_cli.rollout.decode_step import Growing, Repeated, repeats
from apa_cli.rollout.fast_linear import prepared
from apa_cli.settings import SamplingSettings

EOS, STOP, LENGTH = "eos", "stop", "length"
AHEAD = {"cuda": 1}
"""Steps that a device computes while the tokens of those before are looked at."""


@dataclass(frozen=True)
class Sampled:
    """Responses in the order of their prompts."""

    tokens: list[list[int]]
    """The chosen tokens, the terminating one included."""
    logprobs: list[list[float]]
    """log π of each, of the whole distribution at the sampling temperature."""
    endings: list[str]


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
    in them. Prompts are sorted by length and drawn `settings.microbatch_size` at a time; the result does not depend on it.
    """
    packs(model)  # found out before the first token: attention may round otherwise from then on
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, tuple[list[int], list[float], str]] = {}
    with prepared(model):
        for start in range(0, len(order), settings.microbatch_size):
            chunk = order[start : start + settings.microbatch_size]
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
    stops = StopStrings(tokenizer, settings.stop_strings)
    grown: list[list[int]] = [[] for _ in prompts]
    endings = [LENGTH] * len(prompts)
    rows = list(range(len(prompts)))
    places = torch.arange(len(prompts), device=device)
    logprobs = torch.zeros(len(prompts), length, device=device)
    running = set(rows)
    steps: Growing | Repeated = Growing(model, ids, attention, torch.from_numpy(uniforms).to(device), settings)
    drawn: deque[tuple[list[int], Callable[[], list[int]]]] = deque()
    ahead = AHEAD.get(device.type, 0)
    for t in range(length + ahead):
        if t < length:
            if t == 1 and settings.cuda_graph and repeats(model):
                steps = Repeated(steps)
            tokens, logprobs[places, t] = steps.step()
            drawn.append((rows, reading(tokens)))
        if t < ahead:
            continue
        looked_at, read = drawn.popleft()
        for i, token in zip(looked_at, read(), strict=True):
            if i in running:
                grown[i].append(token)
                if token in end_tokens or stops.completed(begun[i] + grown[i]):
                    endings[i] = EOS if token in end_tokens else STOP
                    running.discard(i)
        if not running:
            break
        if 2 * len(running) <= len(rows):
            kept = torch.tensor([place for place, i in enumerate(rows) if i in running], device=device)
            rows = [i for i in rows if i in running]
            places = places[kept]
            steps.keep(kept)
    table = logprobs.cpu().tolist()
    return [(row, table[i][: len(row)], endings[i]) for i, row in enumerate(grown)]


def reading(tokens: Tensor) -> Callable[[], list[int]]:
    """What gives the numbers of [B], as they are now; a GPU's are on their way when this returns."""
    if tokens.device.type != "cuda":
        numbers = tokens.tolist()
        return lambda: numbers
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record(torch.cuda.current_stream(tokens.device))

    def read() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return read


def left_padded(rows: list[list[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids [N, P] int64 padded on the left, and their mask [N, P] int64."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def right_padded(rows: list[list], pad: float, width: int, dtype: torch.dtype) -> Tensor:
    """Rows of numbers as one tensor [N, width], padded on the right."""
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=dtype)
