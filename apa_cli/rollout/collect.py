"""Rollouts: responses sampled for prompts under a plan, and the texts that are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.randomness import Stream, make_generator, sample_uniforms
from apa_cli.rollout.engine import EOS, LENGTH, Sampled, pad_left, pad_right, sample_responses
from apa_cli.settings import SamplingSettings
from apa_cli.types import Prompt, Rollout, RolloutPlan


def decode_response(
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    response: list[int],
    ending: str,
    stop_strings: list[str],
) -> str:
    """Return the text that is scored: without the end token, cut before the first stop string, stripped on the right.

    The response is decoded after the prompt's last tokens, because some tokenizers drop the first space of a text.
    """
    tokens = response[:-1] if ending == EOS else response
    context = str(tokenizer.decode(prompt[-4:], skip_special_tokens=True))
    text = str(tokenizer.decode(prompt[-4:] + tokens, skip_special_tokens=True))
    text = text[len(context) :] if text.startswith(context) else str(tokenizer.decode(tokens, skip_special_tokens=True))
    cuts = [text.index(string) for string in stop_strings if string and string in text]
    return text[: min(cuts)].rstrip() if cuts else text.rstrip()


def collect_rollout(
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
    """Sample one response to each prompt; `models` holds the models that the plan names.

    A response's random numbers depend only on (seed, stream, iteration, place, sample number).
    """
    plan = plan or RolloutPlan()
    places = [(prompt.place, prompt.sample) for prompt in prompts]
    prompt_tokens = [prompt.token_ids for prompt in prompts]
    prefixes: list[list[int]] = [[] for _ in prompts]
    prefix_logprobs: list[list[float]] = [[] for _ in prompts]
    if plan.rollin_probability > 0:
        uniforms = sample_uniforms(seed, Stream.roll_in, iteration, places, settings.max_new_tokens)
        roll_in = sample_responses(models[plan.roll_in], tokenizer, prompt_tokens, uniforms, settings, end_tokens)
        for i, (place, number) in enumerate(places):
            rng = make_generator(seed, Stream.roll_in_cut, iteration, place, number)
            has_prefix, tokens = rng.random() < plan.rollin_probability, roll_in.tokens[i]
            if has_prefix and len(tokens) >= 2:
                cut = int(rng.integers(1, len(tokens)))
                prefixes[i], prefix_logprobs[i] = tokens[:cut], roll_in.logprobs[i][:cut]
    uniforms = sample_uniforms(seed, stream, iteration, places, settings.max_new_tokens)
    contexts = [tokens + prefix for tokens, prefix in zip(prompt_tokens, prefixes, strict=True)]
    completions = sample_responses(models[plan.roll_out], tokenizer, contexts, uniforms, settings, end_tokens, prefixes)
    return assemble_rollout(tokenizer, prompts, prefixes, prefix_logprobs, completions, settings)


def assemble_rollout(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    prefixes: list[list[int]],
    prefix_logprobs: list[list[float]],
    completions: Sampled,
    settings: SamplingSettings,
) -> Rollout:
    """Join prefixes and completions into one rollout, with responses cut at `max_new_tokens`."""
    limit = settings.max_new_tokens
    tokens = [(prefix + row)[:limit] for prefix, row in zip(prefixes, completions.tokens, strict=True)]
    logprobs = [(prefix + row)[:limit] for prefix, row in zip(prefix_logprobs, completions.logprobs, strict=True)]
    endings = [
        LENGTH if len(prefix) + len(row) > limit else ending
        for prefix, row, ending in zip(prefixes, completions.tokens, completions.endings, strict=True)
    ]
    width = max(len(row) for row in tokens)
    prompt_ids, prompt_mask = pad_left([prompt.token_ids for prompt in prompts], tokenizer.pad_token_id)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask.bool(),
        response_ids=pad_right(tokens, tokenizer.pad_token_id, width, torch.int64),
        mask=pad_right([[1] * len(row) for row in tokens], 0, width, torch.bool),
        prefix_mask=pad_right([[1] * len(prefix) for prefix in prefixes], 0, width, torch.bool),
        sampler_logprobs=pad_right(logprobs, 0.0, width, torch.float32),
        prompts=[prompt.text for prompt in prompts],
        responses=[
            decode_response(tokenizer, prompt.token_ids, row, ending, settings.stop_strings)
            for prompt, row, ending in zip(prompts, tokens, endings, strict=True)
        ],
        endings=endings,
        groups=torch.tensor([prompt.place for prompt in prompts]),
        columns=[prompt.columns for prompt in prompts],
    )


def concatenate_rollouts(parts: list[Rollout], pad: int, count: int) -> Rollout:
    """Return the first `count` responses of several rollouts as one, padded to common widths with the token `pad`."""

    def concatenate(name: str, values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Mapping):
            return {key: concatenate(name, [value[key] for value in values]) for key in first}
        if isinstance(first, list):
            return [entry for value in values for entry in value][:count]
        if first is None or first.dim() == 1:
            return first if first is None else torch.cat(values)[:count]
        width = max(value.shape[1] for value in values)
        is_left, fill = name.startswith("prompt_"), pad if name.endswith("_ids") else 0
        return torch.cat([pad_to_width(value, width, is_left, fill) for value in values])[:count]

    columns = {f.name: concatenate(f.name, [getattr(part, f.name) for part in parts]) for f in fields(Rollout)}
    if parts[0].ref_logprobs is parts[0].init_logprobs:
        columns["ref_logprobs"] = columns["init_logprobs"]  # `compute_rollout_metrics` compares them by identity
    return Rollout(**columns)


def pad_to_width(x: Tensor, width: int, left: bool, fill: int) -> Tensor:
    """Return x [N, W] padded with `fill` on the left or the right, [N, width]."""
    missing = width - x.shape[1]
    return nn.functional.pad(x, (missing, 0) if left else (0, missing), value=fill)
