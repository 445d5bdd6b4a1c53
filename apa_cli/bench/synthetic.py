"""Trainer on random weights and random prompts, which apa-bench measures, and an estimate of its memory.

The policy has the architecture in conf/model; the reward is a sequence classifier that reads the policy's tokens.
Random weights and tokens take as long as real ones, and nothing is downloaded.
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

from apa_cli.datasets.base import PromptStyle
from apa_cli.errors import ConfigError, UserError
from apa_cli.models.flops import count_kv_cache_numbers
from apa_cli.models.loading import TORCH_DTYPES, build_architecture_config
from apa_cli.models.prompting import PromptFormat
from apa_cli.models.reward_model import score_rows
from apa_cli.models.reward_text import encode_reward_text
from apa_cli.models.structure import count_parameters
from apa_cli.randomness import Stream, derive_torch_seed, make_generator
from apa_cli.rewards.base import ScoreFunction, add_score_check
from apa_cli.runs.console import Console
from apa_cli.runs.directory import RunDirectory
from apa_cli.runs.tracking import Tracker
from apa_cli.settings import Config
from apa_cli.training.build import RunInputs, build_update_meter, construct_trainer, make_placement, prepare_models
from apa_cli.training.dry_run import estimate_model_bytes, format_bytes, measure_model_size
from apa_cli.training.trainer import Trainer
from apa_cli.types import Example

POLICY_KEY, REWARD_KEY, PROMPTS_KEY = 2000, 2001, 2002
"""Keys of the random numbers that make the weights of policy and reward model, and the prompts."""
PADDING = 0
"""Padding token."""


# --- memory -------------------------------------------------------------------------------------------------


def make_reward_architecture(config: Config, architecture: PretrainedConfig) -> PretrainedConfig:
    """Return the architecture of a classifier with one output: the policy's, or `bench.reward_architecture`.

    Raise ConfigError if its vocabulary is smaller than the policy's.
    """
    dimensions = config.bench.reward_architecture
    reward = (
        build_architecture_config(dimensions, architecture.vocab_size) if dimensions else copy.deepcopy(architecture)
    )
    reward.num_labels, reward.pad_token_id = 1, PADDING
    if reward.vocab_size < architecture.vocab_size:
        raise ConfigError(
            f"bench.reward_architecture: vocab_size {reward.vocab_size} is less than the policy's "
            f"{architecture.vocab_size}"
        )
    return reward


def estimate_memory(config: Config, architecture: PretrainedConfig) -> dict[str, float]:
    """Return the bytes of each model and of the KV cache; activations are not counted."""
    itemsize = TORCH_DTYPES[config.model.dtype].itemsize
    memory = estimate_model_bytes(config, measure_model_size(config, architecture))
    if config.bench.reward:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(make_reward_architecture(config, architecture))
        memory["reward"] = count_parameters(model) * itemsize
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    rows = min(config.sampling.microbatch_size, config.run.rollout_batch_size)
    memory["key-value cache"] = rows * longest * count_kv_cache_numbers(architecture.get_text_config()) * itemsize
    return memory


def describe_memory(memory: dict[str, float]) -> str:
    """Return the memory estimate as one line."""
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in memory.items())
    return f"memory, activations not counted: {format_bytes(sum(memory.values()))} ({parts})"


def check_memory(memory: dict[str, float], free: float, device: torch.device) -> None:
    """Raise UserError if the estimated bytes exceed the device's `free` bytes."""
    needed = sum(memory.values())
    if needed > free:
        largest = max(memory, key=lambda name: memory[name])
        raise UserError(
            f"memory: {format_bytes(needed)} are needed, most of it for the {largest} "
            f"({format_bytes(memory[largest])}), but {format_bytes(free)} are free on {device.type}"
        )


# --- the trainer --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """Trainer on random weights and prompts, and the reward model that its score reads."""

    trainer: Trainer
    reward: PreTrainedModel | None
    reward_rows: int
    """Texts per forward pass of the reward model."""


def build_subject(
    config: Config, architecture: PretrainedConfig, directory: RunDirectory, console: Console, device: torch.device
) -> Subject:
    """Construct the trainer to measure, in its state before the first iteration."""
    config = replace(config, evaluation=replace(config.evaluation, rewards=[]))
    tokenizer = build_number_tokenizer(architecture.vocab_size)
    policy = build_random_policy(config, architecture, device)
    models = prepare_models(config, policy, tokenizer, device)
    reward = build_random_reward(config, architecture, device) if config.bench.reward else None
    rows = getattr(config.reward, "microbatch_size", config.run.microbatch_size)
    end_count = math.ceil(config.bench.end_probability * (architecture.vocab_size - 1))
    inputs = RunInputs(
        train=sample_examples(config, architecture.vocab_size),
        held_out=[],
        prompt_format=PromptFormat(tokenizer, PromptStyle.hh),
        end_tokens=frozenset(range(1, 1 + end_count)),
        score=add_score_check(build_score(reward, tokenizer, rows, config)),
        placement=make_placement(config, device),
    )
    update_meter = build_update_meter(config, models, device)
    trainer = construct_trainer(config, inputs, models, update_meter, directory, console, Tracker(), device)
    trainer.progress.algorithm = config.algo.initial_state()
    return Subject(trainer, reward, rows)


def build_random_policy(config: Config, architecture: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """Return a policy with random weights in the precision of apa-train."""
    return build_random_model(
        AutoModelForCausalLM,
        architecture,
        derive_torch_seed(config.run.seed, Stream.initialization, POLICY_KEY),
        device,
        attn_implementation=config.model.attn_implementation,
        dtype=TORCH_DTYPES[config.model.dtype] if config.lora.rank else torch.float32,
    )


def build_random_reward(config: Config, architecture: PretrainedConfig, device: torch.device) -> PreTrainedModel:
    """Return a frozen reward model with random weights in the compute dtype."""
    seed = derive_torch_seed(config.run.seed, Stream.initialization, REWARD_KEY)
    model = build_random_model(
        AutoModelForSequenceClassification,
        make_reward_architecture(config, architecture),
        seed,
        device,
        dtype=TORCH_DTYPES[config.model.dtype],
    )
    return model.requires_grad_(False)


def build_random_model(
    kind: Any, architecture: PretrainedConfig, seed: int, device: torch.device, **options: Any
) -> Any:
    """Return a model with random weights on `device`, without dropout."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        return kind.from_config(architecture, **options).eval()


def build_number_tokenizer(vocabulary: int) -> PreTrainedTokenizerBase:
    """Return a tokenizer of texts of token ids from 1 to `vocabulary` − 1, separated by spaces; token 0 pads."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    padding = "<padding>"  # not a number, because special tokens are matched inside words too
    vocabulary_ids = {padding: PADDING, **{str(number): number for number in range(1, vocabulary)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary_ids, unk_token=padding))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=padding, eos_token=padding, padding_side="right"
    )


def spread_lengths(count: int, shortest: int, longest: int) -> list[int]:
    """Return `count` lengths in tokens, spread evenly from shortest to longest."""
    step = (longest - shortest) / max(count - 1, 1)
    return [shortest + round(number * step) for number in range(count)]


def sample_examples(config: Config, vocabulary: int) -> list[Example]:
    """Return as many random prompts as one iteration takes, so that every iteration has the same prompts."""
    count, longest = config.run.rollout_batch_size // config.run.samples_per_prompt, config.sampling.max_prompt_tokens
    rng = make_generator(config.run.seed, Stream.initialization, PROMPTS_KEY)
    rows = [
        rng.integers(1, vocabulary, length)
        for length in spread_lengths(count, min(config.bench.shortest_prompt, longest), longest)
    ]
    return [Example(" ".join(map(str, row)), None, None, {}) for row in rows]


def build_score(
    model: PreTrainedModel | None, tokenizer: PreTrainedTokenizerBase, rows: int, config: Config
) -> ScoreFunction:
    """Return the score function of the classifier's output; without a classifier, a trivial score function."""
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens

    def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
        if model is None:
            return [float(number % 2) for number in range(len(responses))]
        texts = zip(prompts, responses, strict=True)
        ids = [encode_reward_text(tokenizer, prompt, response, longest) for prompt, response in texts]
        return score_rows(model, model.config, ids, rows, model.device)

    return score
