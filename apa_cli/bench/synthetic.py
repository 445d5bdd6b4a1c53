"""A run's trainer on random weights and random prompts: what apa-bench measures. Nothing is downloaded.

The weights are random ones of the architecture in conf/model, the prompts random tokens, the reward a sequence
classifier with random weights that reads the policy's tokens. None of this changes how long a pass takes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from apa_cli.datasets.base import PromptForm
from apa_cli.errors import ConfigError, UserError
from apa_cli.models.flops import cached_numbers
from apa_cli.models.frozen_copy import frozen_copy
from apa_cli.models.loading import TORCH_DTYPES, architecture_config, parameter_count
from apa_cli.models.prompting import PromptFormat
from apa_cli.models.reward_model import score_texts
from apa_cli.randomness import Stream, generator, torch_seed
from apa_cli.rewards.base import Score, checked
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.tracking import make_tracker
from apa_cli.settings import Config
from apa_cli.training.build import build_evaluator, check_lengths, halvings, placement, training_model
from apa_cli.training.dry_run import bytes_words, model_bytes, sizes
from apa_cli.training.mfu import UpdateMeter, run_matrix_rate
from apa_cli.training.trainer import Trainer
from apa_cli.training.updater import Updater, build_optimizer
from apa_cli.types import Example

POLICY_NUMBER, REWARD_NUMBER, PROMPTS_NUMBER = 2000, 2001, 2002
"""What keys the random weights of policy and reward model, and the prompts."""
PADDING = 0
"""The token that pads."""


# --- memory -------------------------------------------------------------------------------------------------


def reward_architecture(config: Config, architecture: PretrainedConfig) -> PretrainedConfig:
    """Of a classifier with one output: the policy's dimensions, or those of `bench.reward_architecture`."""
    given = config.bench.reward_architecture
    found = architecture_config(given, architecture.vocab_size) if given else copy.deepcopy(architecture)
    found.num_labels, found.pad_token_id = 1, PADDING
    if found.vocab_size < architecture.vocab_size:
        raise ConfigError(
            f"bench.reward_architecture: vocab_size {found.vocab_size} is less than the policy's "
            f"{architecture.vocab_size}"
        )
    return found


def memory_estimate(config: Config, architecture: PretrainedConfig) -> dict[str, float]:
    """Bytes of each model and of the key-value cache. Activations are not counted."""
    itemsize = TORCH_DTYPES[config.model.dtype].itemsize
    found = model_bytes(config, sizes(config, architecture))
    if config.bench.reward:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(reward_architecture(config, architecture))
        found["reward"] = parameter_count(model) * itemsize
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    rows = min(config.sampling.microbatch_size, config.run.rollout_batch_size)
    found["key-value cache"] = rows * longest * cached_numbers(architecture.get_text_config()) * itemsize
    return found


def memory_lines(memory: dict[str, float]) -> list[str]:
    parts = ", ".join(f"{name} {bytes_words(size)}" for name, size in memory.items())
    return [f"memory, activations not counted: {bytes_words(sum(memory.values()))} ({parts})"]


def check_memory(memory: dict[str, float], free: float, device: torch.device) -> None:
    """UserError where the models alone are more than is free."""
    needed = sum(memory.values())
    if needed > free:
        largest = max(memory, key=lambda name: memory[name])
        raise UserError(
            f"memory: {bytes_words(needed)} are needed, most of it by the {largest} ({bytes_words(memory[largest])}), "
            f"and {bytes_words(free)} are free on {device.type}"
        )


# --- what is measured ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """A trainer on random weights and prompts, and the reward model that its score reads."""

    trainer: Trainer
    reward: PreTrainedModel | None
    reward_rows: int
    """Texts per forward pass of the reward model."""


def build_subject(
    config: Config, architecture: PretrainedConfig, directory: RunDirectory, console: Console, device: torch.device
) -> Subject:
    tokenizer = number_tokenizer(architecture.vocab_size)
    form = PromptFormat(tokenizer, PromptForm.hh)
    dtype = TORCH_DTYPES[config.model.dtype]
    seed = torch_seed(config.run.seed, Stream.initialization, POLICY_NUMBER)
    options = {
        "attn_implementation": config.model.attn_implementation,
        "dtype": dtype if config.lora.rank else torch.float32,
    }
    policy = random_model(AutoModelForCausalLM, architecture, seed, device, **options)
    check_lengths(config, policy, tokenizer)
    model, reference = training_model(config, policy)
    model.to(device)
    reward, rows = None, getattr(config.reward, "microbatch_size", config.run.microbatch_size)
    if config.bench.reward:
        seed = torch_seed(config.run.seed, Stream.initialization, REWARD_NUMBER)
        wanted = reward_architecture(config, architecture)
        reward = random_model(AutoModelForSequenceClassification, wanted, seed, device, dtype=dtype)
        reward.requires_grad_(False)
    score = checked(text_score(reward, tokenizer, rows, config))
    ends = frozenset(range(1, 1 + math.ceil(config.bench.end_probability * (architecture.vocab_size - 1))))
    microbatch, sampling_batch = halvings(config, console, fixed=False)
    updater = Updater(
        config.algo, model, build_optimizer(model, config.optimizer), config.run, config.optimizer,
        config.model.dtype, device, microbatch,
    )  # fmt: skip
    no_rewards = replace(config, evaluation=replace(config.evaluation, rewards=[]))
    trainer = Trainer(
        config=config,
        directory=directory,
        console=console,
        tracker=make_tracker("none", "", "auto", directory.path, "", None, {}, None, console.say),
        tokenizer=tokenizer,
        format=form,
        end_tokens=ends,
        examples=random_examples(config, architecture.vocab_size),
        score=score,
        model=model,
        reference=reference,
        updater=updater,
        evaluator=build_evaluator(
            no_rewards, [], form, reference, ends, score, placement(config, device), microbatch, sampling_batch
        ),
        device=device,
        sampler=policy,
        sampling_batch=sampling_batch,
        update_meter=UpdateMeter.of(model, config, run_matrix_rate(device, config.model.dtype)),
        moving_reference=frozen_copy(policy, dtype) if config.reference.refresh_every else None,
    )
    trainer.progress.algorithm = config.algo.initial_state()
    return Subject(trainer, reward, rows)


def random_model(kind: Any, architecture: PretrainedConfig, seed: int, device: torch.device, **options: Any) -> Any:
    """A model with random weights, made where it is needed, without dropout."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return kind.from_config(architecture, **options).eval()


def number_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """Its tokens are the numbers from 1 to `vocabulary` − 1, written with spaces between them, and 0, which pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    padding = "<padding>"  # no number: special tokens are found inside of words too
    words = {padding: PADDING, **{str(number): number for number in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=padding))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, eos_token=padding, padding_side="right"
    )


def prompt_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """`count` lengths in tokens, spread evenly from shortest to longest."""
    step = (longest - shortest) / max(count - 1, 1)
    return [shortest + round(number * step) for number in range(count)]


def random_examples(config: Config, vocabulary: int) -> list[Example]:
    """The prompts of one iteration, random numbers; every iteration takes all of them."""
    count, longest = config.run.rollout_batch_size // config.run.samples_per_prompt, config.sampling.max_prompt_tokens
    rng = generator(config.run.seed, Stream.initialization, PROMPTS_NUMBER)
    rows = [
        rng.integers(1, vocabulary, length)
        for length in prompt_lengths(count, min(config.bench.shortest_prompt, longest), longest)
    ]
    return [Example(" ".join(map(str, row)), None, None, {}) for row in rows]


def text_score(model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, rows: int, config: Config) -> Score:
    """The classifier's output; without one, scores that cost nothing."""
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens

    def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
        if model is None:
            return [float(number % 2) for number in range(len(responses))]
        return score_texts(model, tokenizer, list(zip(prompts, responses, strict=True)), rows, longest, model.device)

    return score
