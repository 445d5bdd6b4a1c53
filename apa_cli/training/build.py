"""Puts a run together: data, stages, models, reward, tracker."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.distributed.world import ALONE, World, gpu, use_gpu
from apa_cli.errors import ConfigError, UserError
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.hardware.allocator import keep_freed_blocks
from apa_cli.hardware.oom import Halving
from apa_cli.models.critic import Critic, build_critic
from apa_cli.models.forward import TrainingModel, checkpoint_activations, examine
from apa_cli.models.frozen_copy import frozen_copy
from apa_cli.models.loading import TORCH_DTYPES, end_tokens, load_merged, load_policy, load_tokenizer, train_top
from apa_cli.models.lora import POLICY, WithoutAdapter, add_adapter
from apa_cli.models.prompting import PromptFormat
from apa_cli.models.sharding import replicated, sharded, sharded_reference, sharded_reward, trained_blocks
from apa_cli.randomness import Stream, torch_seed
from apa_cli.rewards.base import CheckedScore, Placement, checked
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.tracking import Tracker, make_tracker
from apa_cli.settings import Config, CriticInit, CriticKind, Frozen, LaunchSettings, Quantization, Strategy
from apa_cli.stages.cache import resolved, reward_model
from apa_cli.training.dry_run import run_plan
from apa_cli.training.evaluator import MAIN, Evaluator
from apa_cli.training.mfu import UpdateMeter, run_matrix_rate
from apa_cli.training.trainer import Trainer
from apa_cli.training.updater import Updater, build_optimizer
from apa_cli.types import Example

ADAPTER_NUMBER = 1000
"""What keys the first weights of the policy's adapter; critics count from 0."""


def launch(settings: LaunchSettings, world: World = ALONE) -> torch.device:
    """The device to compute on; CPU threads and products set."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    matmul.use(settings.matmul)
    if use_gpu(settings):
        return torch.device("cuda", gpu(settings, world))
    keep_freed_blocks()
    return torch.device("cpu")


def load_examples(config: Config, say: Callable[[str], None]) -> tuple[list[Example], list[Example]]:
    """The data set's train and test rows. What was left out is said; no prompt to train on is held out too."""
    try:
        train, held_out = config.dataset.load("train"), config.dataset.load("test")
    except ValueError as error:
        raise UserError(f"dataset: {error}") from error
    for split, rows in (("train", train), ("test", held_out)):
        if dropped := getattr(rows, "dropped", {}):
            reasons = ", ".join(f"{count} {reason}" for reason, count in dropped.items())
            say(f"dataset: {len(rows)} {split} rows; left out: {reasons}")
    prompts = {example.prompt for example in held_out}
    shared = {example.prompt for example in train} & prompts
    if shared:
        train = [example for example in train if example.prompt not in prompts]
        say(
            f"dataset: {len(shared)} held-out prompts were in train too and are left out there, such as {min(shared)!r}"
        )
    if not train or not held_out:
        raise UserError(f"dataset: {len(train)} rows to train on and {len(held_out)} held out; both are needed")
    columns = sorted({name for example in train for name in example.columns})
    further = f"; further columns: {', '.join(columns)}" if columns else ""
    say(f"dataset: {len(train)} rows to train on, {len(held_out)} held out{further}")
    return train, held_out


def stage_progress(console: Console, name: str) -> Callable[[int, int, float], None]:
    """Says how far a stage is, at every tenth of it. Several stages may report to it, one after the other."""
    first, begun = 0, 0.0

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal first, begun
        if not 0 < first < step:
            first, begun = step, time.monotonic()
        elif step == steps or step % max(1, steps // 10) == 0:
            left = (time.monotonic() - begun) / (step - first) * (steps - step)
            console.say(f"{name}: step {step}/{steps}, loss {loss:.3f}, {left:.0f} s left")

    return progress


def build_trainer(
    config: Config, path: Path, group: str | None, resume: Path | None, console: Console, world: World = ALONE
) -> Trainer:
    """Everything that `Trainer` needs, in `path`; with `resume`, as that checkpoint of this run or another left it."""
    device = launch(config.launch, world)
    sharding = world.size > 1 and config.launch.strategy is Strategy.fsdp
    train, held_out = load_examples(config, console.say)
    as_given, directory = config, RunDirectory(path)
    with world.main_first():
        config = resolved(config, train, held_out, device, console.say, stage_progress(console, "stage"))
        config = with_further_rewards(config, train, held_out, device, console)
    for line in run_plan(config, world.size):
        console.say(line)
    if config.sampling.top_k or config.sampling.top_p < 1:
        console.warn(
            "sampling.top_k and top_p cut the distribution that samples, and what is scored stays the whole one: "
            "advantages, ratios and KL are then biased"
        )
    tokenizer = load_tokenizer(config.model, config.model.path)
    form = PromptFormat(tokenizer, config.dataset.prompt_form)
    check_training(config)
    policy = load_policy(config.model, config.model.path, frozen_base=config.lora.rank > 0)
    check_lengths(config, policy, tokenizer)
    policy.to(device)
    model, reference = training_model(config, policy)
    model.to(device)
    place = placement(config, device, world)
    score = load_reward(config, place)
    ends = end_tokens(policy, tokenizer)
    refreshed = config.reference.refresh_every > 0
    moving = frozen_copy(policy, TORCH_DTYPES[config.model.dtype]) if refreshed else None
    sampler, trained = policy, model
    meter = UpdateMeter.of(model, config, world.size * run_matrix_rate(device, config.model.dtype))
    if sharding:
        examine([policy, reference, *model.backbones()])
        sampler = frozen_copy(policy, TORCH_DTYPES[config.model.dtype])
        reference = (
            WithoutAdapter(sampler)
            if config.lora.rank
            else sharded_reference(reference, config.launch.frozen_placement)
        )
        trained = sharded(model, trained_blocks(model))
    elif world.size > 1:
        trained = replicated(model, device)
    microbatch, sampling_batch = halvings(config, console, sharding)
    updater = Updater(
        config.algo, trained, build_optimizer(model, config.optimizer), config.run, config.optimizer,
        config.model.dtype, device, microbatch, world,
    )  # fmt: skip
    evaluator = build_evaluator(
        config, held_out, form, reference, ends, score, place, microbatch, sampling_batch, world
    )
    wandb_id, loaded_state = None, None
    if resume is not None:
        loaded_state = checkpoints.load(resume)
        own = resume.resolve().is_relative_to(path.resolve())
        wandb_id = loaded_state[1]["wandb_id"] if own else None
    tracking, tracker = config.tracking, Tracker()
    if world.is_main:
        tracker = make_tracker(
            tracking.kind.value, tracking.project, tracking.mode.value, path, path.name, tracking.group or group,
            as_given.raw, wandb_id, console.say,
        )  # fmt: skip
        directory.write_environment(
            device=str(device),
            gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
            processes=world.size,
            threads=torch.get_num_threads(),
            matmul=matmul.used().value,
            policy=config.model.path,
            reward=getattr(config.reward, "path", None),
        )
    trainer = Trainer(
        config=config,
        directory=directory,
        console=console,
        tracker=tracker,
        tokenizer=tokenizer,
        format=form,
        end_tokens=ends,
        examples=train,
        score=score,
        model=model,
        reference=reference,
        updater=updater,
        evaluator=evaluator,
        device=device,
        sampler=sampler,
        sampling_batch=sampling_batch,
        update_meter=meter,
        world=world,
        moving_reference=moving,
    )
    if loaded_state is not None:
        trainer.load_checkpoint(*loaded_state)
    return trainer


def halvings(config: Config, console: Console, fixed: bool) -> tuple[Halving, Halving]:
    """`microbatch` and `sampling.microbatch_size`, which are halved where memory runs out.

    With weights spread over the processes the former is not: the others wait amid a pass for the one that failed.
    """
    size = config.run.microbatch_size
    return (
        Halving("microbatch_size", size, size if fixed else 1, console.warn),
        Halving("sampling.microbatch_size", config.sampling.microbatch_size, 1, console.warn),
    )


def with_further_rewards(
    config: Config, train: list[Example], held_out: list[Example], device: torch.device, console: Console
) -> Config:
    """The configuration with the reward stage's model in those of `evaluation.rewards` that lack one."""
    parts = config.evaluation.rewards
    if not any(part.reward.lacks_model for part in parts):
        return config
    built = reward_model(config, train, held_out, device, console.say, stage_progress(console, "stage"))
    rewards = [part.with_model(built) for part in parts]
    return replace(config, evaluation=replace(config.evaluation, rewards=rewards))


def placement(config: Config, device: torch.device, world: World = ALONE) -> Placement:
    """How the models of rewards are held: with fsdp as `launch.frozen_placement` says, else whole."""
    spread, frozen = None, config.launch.frozen_placement
    if world.size > 1 and config.launch.strategy is Strategy.fsdp and frozen is not Frozen.replicated:
        spread = partial(sharded_reward, frozen=frozen, ready=world.ready)
    return Placement(str(device), config.model.dtype.value, spread)


def load_reward(config: Config, place: Placement) -> CheckedScore:
    """The reward that the run trains on."""
    return checked(config.reward.load(place))


def build_evaluator(
    config: Config,
    held_out: list[Example],
    form: PromptFormat,
    reference: PreTrainedModel | WithoutAdapter,
    ends: frozenset[int],
    score: CheckedScore,
    place: Placement,
    microbatch: Halving,
    sampling_batch: Halving,
    world: World = ALONE,
) -> Evaluator:
    """The evaluation on the first `evaluation.prompts` held-out prompts."""
    fixed, longest = held_out[: config.evaluation.prompts], config.sampling.max_prompt_tokens
    further = {part.name: part.load(place) for part in config.evaluation.rewards}
    return Evaluator(
        prompts=[form.prompt(example, place, 0, longest)[0] for place, example in enumerate(fixed)],
        sources=[example.prompt for example in fixed],
        tokenizer=form.tokenizer,
        reference=reference,
        scores={MAIN: score, **further},
        describe=config.dataset.describe,
        sampling=config.sampling,
        end_tokens=ends,
        eval_seed=config.evaluation.seed,
        sampling_batch=sampling_batch,
        microbatch=microbatch,
        dtype=config.model.dtype,
        world=world,
    )


def training_model(config: Config, policy: PreTrainedModel) -> tuple[TrainingModel, PreTrainedModel | WithoutAdapter]:
    """Policy and critics with the weights that are to be trained, and the reference: a copy, or LoRA's own base."""
    separate = config.critic.kind is CriticKind.separate
    built = critics(config, policy) if separate else {}  # copies of the trunk as it is loaded
    reference: Any
    if config.lora.rank:
        add_adapter(policy, config.lora, POLICY, torch_seed(config.run.seed, Stream.initialization, ADAPTER_NUMBER))
        reference = WithoutAdapter(policy)
    else:
        reference = frozen_copy(policy, TORCH_DTYPES[config.model.dtype])
        if config.model.trainable_layers is not None:
            train_top(policy, config.model.trainable_layers)
    built = built or critics(config, policy)
    if config.model.gradient_checkpointing:
        for part in (policy, *(critic.backbone for critic in built.values() if critic.backbone is not None)):
            checkpoint_activations(part)
    return TrainingModel(policy, built, config.sampling.temperature), reference


def critics(config: Config, policy: PreTrainedModel) -> dict[str, Critic]:
    """The critics that the algorithm asks for, by name."""
    names = config.algo.needs().critics
    start = critic_start(config, policy) if names and config.critic.init is CriticInit.reward else None
    seed = config.run.seed
    return {
        name: build_critic(
            policy, config.critic, config.lora, name, torch_seed(seed, Stream.initialization, number), start
        )
        for number, name in enumerate(names)
    }


def check_training(config: Config) -> None:
    """What cannot be trained together."""
    lora = config.lora.rank > 0
    if lora and config.model.trainable_layers is not None:
        raise ConfigError("model.trainable_layers: with lora the base is frozen; leave it null")
    if config.critic.kind is CriticKind.adapter and not lora:
        raise ConfigError("critic.kind: adapter needs lora, such as lora=default")
    if config.model.quantization is not Quantization.none:
        if not lora:
            raise ConfigError("model.quantization: only a frozen base can be quantized; give lora=default")
        if config.reference.refresh_every:
            raise ConfigError("model.quantization: a quantized reference cannot be refreshed; leave refresh_every 0")
        if config.critic.kind is CriticKind.separate:
            raise ConfigError("model.quantization: the critic shares the base; give critic=adapter or critic=head")


def critic_start(config: Config, policy: PreTrainedModel) -> PreTrainedModel:
    """The reward model's trunk, for `critic.init=reward`; it must read the policy's tokens."""
    path = getattr(config.reward, "path", None)
    if config.critic.kind is not CriticKind.separate or path is None:
        raise ConfigError("critic.init: reward needs critic.kind=separate and a reward that is a model")
    # With its head, whatever its size, because the names in an adapter are those of the whole model.
    whole = load_merged(
        AutoModelForSequenceClassification.from_pretrained,
        path,
        "reward.path",
        dtype=torch.float32,
        num_labels=1,
        ignore_mismatched_sizes=True,
        trust_remote_code=False,
    )
    model = whole.base_model
    for name in ("model_type", "vocab_size", "hidden_size"):
        found, wanted = getattr(model.config, name), getattr(policy.config, name)
        if found != wanted:
            raise ConfigError(f"critic.init: the reward model's {name} is {found}, the policy's {wanted}")
    own = load_tokenizer(replace(config.model, tokenizer=None), path)
    if own.get_vocab() != load_tokenizer(config.model, config.model.path).get_vocab():
        raise ConfigError("critic.init: the reward model's tokenizer is not the policy's")
    return model.eval()


def check_lengths(config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prompt and response fit the model's positions, the tokenizer's highest token its vocabulary."""
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    room = getattr(policy.config, "max_position_embeddings", None)
    if room is not None and longest > room:
        raise ConfigError(
            f"sampling: max_prompt_tokens {config.sampling.max_prompt_tokens} + max_new_tokens "
            f"{config.sampling.max_new_tokens} is more than the model's {room} positions"
        )
    size, highest = policy.get_input_embeddings().num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ConfigError(f"model.tokenizer: its highest token is number {highest}, the model has {size}")
