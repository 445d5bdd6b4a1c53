"""From prompts to a `Rollout`: draws the responses under a plan and cuts their texts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad as padded
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.randomness import Stream, generator, uniforms
from apa_cli.rollout.engine import EOS, LENGTH, Sampled, left_padded, right_padded, sample
from apa_cli.settings import SamplingSettings
from apa_cli.types import Prompt, Rollout, RolloutPlan


def response_text(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    response: list[int],
    ending: str,
    stop_strings: list[str],
) -> str:
    """The text that is scored: without the terminator, cut before the stop string, stripped on the right.

    It is decoded behind the prompt's last tokens, because some tokenizers drop the first space otherwise.
    """
    tokens = response[:-1] if ending == EOS else response
    context = tokenizer.decode(prompt[-4:], skip_special_tokens=True)
    text = tokenizer.decode(prompt[-4:] + tokens, skip_special_tokens=True)
    text = text[len(context) :] if text.startswith(context) else tokenizer.decode(tokens, skip_special_tokens=True)
    cuts = [text.index(string) for string in stop_strings if string and string in text]
    return text[: min(cuts)].rstrip() if cuts else text.rstrip()


def collect(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    settings: SamplingSettings,
    end_tokens: frozenset[int],
    seed: int,
    stream: Stream,
    iteration: int,
    plan: RolloutPlan | None = None,
) -> Rollout:
    """Draws one response to each prompt; `models` holds the policies that the plan names.

    A response's random numbers are keyed by (seed, stream, iteration, place, sample) and by nothing else.
    """
    plan = plan or RolloutPlan()
    places = [(prompt.place, prompt.sample) for prompt in prompts]
    prompt_tokens = [prompt.token_ids for prompt in prompts]
    prefixes: list[list[int]] = [[] for _ in prompts]
    prefix_logprobs: list[list[float]] = [[] for _ in prompts]
    if plan.rollin_probability > 0:
        draws = uniforms(seed, Stream.roll_in, iteration, places, settings.max_new_tokens)
        rolled = sample(models[plan.roll_in], tokenizer, prompt_tokens, draws, settings, end_tokens)
        for i, (place, number) in enumerate(places):
            rng = generator(seed, Stream.roll_in_cut, iteration, place, number)
            kept, tokens = rng.random() < plan.rollin_probability, rolled.tokens[i]
            if kept and len(tokens) >= 2:
                cut = int(rng.integers(1, len(tokens)))
                prefixes[i], prefix_logprobs[i] = tokens[:cut], rolled.logprobs[i][:cut]
    draws = uniforms(seed, stream, iteration, places, settings.max_new_tokens)
    starts = [tokens + prefix for tokens, prefix in zip(prompt_tokens, prefixes, strict=True)]
    drawn = sample(models[plan.roll_out], tokenizer, starts, draws, settings, end_tokens, prefixes)
    return assembled(tokenizer, prompts, prefixes, prefix_logprobs, drawn, settings)


def assembled(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    prefixes: list[list[int]],
    prefix_logprobs: list[list[float]],
    drawn: Sampled,
    settings: SamplingSettings,
) -> Rollout:
    """Prefixes and completions as one rollout, responses cut at the length limit."""
    limit = settings.max_new_tokens
    tokens = [(prefix + row)[:limit] for prefix, row in zip(prefixes, drawn.tokens, strict=True)]
    logprobs = [(prefix + row)[:limit] for prefix, row in zip(prefix_logprobs, drawn.logprobs, strict=True)]
    endings = [
        LENGTH if len(prefix) + len(row) > limit else ending
        for prefix, row, ending in zip(prefixes, drawn.tokens, drawn.endings, strict=True)
    ]
    width = max(len(row) for row in tokens)
    pad = tokenizer.pad_token_id
    prompt_ids, prompt_mask = left_padded([prompt.token_ids for prompt in prompts], pad)
    ones = [[1] * len(row) for row in tokens]
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask.bool(),
        response_ids=right_padded(tokens, pad, width, torch.int64),
        mask=right_padded(ones, 0, width, torch.bool),
        prefix_mask=right_padded([[1] * len(prefix) for prefix in prefixes], 0, width, torch.bool),
        sampler_logprobs=right_padded(logprobs, 0.0, width, torch.float32),
        prompts=[prompt.text for prompt in prompts],
        responses=[
            response_text(tokenizer, prompt.token_ids, row, ending, settings.stop_strings)
            for prompt, row, ending in zip(prompts, tokens, endings, strict=True)
        ],
        endings=endings,
        groups=torch.tensor([prompt.place for prompt in prompts]),
        columns=[prompt.columns for prompt in prompts],
    )


def concatenated(parts: list[Rollout], pad: int, count: int) -> Rollout:
    """The first `count` responses of several rollouts as one, padded with the token `pad` to common widths."""

    def joined(name: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return {key: joined(name, [value[key] for value in values]) for key in first}
        if isinstance(first, list):
            return [entry for value in values for entry in value][:count]
        if first is None or first.dim() == 1:
            return first if first is None else torch.cat(values)[:count]
        width = max(value.shape[1] for value in values)
        left, filling = name.startswith("prompt_"), pad if name.endswith("_ids") else 0
        return torch.cat([extended(value, width, left, filling) for value in values])[:count]

    whole = {f.name: joined(f.name, [getattr(part, f.name) for part in parts]) for f in fields(Rollout)}
    if parts[0].ref_logprobs is parts[0].init_logprobs:
        whole["ref_logprobs"] = whole["init_logprobs"]
    return Rollout(**whole)


def extended(x: Tensor, width: int, left: bool, filling: int) -> Tensor:
    """x [N, W] with columns of `filling` added on one side, [N, width]."""
    missing = width - x.shape[1]
    return padded(x, (missing, 0) if left else (0, missing), value=filling)
