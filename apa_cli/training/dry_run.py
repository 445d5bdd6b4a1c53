"""What a run will do, before it does it: batch arithmetic, models with their memory, number of passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from apa_cli.models.loading import TORCH_DTYPES, load_config, parameter_count, train_top
from apa_cli.models.lora import POLICY, add_adapter
from apa_cli.rewards.base import Part
from apa_cli.settings import Config, CriticKind, Quantization

TRAINED_BYTES = 16
"""Bytes per trained parameter: weight, gradient and AdamW's two moments in float32."""
FROZEN_BYTES = {Quantization.int8: 1, Quantization.int4: 0.5}
"""Bytes per parameter of a quantized base."""


@dataclass(frozen=True)
class Size:
    """Parameters of a model on the meta device: all, those of its trunk, and those that are trained."""

    whole: int
    trunk: int
    trained: int
    trained_trunk: int
    """Trained parameters of a copy of the trunk as a critic has it: all of them, or an adapter's."""


def sizes(config: Config, architecture: PretrainedConfig) -> Size:
    """Counted without allocating anything."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
        whole, trunk = parameter_count(model), parameter_count(model.base_model)
        if config.lora.rank:
            add_adapter(model, config.lora, POLICY, 0)
        elif config.model.trainable_layers is not None:
            train_top(model, config.model.trainable_layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Size(whole, trunk, trained, trained if config.lora.rank else trunk)


def run_plan(config: Config, processes: int = 1) -> list[str]:
    """The plan as lines of text."""
    run, needs = config.run, config.algo.needs()
    steps = run.update_epochs * run.rollout_batch_size // run.minibatch_size
    own = run.minibatch_size // processes
    microbatch = min(run.microbatch_size, own)
    shares = f"{processes} processes × " if processes > 1 else ""
    prompts = run.rollout_batch_size // run.samples_per_prompt
    lines = [
        f"batches: {run.iterations} iterations × {run.rollout_batch_size} responses "
        f"({prompts} prompts × {run.samples_per_prompt}) "
        f"= {run.iterations * run.rollout_batch_size} responses",
        f"updates: {run.update_epochs} epochs × {run.rollout_batch_size // run.minibatch_size} minibatches of {run.minibatch_size} = "
        f"{steps} optimiser "
        f"steps per iteration, {steps * run.iterations} in all, each of {shares}{-(-own // microbatch)} × {microbatch} "
        "responses",
        f"responses: up to {config.sampling.max_new_tokens} tokens after prompts of up to "
        f"{config.sampling.max_prompt_tokens}",
        *model_lines(config, needs.critics),
        passes(config, steps),
    ]
    return lines


def model_bytes(config: Config, size: Size) -> dict[str, float]:
    """Bytes of each model that the run loads, the reward excepted: weights, gradients and AdamW's moments of what is
    trained, weights of what is not. Activations are not counted. What shares another's weights is there with the rest.
    """
    itemsize = TORCH_DTYPES[config.model.dtype].itemsize
    base_bytes = FROZEN_BYTES.get(config.model.quantization, itemsize) if config.lora.rank else 4

    def memory(whole: int, trained: int) -> float:
        return trained * TRAINED_BYTES + (whole - trained) * base_bytes

    adapter = size.trained if config.lora.rank else 0
    found = {"policy": memory(size.whole + adapter, size.trained)}
    for name in config.algo.needs().critics:
        if config.critic.kind is CriticKind.separate:
            found[f"critic {name}"] = memory(critic_parameters(config, size), size.trained_trunk)
        elif config.critic.kind is CriticKind.adapter:
            found[f"critic {name}"] = size.trained * TRAINED_BYTES
    if not config.lora.rank:
        found["reference"] = size.whole * itemsize
    if config.reference.refresh_every:
        found["moving reference"] = size.whole * itemsize
    return found


def critic_parameters(config: Config, size: Size) -> int:
    """Parameters of a critic with a network of its own, its head not counted."""
    return size.trunk + (size.trained_trunk if config.lora.rank else 0)


def model_lines(config: Config, critics: tuple[str, ...]) -> list[str]:
    """One line per model that the run loads: parameters and bytes while training, activations not counted."""
    architecture = load_config(config.model, config.model.path)
    size = sizes(config, architecture)
    memory = {name: bytes_words(value) for name, value in model_bytes(config, size).items()}
    source = config.model.path or "built by the SFT stage"

    def words(name: str, whole: int, trained: int) -> str:
        return f"{_count(whole)} parameters, {_count(trained)} of them trained, {memory[name]} with optimizer"

    lines = [f"policy: {architecture.model_type}, {words('policy', size.whole, size.trained)} ({source})"]
    for name in critics:
        critic = f"critic {name}"
        if config.critic.kind is CriticKind.separate:
            whole = critic_parameters(config, size)
            lines.append(f"{critic}: {words(critic, whole, size.trained_trunk)} (a network of its own)")
        elif config.critic.kind is CriticKind.adapter:
            parameters = _count(size.trained)
            lines.append(f"{critic}: an adapter on the policy's base, {parameters} parameters, {memory[critic]}")
        else:
            lines.append(f"{critic}: a head on the policy's trunk")
    whole = size.whole
    if config.lora.rank:
        lines.append("reference: the policy's base, its adapter switched off")
    else:
        lines.append(
            f"reference: {_count(whole)} parameters, {memory['reference']} (frozen, {config.model.dtype.value})"
        )
    if config.reference.refresh_every:
        lines.append(
            f"moving reference: {_count(whole)} parameters, {memory['moving reference']} (refreshed every "
            f"{config.reference.refresh_every} iterations)"
        )
    lines.append(f"reward: {reward_words(config.reward)}")
    lines += [f"reward in evaluation, {part.name}: {reward_words(part.reward)}" for part in config.evaluation.rewards]
    return lines


def reward_words(reward: Any) -> str:
    """A reward in a few words."""
    parts = [part for part in getattr(reward, "parts", ()) if isinstance(part, Part)]
    if parts:
        return " + ".join(f"{part.weight:g} × ({part.name}: {reward_words(part.reward)})" for part in parts)
    if reward.lacks_model:
        return "a model built by the reward stage"
    places = [getattr(reward, "path", None), getattr(reward, "target", None), *getattr(reward, "paths", ())]
    return f"{type(reward).__name__} {', '.join(filter(None, places))}".strip()


def passes(config: Config, steps: int) -> str:
    """Sequences that go through each model in one iteration."""
    n, needs, epochs = config.run.rollout_batch_size, config.algo.needs(), config.run.update_epochs
    before = [f"reference {n}", *(f"critic {n}" for _ in needs.critics)]
    if needs.old_logprobs:
        before.append(f"old log-probs {n}")
    return (
        f"passes per iteration: sampling {n} sequences, reward {n}, {', '.join(before)}, then {epochs} × {n} "
        f"forward and backward through policy{' and critic' if needs.critics else ''}"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e6:.1f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} G"


def bytes_words(size: float) -> str:
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
