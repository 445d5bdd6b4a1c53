"""Start-up lines of a run: batch arithmetic, learning rates, meaning of λ, models with their memory, forward passes.

apa-train prints these lines before training; with dry_run=true it stops after them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from apa_cli.models.loading import TORCH_DTYPES, load_model_config
from apa_cli.models.lora import POLICY_ADAPTER, add_adapter
from apa_cli.models.structure import count_parameters, freeze_all_but_top, get_trunk
from apa_cli.randomness import Stream, make_generator
from apa_cli.rewards.base import NamedReward
from apa_cli.settings import Config, CriticKind, Quantization
from apa_cli.training.hooks import check_rollout_plans
from apa_cli.training.minibatches import count_steps
from apa_cli.types import GUIDE, INIT, OLD, REFERENCE, Critic

TRAINED_BYTES = 16
"""Bytes per trained parameter: weight, gradient and AdamW's two moments in float32."""
FROZEN_BYTES = {Quantization.int8: 1, Quantization.int4: 0.5}
"""Bytes per parameter of a quantized base."""
ROLL_IN = {INIT: "π_init ", REFERENCE: "the reference ", GUIDE: "the guide "}
"""Names of samplers in the line of a plan."""


def describe_run(config: Config, world_size: int = 1) -> list[str]:
    """Return the lines that describe the run in `world_size` processes."""
    return [
        *describe_batches(config, world_size),
        *describe_plans(config),
        describe_learning_rates(config),
        *describe_lambda(config),
        f"responses: up to {config.sampling.max_new_tokens} tokens after prompts of up to "
        f"{config.sampling.max_prompt_tokens}",
        *describe_models(config),
        describe_passes(config),
    ]


def describe_batches(config: Config, world_size: int) -> list[str]:
    """Return the arithmetic of iterations, responses, minibatches and microbatches."""
    run, per_row = config.run, config.needs.samples_multiple
    minibatches = count_steps(run.rollout_batch_size // per_row, per_row, run.minibatch_size)
    steps, size = run.update_epochs * minibatches, run.rollout_batch_size // minibatches
    share = math.ceil(size / world_size)
    microbatch = min(run.microbatch_size, share)
    processes = f"{world_size} processes × " if world_size > 1 else ""
    return [
        f"batches: {run.iterations} iterations × {run.rollout_batch_size} responses "
        f"({run.rollout_batch_size // run.samples_per_prompt} prompts × {run.samples_per_prompt}) "
        f"= {run.iterations * run.rollout_batch_size} responses",
        f"updates: {run.update_epochs} epochs × {minibatches} minibatches of {size} = {steps} optimizer "
        f"steps per iteration, {steps * run.iterations} in all, each of {processes}{-(-share // microbatch)} × "
        f"{microbatch} responses",
    ]


def describe_plans(config: Config) -> list[str]:
    """Return a line for each rollout plan of the first iteration that samples once per prompt."""
    rng = make_generator(config.run.seed, Stream.plan, 1)
    plans = check_rollout_plans(config.plan, config.plan.rollout(1, rng, config.algo.initial_state()))
    return [
        f"plan: {plan.samples or config.run.samples_per_prompt} further responses of {ROLL_IN.get(plan.roll_in, '')}"
        "to each prompt, sampled and scored the first time that it comes up and kept; not counted above or below"
        for plan in plans
        if plan.once_per_prompt
    ]


def describe_learning_rates(config: Config) -> str:
    """Return the learning rates with their schedule, the critic's if there is a critic."""
    settings = config.optimizer
    critic = f", critic {settings.critic_lr:g}" if config.needs.critics else ""
    schedule = f"{settings.lr_scheduler.value}, warm-up {settings.warmup_ratio * 100:g} % of the steps"
    return f"learning rates: policy {settings.lr:g}{critic} ({schedule})"


def describe_lambda(config: Config) -> list[str]:
    """Return a line with λ and its meaning in this algorithm; none if the algorithm has no λ."""
    meaning, value = config.algo.lambda_meaning, config.raw.get("lambda")
    if value is None:
        return []
    gae_lambda = getattr(config.algo, "gae_lambda", None)
    note = "" if gae_lambda is None else f" (GAE's λ is algo.gae_lambda, {gae_lambda:g})"
    return [f"lambda {value:g}{f': {meaning}' if meaning else ''}{note}"]


def describe_passes(config: Config) -> str:
    """Return how many sequences go through each model in one iteration."""
    n, needs, epochs = config.run.rollout_batch_size, config.needs, config.run.update_epochs
    passes = {name for names in needs.passes.values() for name in names}
    has_reference = config.reference.log_kl or bool(passes & {INIT, REFERENCE})
    before = [f"reference {n}"] if has_reference else []
    before += [f"critic {n}" for critic in needs.critics if critic.name in passes]
    if OLD in passes:
        before.append(f"old log-probs {n}")
    return (
        f"passes per iteration: {', '.join([f'sampling {n} sequences', f'reward {n}', *before])}, then {epochs} × {n} "
        f"forward and backward through policy{' and critic' if needs.critics else ''}"
    )


# --- models -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of the policy, from which those of its critics and its reference follow."""

    whole: int
    """All parameters, a LoRA adapter excepted."""
    trunk: int
    """The same without the output head."""
    trained: int
    trained_trunk: int
    """Trained parameters of a critic that is a copy of the trunk: all, or an adapter's."""


def measure_model_size(config: Config, architecture: PretrainedConfig) -> ModelSize:
    """Return the parameter counts, from a model on the meta device."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(architecture)
        whole, trunk = count_parameters(model), count_parameters(get_trunk(model))
        if config.lora.rank:
            add_adapter(model, config.lora, POLICY_ADAPTER, 0)
        elif config.model.trainable_layers is not None:
            freeze_all_but_top(model, config.model.trainable_layers)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ModelSize(whole, trunk, trained, trained if config.lora.rank else trunk)


def count_critic_parameters(config: Config, size: ModelSize) -> int:
    """Return the parameters of a critic with a network of its own, without its head."""
    return size.trunk + (size.trained_trunk if config.lora.rank else 0)


def estimate_model_bytes(config: Config, size: ModelSize) -> dict[str, float]:
    """Return the bytes of each model that the run loads, except the reward; shared weights count once.

    Trained weights count with gradient and AdamW's moments. Activations are not counted.
    """
    itemsize = TORCH_DTYPES[config.model.dtype].itemsize
    base_bytes = FROZEN_BYTES.get(config.model.quantization, itemsize) if config.lora.rank else 4

    def add_up(whole: int, trained: int) -> float:
        return trained * TRAINED_BYTES + (whole - trained) * base_bytes

    adapter = size.trained if config.lora.rank else 0
    sizes = {"policy": add_up(size.whole + adapter, size.trained)}
    for critic in config.needs.critics:
        kind = CriticKind.head if critic.on == "trunk" else config.critic.kind
        if kind is CriticKind.separate:
            sizes[f"critic {critic.name}"] = add_up(count_critic_parameters(config, size), size.trained_trunk)
        elif kind is CriticKind.adapter:
            sizes[f"critic {critic.name}"] = size.trained * TRAINED_BYTES
    if not config.lora.rank:
        sizes["reference"] = size.whole * itemsize
    if config.reference.refresh_every:
        sizes["moving reference"] = size.whole * itemsize
    return sizes


def describe_models(config: Config) -> list[str]:
    """Return a line per model that the run loads: parameters, and bytes in training, activations excluded."""
    architecture = load_model_config(config.model, config.model.path)
    size = measure_model_size(config, architecture)
    memory = {name: format_bytes(value) for name, value in estimate_model_bytes(config, size).items()}
    source = config.model.path or "built by the SFT stage"
    policy = describe_trained(size.whole, size.trained, memory["policy"])
    lines = [f"policy: {architecture.model_type}, {policy} ({source})"]
    lines += [describe_critic(config, critic, size, memory) for critic in config.needs.critics]
    whole = format_count(size.whole)
    if config.lora.rank:
        lines.append("reference: the policy's base without its adapter")
    else:
        lines.append(f"reference: {whole} parameters, {memory['reference']} (frozen, {config.model.dtype.value})")
    if config.reference.refresh_every:
        lines.append(
            f"moving reference: {whole} parameters, {memory['moving reference']} (refreshed every "
            f"{config.reference.refresh_every} iterations)"
        )
    lines.append(f"reward: {describe_reward(config.reward)}")
    rewards = config.evaluation.rewards
    return lines + [f"reward in evaluation, {part.name}: {describe_reward(part.reward)}" for part in rewards]


def describe_trained(whole: int, trained: int, memory: str) -> str:
    """Return the parameters and the memory of a model that is trained, at least in part."""
    return f"{format_count(whole)} parameters, {format_count(trained)} of them trained, {memory} with optimizer"


def describe_critic(config: Config, critic: Critic, size: ModelSize, memory: dict[str, str]) -> str:
    """Return a critic's line."""
    name, kind = f"critic {critic.name}", CriticKind.head if critic.on == "trunk" else config.critic.kind
    if kind is CriticKind.separate:
        parameters = describe_trained(count_critic_parameters(config, size), size.trained_trunk, memory[name])
        return f"{name}: {parameters} (a network of its own)"
    if kind is CriticKind.adapter:
        return f"{name}: an adapter on the policy's base, {format_count(size.trained)} parameters, {memory[name]}"
    return f"{name}: a head on the policy's trunk"


def describe_reward(reward: Any) -> str:
    """Return a short description of a reward."""
    parts = [part for part in getattr(reward, "parts", ()) if isinstance(part, NamedReward)]
    if parts:
        return " + ".join(f"{part.weight:g} × ({part.name}: {describe_reward(part.reward)})" for part in parts)
    if reward.needs_trained_model:
        return "a model built by the reward stage"
    sources = [getattr(reward, "path", None), getattr(reward, "target", None), *getattr(reward, "paths", ())]
    return f"{type(reward).__name__} {', '.join(filter(None, sources))}".strip()


def format_count(parameters: int) -> str:
    """Return a number of parameters in millions or billions."""
    return f"{parameters / 1e6:.1f} M" if parameters < 1e9 else f"{parameters / 1e9:.2f} G"


def format_bytes(size: float) -> str:
    """Return a number of bytes in MiB or GiB."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
