"""What a run will do, before it does it: batch arithmetic, models with their memory, number of passes."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from apa_cli.models.loading import TORCH_DTYPES, load_config
from apa_cli.settings import Config, CriticKind

TRAINED_BYTES = 16
"""Bytes per trained parameter: weight, gradient and AdamW's two moments in float32."""


def parameters(config: PretrainedConfig) -> tuple[int, int]:
    """Parameters of the causal model of a configuration, and of its trunk alone; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return (sum(p.numel() for p in module.parameters()) for module in (model, model.base_model))


def run_plan(config: Config) -> list[str]:
    """The plan as lines of text."""
    run, needs = config.run, config.algo.needs()
    steps = run.epochs * run.rollout_batch // run.minibatch
    per_step = run.minibatch // run.microbatch
    prompts = run.rollout_batch // run.samples_per_prompt
    lines = [
        f"batches: {run.iterations} iterations × {run.rollout_batch} responses "
        f"({prompts} prompts × {run.samples_per_prompt}) "
        f"= {run.iterations * run.rollout_batch} responses",
        f"updates: {run.epochs} epochs × {run.rollout_batch // run.minibatch} minibatches of {run.minibatch} = "
        f"{steps} optimiser "
        f"steps per iteration, {steps * run.iterations} in all, each of {per_step} × {run.microbatch} responses",
        f"responses: up to {config.sampling.max_new_tokens} tokens after prompts of up to "
        f"{config.sampling.max_prompt_tokens}",
        *model_lines(config, needs.critics),
        passes(config, steps),
    ]
    return lines


def model_lines(config: Config, critics: tuple[str, ...]) -> list[str]:
    """One line per model that the run loads: parameters and bytes while training, activations not counted."""
    architecture = load_config(config.model, config.model.path)
    whole, trunk = parameters(architecture)
    dtype = TORCH_DTYPES[config.model.dtype]
    source = config.model.path or "built by the SFT stage"
    lines = [
        f"policy: {architecture.model_type}, {_count(whole)} parameters, {_bytes(whole * TRAINED_BYTES)} with "
        f"optimizer ({source})"
    ]
    for name in critics:
        if config.critic.kind is CriticKind.separate:
            lines.append(
                f"critic {name}: {_count(trunk)} parameters, {_bytes(trunk * TRAINED_BYTES)} with optimizer "
                "(a network of its own)"
            )
        else:
            lines.append(f"critic {name}: a head on the policy's trunk")
    frozen = whole * dtype.itemsize
    lines.append(f"reference: {_count(whole)} parameters, {_bytes(frozen)} (frozen, {config.model.dtype.value})")
    if config.reference.refresh_every:
        lines.append(
            f"moving reference: {_count(whole)} parameters, {_bytes(frozen)} (refreshed every "
            f"{config.reference.refresh_every} iterations)"
        )
    lines.append(f"reward: {reward_words(config.reward)}")
    return lines


def reward_words(reward: Any) -> str:
    """A reward in a few words."""
    if reward.lacks_model:
        return "a model built by the reward stage"
    return f"{type(reward).__name__} {getattr(reward, 'path', None) or getattr(reward, 'target', '')}".strip()


def passes(config: Config, steps: int) -> str:
    """Sequences that go through each model in one iteration."""
    n, needs, epochs = config.run.rollout_batch, config.algo.needs(), config.run.epochs
    before = [f"reference {n}", *(f"critic {n}" for _ in needs.critics)]
    if needs.old_logprobs:
        before.append(f"old log-probs {n}")
    return (
        f"passes per iteration: sampling {n} sequences, reward {n}, {', '.join(before)}, then {epochs} × {n} "
        f"forward and backward through policy{' and critic' if needs.critics else ''}"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} G"


def _bytes(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
