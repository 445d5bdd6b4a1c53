"""Construction of a run's trainer: load, distribute, track, construct."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.distributed.device import claim_gpu, should_use_gpu
from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.hardware import cpu_matmul as matmul
from apa_cli.hardware.allocator import keep_freed_blocks
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.models.forward import probe_models
from apa_cli.models.loading import TORCH_DTYPES, find_end_token_ids, load_policy, load_tokenizer
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.models.prompting import PromptFormat
from apa_cli.models.sharding import (
    find_trained_blocks,
    replicate_model,
    shard_model,
    shard_reference,
    shard_reward_model,
)
from apa_cli.models.structure import make_frozen_copy, move_to_device
from apa_cli.models.tokenization import show_tokens
from apa_cli.rewards.base import CheckedScoreFunction, Placement, add_score_check, show_model_input
from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.files import read_state
from apa_cli.runs.formatting import quote_text
from apa_cli.runs.resume import INPUTS
from apa_cli.runs.tracking import Tracker, make_tracker
from apa_cli.settings import Config, FrozenPlacement, LaunchSettings, ParallelStrategy
from apa_cli.stages.cache import fill_model_paths, find_or_train_reward_model
from apa_cli.training.dry_run import describe_run
from apa_cli.training.evaluator import MAIN_REWARD, Evaluator
from apa_cli.training.examples import load_examples, select_training_rows
from apa_cli.training.forward_passes import ForwardPasses
from apa_cli.training.hooks import instruct
from apa_cli.training.input_digests import compare_inputs, digest_inputs
from apa_cli.training.mfu import UpdateMeter, measure_run_matrix_rate
from apa_cli.training.models import (
    RunModels,
    build_samplers,
    build_training_model,
    check_model_limits,
    check_training_options,
    load_guide,
)
from apa_cli.training.rollout_builder import RolloutBuilder
from apa_cli.training.trainer import Trainer
from apa_cli.training.updater import Updater, build_optimizer
from apa_cli.types import Example


@dataclass(frozen=True)
class RunInputs:
    """Data, prompt format and reward of a run."""

    train: list[Example]
    held_out: list[Example]
    prompt_format: PromptFormat
    end_tokens: frozenset[int]
    score: CheckedScoreFunction
    """The reward that the run trains on."""
    placement: Placement
    """Placement of reward models."""


def build_trainer(
    config: Config, path: Path, group: str | None, resume: Path | None, console: Console, world: World = SINGLE_PROCESS
) -> Trainer:
    """Build the trainer of a run in the directory `path`, in the state of the checkpoint `resume` if one is given.

    The checkpoint may belong to another run, of which this run is a fork. `group` is the sweep's name for the tracker.
    """
    device = set_up_device(config.launch, world)
    train, held_out = load_examples(config, console.say)
    with world.main_process_first():
        config = run_missing_stages(config, train, held_out, device, console)
    for line in describe_run(config, world.size):
        console.say(line)
    warn_of_biased_sampling(config, console)
    say_idle_fields(config, console)
    check_training_options(config)
    tokenizer = load_tokenizer(config.model, config.model.resolved_path)
    policy = load_policy(config.model, config.model.resolved_path, frozen_base=config.lora.rank > 0)
    models = prepare_models(config, policy, tokenizer, device)
    inputs = load_inputs(config, select_training_rows(config, train), held_out, policy, tokenizer, device, world)
    for line in [*describe_prompt(config, inputs), *describe_reward_input(config, inputs)]:
        console.say(line)
    digests = world.broadcast_from_main(partial(digest_inputs, config, train, held_out))
    is_fork = resume is not None and not resume.resolve().is_relative_to(path.resolve())
    if resume is not None:
        recorded = read_state(resume).get(INPUTS)
        compare_inputs(recorded, digests, config.run.resume_changed, is_fork, console.say)
    update_meter = build_update_meter(config, models, device, world)
    models = distribute_models(config, models, device, world)
    checkpoint = None if resume is None else checkpoints.load_checkpoint(resume)
    wandb_id = None if checkpoint is None or is_fork else checkpoint[1]["wandb_id"]
    directory, tracker = RunDirectory(path), Tracker()
    if world.is_main:
        tracker = start_tracker(config, path, group, wandb_id, console)
        write_environment(config, directory, device, world)
    trainer = construct_trainer(config, inputs, models, update_meter, directory, console, tracker, device, world)
    trainer.inputs = digests
    if resume is not None and checkpoint is not None:
        trainer.restore_checkpoint(*checkpoint, RunDirectory(resume.parent.parent))
    return trainer


# --- load ---------------------------------------------------------------------------------------------------


def set_up_device(settings: LaunchSettings, world: World = SINGLE_PROCESS) -> torch.device:
    """Set CPU threads and the matmul library, and return the device to compute on."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    matmul.select_matmul(settings.matmul)
    if should_use_gpu(settings):
        return torch.device("cuda", claim_gpu(settings, world))
    keep_freed_blocks()
    return torch.device("cpu")


def run_missing_stages(
    config: Config, train: list[Example], held_out: list[Example], device: torch.device, console: Console
) -> Config:
    """Return the configuration with the models of the SFT and reward stages filled in, cached or newly trained."""
    report = make_stage_reporter(console, "stage")
    config = fill_model_paths(config, train, held_out, device, console.say, report)
    rewards = config.evaluation.rewards
    if not any(part.reward.needs_trained_model for part in rewards):
        return config
    path = find_or_train_reward_model(config, train, held_out, device, console.say, report)
    rewards = [part.use_trained_model(path) for part in rewards]
    return replace(config, evaluation=replace(config.evaluation, rewards=rewards))


def make_stage_reporter(console: Console, name: str) -> Callable[[int, int, float], None]:
    """Return report(step, steps, loss), which prints the progress and remaining time at every tenth of a stage.

    Several stages may report to it, one after the other.
    """
    first, start_time = 0, 0.0

    def report(step: int, steps: int, loss: float) -> None:
        nonlocal first, start_time
        if not 0 < first < step:
            first, start_time = step, time.monotonic()
        elif step == steps or step % max(1, steps // 10) == 0:
            left = (time.monotonic() - start_time) / (step - first) * (steps - step)
            console.say(f"{name}: step {step}/{steps}, loss {loss:.3f}, {left:.0f} s left")

    return report


def warn_of_biased_sampling(config: Config, console: Console) -> None:
    """Warn if top_k or top_p truncates the sampling distribution."""
    if config.sampling.top_k or config.sampling.top_p < 1:
        console.warn(
            "sampling.top_k, sampling.top_p: the sampling distribution is truncated and log-probs are not, so "
            "advantages, ratios, kl/*, policy/entropy and a price of KL are those of the whole distribution, on "
            "truncated samples; eval/kl_exact and eval/entropy are the truncated sampler's. 0 and 1 turn truncation off"
        )


def say_idle_fields(config: Config, console: Console) -> None:
    """Say which of the algorithm's settings have no effect for lack of a critic."""
    if not config.needs.critics:
        by_reason: dict[str, list[str]] = {}
        for name, reason in config.algo.idle_fields().items():
            by_reason.setdefault(reason, []).append(f"algo.{name}")
        for reason, keys in by_reason.items():
            console.say(f"{', '.join(keys)}: no effect with algo.{reason}")


def prepare_models(
    config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> RunModels:
    """Return the models of a run, whole on `device`. Raise ConfigError if the policy does not fit the tokenizer."""
    move_to_device(policy, device)
    check_model_limits(config, policy, tokenizer)
    guide = load_guide(config, policy, tokenizer)
    model, reference = build_training_model(config, policy)
    model.to(device)
    moving_reference = copy_policy(config, policy) if config.reference.refresh_every else None
    return RunModels(model, model, policy, reference, moving_reference, guide)


def build_update_meter(
    config: Config, models: RunModels, device: torch.device, world: World = SINGLE_PROCESS
) -> UpdateMeter:
    """Return the meter of the updates; it counts parameters, so the models must not be sharded yet."""
    rate = world.size * measure_run_matrix_rate(device, config.model.dtype)
    return UpdateMeter.from_model(models.model, config, rate)


def copy_policy(config: Config, policy: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of the policy in the compute dtype."""
    return make_frozen_copy(policy, TORCH_DTYPES[config.model.dtype])


def load_inputs(
    config: Config,
    train: list[Example],
    held_out: list[Example],
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    world: World = SINGLE_PROCESS,
) -> RunInputs:
    """Load the reward, and return it with the data and the prompt format."""
    placement = make_placement(config, device, world)
    return RunInputs(
        train=train,
        held_out=held_out,
        prompt_format=PromptFormat(tokenizer, config.dataset.prompt_style),
        end_tokens=find_end_token_ids(policy, tokenizer),
        score=load_reward(config, placement),
        placement=placement,
    )


def describe_prompt(config: Config, inputs: RunInputs) -> list[str]:
    """Return lines with the first prompt as the policy reads it, special tokens visible, and what ends a response."""
    tokenizer, example, sampling = inputs.prompt_format.tokenizer, inputs.train[0], config.sampling
    instructed = instruct(config.algo, example, 1)
    prompt, _ = inputs.prompt_format.encode_instructed(example, instructed, 0, 0, sampling.max_prompt_tokens)
    ends = [show_tokens(tokenizer, [token]) for token in sorted(inputs.end_tokens)]
    ends += [repr(string) for string in sampling.stop_strings if string]
    return [
        f"first prompt, {len(prompt.token_ids)} tokens: {quote_text(show_tokens(tokenizer, prompt.token_ids))}",
        f"a response ends at {', '.join(dict.fromkeys(ends))}{' or ' if ends else ''}{sampling.max_new_tokens} tokens",
    ]


def describe_reward_input(config: Config, inputs: RunInputs) -> list[str]:
    """Return a line per model of the reward with the first prompt and a response as it reads them."""
    example = inputs.train[0]
    prompt, _ = inputs.prompt_format.encode_prompt(example, 0, 0, config.sampling.max_prompt_tokens)
    response = example.chosen or example.response or " (response)"
    texts = show_model_input(inputs.score, prompt.text, response, prompt.columns)
    return [f"the reward{name and f' {name}'} reads: {quote_text(text)}" for name, text in texts.items()]


def make_placement(config: Config, device: torch.device, world: World = SINGLE_PROCESS) -> Placement:
    """Return the placement of reward models: with FSDP as `launch.frozen_placement` says, else whole."""
    shard, frozen = None, config.launch.frozen_placement
    if is_sharded(config, world) and frozen is not FrozenPlacement.replicated:
        shard = partial(shard_reward_model, frozen=frozen, ready=world.check_all_ranks)
    return Placement(str(device), config.model.dtype.value, shard)


def load_reward(config: Config, placement: Placement) -> CheckedScoreFunction:
    """Load the reward that the run trains on."""
    return add_score_check(config.reward.load(placement))


# --- distribute ---------------------------------------------------------------------------------------------


def is_sharded(config: Config, world: World) -> bool:
    """Return True if the weights are spread over the ranks by FSDP."""
    return world.size > 1 and config.launch.strategy is ParallelStrategy.fsdp


def distribute_models(config: Config, models: RunModels, device: torch.device, world: World) -> RunModels:
    """Return the models wrapped by DDP or sharded by FSDP; with one process unchanged."""
    if world.size == 1:
        return models
    model = models.model
    if not is_sharded(config, world):
        return replace(models, trained=replicate_model(model, device))
    probe_models([model.policy, models.reference, *model.critic_backbones()])
    sampler = copy_policy(config, model.policy)
    reference = models.reference
    if isinstance(reference, AdapterDisabledModel):
        reference = AdapterDisabledModel(sampler)
    else:
        reference = shard_reference(reference, config.launch.frozen_placement)
    return replace(models, trained=shard_model(model, find_trained_blocks(model)), sampler=sampler, reference=reference)


# --- track --------------------------------------------------------------------------------------------------


def start_tracker(config: Config, path: Path, group: str | None, wandb_id: str | None, console: Console) -> Tracker:
    """Start the tracker of the run in `path`; `wandb_id` continues that wandb run."""
    tracking = config.tracking
    return make_tracker(
        tracking.kind.value, tracking.project, tracking.mode.value, path, path.name, tracking.group or group,
        config.raw, wandb_id, console.say,
    )  # fmt: skip


def write_environment(config: Config, directory: RunDirectory, device: torch.device, world: World) -> None:
    """Write environment.json: machine, versions, models, and the algorithm's label, color and meaning of λ."""
    algorithm = config.algo
    directory.write_environment(
        device=str(device),
        gpu=torch.cuda.get_device_name() if device.type == "cuda" else None,
        processes=world.size,
        threads=torch.get_num_threads(),
        matmul=matmul.get_active_matmul().value,
        policy=config.model.path,
        reward=getattr(config.reward, "path", None),
        algorithm={
            "label": algorithm.label,
            "color": algorithm.color,
            "lambda_meaning": algorithm.lambda_meaning,
        },
    )


# --- construct ----------------------------------------------------------------------------------------------


def construct_trainer(
    config: Config,
    inputs: RunInputs,
    models: RunModels,
    update_meter: UpdateMeter,
    directory: RunDirectory,
    console: Console,
    tracker: Tracker,
    device: torch.device,
    world: World = SINGLE_PROCESS,
) -> Trainer:
    """Return the trainer of a new run, with its updater and evaluator."""
    microbatch, sampling_batch = build_batch_sizes(config, console, is_fixed=is_sharded(config, world))
    optimizer = build_optimizer(models.model, config.optimizer)
    return Trainer(
        config=config,
        directory=directory,
        console=console,
        tracker=tracker,
        models=models,
        rollout_builder=RolloutBuilder(
            config, models, build_samplers(config, models, inputs.prompt_format.tokenizer), inputs.prompt_format,
            inputs.end_tokens, inputs.train, sampling_batch, world,
        ),
        forward_passes=ForwardPasses(config, models, microbatch, device, world),
        score=inputs.score,
        updater=Updater(
            config.algo, config.needs, models.trained, optimizer, config.run, config.optimizer, config.model.dtype,
            device, microbatch, world,
        ),
        evaluator=build_evaluator(config, inputs, models.reference, microbatch, sampling_batch, world),
        update_meter=update_meter,
        device=device,
        world=world,
    )  # fmt: skip


def build_batch_sizes(
    config: Config, console: Console, is_fixed: bool = False
) -> tuple[BatchSizeHalver, BatchSizeHalver]:
    """Return `microbatch_size` and `sampling.microbatch_size`, each halved when memory runs out.

    With `is_fixed`, `microbatch_size` is not halved: with sharded weights the other ranks wait inside a pass for the
    rank that failed.
    """
    size = config.run.microbatch_size
    return (
        BatchSizeHalver("microbatch_size", size, size if is_fixed else 1, console.warn),
        BatchSizeHalver("sampling.microbatch_size", config.sampling.microbatch_size, 1, console.warn),
    )


def build_evaluator(
    config: Config,
    inputs: RunInputs,
    reference: PreTrainedModel | AdapterDisabledModel,
    microbatch: BatchSizeHalver,
    sampling_batch: BatchSizeHalver,
    world: World = SINGLE_PROCESS,
) -> Evaluator:
    """Return the evaluator on the first `evaluation.prompts` held-out prompts, with `evaluation.rewards` loaded."""
    examples, longest = inputs.held_out[: config.evaluation.prompts], config.sampling.max_prompt_tokens
    further = {part.name: part.load(inputs.placement) for part in config.evaluation.rewards}
    prompt_format = inputs.prompt_format
    instructed = [instruct(config.algo, example, None) for example in examples]
    return Evaluator(
        prompts=[
            prompt_format.encode_instructed(example, read, place, 0, longest)[0]
            for place, (example, read) in enumerate(zip(examples, instructed, strict=True))
        ],
        plain_prompt_ids=[prompt_format.encode_prompt(example, 0, 0, longest)[0].token_ids for example in examples],
        sources=[example.prompt for example in examples],
        tokenizer=prompt_format.tokenizer,
        reference=reference,
        scores={MAIN_REWARD: inputs.score, **further},
        describe=config.dataset.describe,
        sampling=config.sampling,
        end_tokens=inputs.end_tokens,
        seed=config.evaluation.seed,
        sampling_batch=sampling_batch,
        microbatch=microbatch,
        dtype=config.model.dtype,
        world=world,
    )
