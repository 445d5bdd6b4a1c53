"""Rollouts: responses sampled for prompts under a plan, and the texts that are scored."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from apa_cli.randomness import Stream, make_generator
from apa_cli.rollout.engine import Sampled, pad_left, pad_right
from apa_cli.rollout.response_text import LENGTH, read_response
from apa_cli.rollout.samplers import Draws, Sampler
from apa_cli.settings import SamplingSettings
from apa_cli.types import POLICY, SAMPLER, Prompt, Rollout, RolloutPlan, Sequences

S = TypeVar("S", bound=Sequences)


def collect_rollout(
    samplers: Mapping[str, Sampler],
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    settings: SamplingSettings,
    end_tokens: frozenset[int],
    seed: int,
    stream: Stream,
    iteration: int,
    plan: RolloutPlan | None = None,
) -> Rollout:
    """Return one response to each prompt under a plan (None: the policy's); `samplers` are those that the plan names.

    A response's random numbers depend only on (seed, stream, iteration, place, sample number).
    """
    plan = plan or RolloutPlan()
    places = [(prompt.place, prompt.sample) for prompt in prompts]
    draws = Draws(seed, stream, iteration, places)
    prefixes: list[list[int]] = [[] for _ in prompts]
    prefix_logprobs: list[list[float]] = [[] for _ in prompts]
    if plan.prefix.kind == "all":
        completions = samplers[plan.roll_in].draw(prompts, prefixes, draws, settings, end_tokens)
        return assemble_rollout(tokenizer, prompts, prefixes, prefix_logprobs, completions, settings, plan)
    if plan.prefix.kind == "uniform" and plan.prefix.probability > 0:
        roll_in_draws = Draws(seed, Stream.roll_in, iteration, places)
        roll_in = samplers[plan.roll_in].draw(prompts, prefixes, roll_in_draws, settings, end_tokens)
        for i, (place, number) in enumerate(places):
            rng = make_generator(seed, Stream.roll_in_cut, iteration, place, number)
            has_prefix, tokens = rng.random() < plan.prefix.probability, roll_in.tokens[i]
            tokens = tokens[: read_response(tokenizer, tokens, LENGTH, settings.stop_strings)[0]]
            if has_prefix and len(tokens) >= 2:
                cut = int(rng.integers(1, len(tokens)))
                prefixes[i], prefix_logprobs[i] = tokens[:cut], roll_in.logprobs[i][:cut]
    assert plan.roll_out is not None, "only a plan that keeps the whole response has no roll_out"
    completions = samplers[plan.roll_out].draw(prompts, prefixes, draws, settings, end_tokens)
    return assemble_rollout(tokenizer, prompts, prefixes, prefix_logprobs, completions, settings, plan)


def assemble_rollout(
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    prefixes: list[list[int]],
    prefix_logprobs: list[list[float]],
    completions: Sampled,
    settings: SamplingSettings,
    plan: RolloutPlan | None = None,
) -> Rollout:
    """Join prefixes and completions into one rollout, with responses cut at `max_new_tokens`.

    No token follows the one that completed a stop string, also in logged responses.
    """
    plan, limit = plan or RolloutPlan(), settings.max_new_tokens
    tokens = [(prefix + row)[:limit] for prefix, row in zip(prefixes, completions.tokens, strict=True)]
    logprobs = [(prefix + row)[:limit] for prefix, row in zip(prefix_logprobs, completions.logprobs, strict=True)]
    endings = [
        LENGTH if len(prefix) + len(row) > limit else ending
        for prefix, row, ending in zip(prefixes, completions.tokens, completions.endings, strict=True)
    ]
    responses = []
    for i, row in enumerate(tokens):
        count, endings[i], text = read_response(tokenizer, row, endings[i], settings.stop_strings)
        tokens[i], logprobs[i] = row[:count], logprobs[i][:count]
        responses.append(text)
    is_prefix_on_policy = plan.roll_in == POLICY
    is_rest_on_policy = (plan.roll_in if plan.roll_out is None else plan.roll_out) == POLICY
    on_policy = [
        ([is_prefix_on_policy] * len(prefix) + [is_rest_on_policy] * len(row))[: len(row)]
        for prefix, row in zip(prefixes, tokens, strict=True)
    ]
    width = max(len(row) for row in tokens)
    prompt_ids, prompt_mask = pad_left([prompt.token_ids for prompt in prompts], tokenizer.pad_token_id)
    return Rollout(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask.bool(),
        response_ids=pad_right(tokens, tokenizer.pad_token_id, width, torch.int64),
        mask=pad_right([[1] * len(row) for row in tokens], 0, width, torch.bool),
        on_policy=pad_right(on_policy, 0, width, torch.bool),
        logprobs={SAMPLER: pad_right(logprobs, 0.0, width, torch.float32)},
        prompts=[prompt.text for prompt in prompts],
        responses=responses,
        endings=endings,
        groups=torch.tensor([prompt.place for prompt in prompts]),
        columns=[prompt.columns for prompt in prompts],
        example_index=torch.tensor([prompt.example_index for prompt in prompts]),
        plans=(plan,),
        plan_index=torch.zeros(len(prompts), dtype=torch.int64),
    )


def concatenate_sequences(parts: Seq[S], pad: int) -> S:
    """Return the rows of several sequences, rollouts or batches as one, padded to common widths with the token `pad`.

    Fields without rows, such as `plans`, are those of the first part; a field that is None in one part is None. Raise
    ValueError for no part.
    """
    if not parts:
        raise ValueError("concatenate_sequences: no part")

    def concatenate(name: str, values: list[Any]) -> Any:
        first = values[0]
        if any(value is None for value in values):
            return None
        if isinstance(first, Sequences):
            return concatenate_sequences(values, pad)
        if isinstance(first, Mapping):
            return {key: concatenate(key, [value[key] for value in values]) for key in first}
        if isinstance(first, list):
            return [entry for value in values for entry in value]
        if not isinstance(first, Tensor):
            return first
        if first.dim() == 1:
            return torch.cat(values)
        width = max(value.shape[1] for value in values)
        is_left, fill = name.startswith("prompt_"), pad if name.endswith("_ids") else 0
        return torch.cat([pad_to_width(value, width, is_left, fill) for value in values])

    columns = {f.name: concatenate(f.name, [getattr(part, f.name) for part in parts]) for f in fields(parts[0])}
    return replace(parts[0], **columns)


def pad_to_width(x: Tensor, width: int, left: bool, fill: int) -> Tensor:
    """Return x [N, W] padded with `fill` on the left or the right, [N, width]."""
    missing = width - x.shape[1]
    return nn.functional.pad(x, (missing, 0) if left else (0, missing), value=fill)
