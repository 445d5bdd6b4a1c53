"""Sampling of responses from uniform numbers: microbatches of prompts, stop strings and endings."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.models.sequence_packing import can_pack
from apa_cli.models.structure import get_context_length
from apa_cli.rollout.decode_step import EagerDecoder, GraphDecoder
from apa_cli.rollout.fast_linear import use_fast_linears
from apa_cli.rollout.graph_probe import can_decode_with_graph
from apa_cli.rollout.response_text import EOS, LENGTH, STOP, start_searches
from apa_cli.settings import SamplingSettings

LOOKAHEAD_STEPS = {"cuda": 1}
"""Device type → decode steps queued before the tokens of an earlier step are read; other types: 0."""


@dataclass(frozen=True)
class Sampled:
    """Sampled responses, in the order of their prompts."""

    tokens: list[list[int]]
    """Token ids of each response, the end token included."""
    logprobs: list[list[float]]
    """Log-probability of each token at the sampling temperature, before truncation by top_k and top_p."""
    endings: list[str]
    """EOS, STOP or LENGTH."""


@torch.no_grad()
def sample_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    uniforms: np.ndarray,
    settings: SamplingSettings,
    end_tokens: frozenset[int],
    prefixes: list[list[int]] | None = None,
) -> Sampled:
    """Sample one response to each prompt (token ids) with uniforms [N, T]: token t of response i from number [i, t].

    `prefixes` are the tokens at the end of each prompt that already belong to the response; a stop string may begin in
    a prefix. Prompts are sorted by length and sampled `settings.microbatch_size` at a time; the result depends on
    neither the order nor the size.
    """
    can_pack(model)  # its probe changes the attention function, hence rounding, so it must precede the first token
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    results: dict[int, tuple[list[int], list[float], str]] = {}
    with use_fast_linears(model):
        for start in range(0, len(order), settings.microbatch_size):
            chunk = order[start : start + settings.microbatch_size]
            chunk_results = sample_microbatch(
                model,
                tokenizer,
                [prompts[i] for i in chunk],
                [prefixes[i] if prefixes else [] for i in chunk],
                uniforms[chunk],
                settings,
                end_tokens,
            )
            results.update(zip(chunk, chunk_results, strict=True))
    rows = [results[i] for i in range(len(prompts))]
    return Sampled([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])


def sample_microbatch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    prefixes: list[list[int]],
    uniforms: np.ndarray,
    settings: SamplingSettings,
    end_tokens: frozenset[int],
) -> list[tuple[list[int], list[float], str]]:
    """Return each response's tokens, log-probs and ending.

    A response ends at T tokens, its prefix included. Once half of the decoded rows have ended, decoding continues with
    the others alone.
    """
    device, length = model.device, uniforms.shape[1]
    ids, attention_mask = pad_left(prompts, tokenizer.pad_token_id, device)
    searches = start_searches(tokenizer, settings.stop_strings, prefixes)
    responses: list[list[int]] = [[] for _ in prompts]
    endings = [LENGTH] * len(prompts)
    logprobs = torch.zeros(len(prompts), length, device=device)
    decoded_rows = list(range(len(prompts)))  # the prompt of each row of the decoder
    row_indices = torch.arange(len(prompts), device=device)  # the same on the device
    unfinished = set(decoded_rows)
    # Rows that have ended are decoded on; after a long prefix they would pass the model's last position.
    positions = get_context_length(model) if any(prefixes) else None
    decoder: EagerDecoder | GraphDecoder = EagerDecoder(
        model, ids, attention_mask, torch.from_numpy(uniforms).to(device), settings, positions and positions - 1
    )
    pending: deque[tuple[list[int], Callable[[], list[int]]]] = deque()  # steps whose tokens are not read yet
    lookahead = LOOKAHEAD_STEPS.get(device.type, 0)
    for t in range(length + lookahead):
        if t < length:
            if t == 1 and settings.cuda_graph and can_decode_with_graph(model):
                assert isinstance(decoder, EagerDecoder)
                decoder = GraphDecoder(decoder)
            tokens, logprobs[row_indices, t] = decoder.step()
            pending.append((decoded_rows, start_host_copy(tokens)))
        if t < lookahead:
            continue
        rows, read_tokens = pending.popleft()
        for i, token in zip(rows, read_tokens(), strict=True):
            if i in unfinished:
                responses[i].append(token)
                if token in end_tokens or (searches and searches[i].add(token)):
                    endings[i] = EOS if token in end_tokens else STOP
                    unfinished.discard(i)
                elif len(prefixes[i]) + len(responses[i]) == length:
                    unfinished.discard(i)
        if not unfinished:
            break
        if 2 * len(unfinished) <= len(decoded_rows):
            selected = [row for row, i in enumerate(decoded_rows) if i in unfinished]
            decoded_rows = [decoded_rows[row] for row in selected]
            indices = cast(LongTensor, torch.tensor(selected, device=device))
            row_indices = row_indices[indices]
            decoder.select_rows(indices)
    logprob_rows = logprobs.cpu().tolist()
    return [(row, logprob_rows[i][: len(row)], endings[i]) for i, row in enumerate(responses)]


def start_host_copy(tokens: Tensor) -> Callable[[], list[int]]:
    """Start copying tokens [B] to the host and return a function that waits for the copy and returns them.

    The function returns the values at the time of the call, even if the device overwrites `tokens` later.
    """
    if tokens.device.type != "cuda":
        values = tokens.tolist()
        return lambda: values
    host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
    host.copy_(tokens, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tokens.device))

    def wait_and_read() -> list[int]:
        copied.synchronize()
        return host.tolist()

    return wait_and_read


def pad_left(rows: list[list[int]], pad: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Return token ids [N, P] int64 padded on the left with `pad`, and their mask [N, P] int64."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def pad_right(rows: list[list], pad: float, width: int, dtype: torch.dtype) -> Tensor:
    """Return rows of numbers as one tensor [N, width], padded on the right with `pad`."""
    return torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=dtype)
