"""Models of a run: the policy with its LoRA adapter, the critics, the references, and the copy that samples."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.algorithms.base import Algorithm, ScoreScaling
from apa_cli.errors import ConfigError
from apa_cli.models.adjusted_decoding import adjust_decoding
from apa_cli.models.critic import CriticModule, CriticStart, build_critic
from apa_cli.models.forward import TrainingModel, enable_activation_checkpointing
from apa_cli.models.loading import TORCH_DTYPES, load_policy, load_tokenizer
from apa_cli.models.lora import POLICY_ADAPTER, AdapterDisabledModel, add_adapter
from apa_cli.models.reward_model import find_output_index, load_reward_model, read_score_mean
from apa_cli.models.sharding import copy_gathered_weights
from apa_cli.models.structure import freeze_all_but_top, get_context_length, get_trunk, make_frozen_copy, move_to_device
from apa_cli.randomness import Stream, derive_torch_seed
from apa_cli.rewards.model import ModelReward
from apa_cli.rollout.response_text import check_stop_strings
from apa_cli.rollout.samplers import DataSampler, ModelSampler, PolicySampler, Sampler
from apa_cli.rollout.sampling_probe import check_sampling
from apa_cli.settings import Config, CriticInit, CriticKind, Quantization
from apa_cli.types import DATA, GUIDE, INIT, POLICY, REFERENCE

ADAPTER_KEY = 1000
"""Key of the random numbers that initialize the policy's adapter; the critics' keys count from 0."""


@dataclass
class RunModels:
    """Models of a run on one rank."""

    model: TrainingModel
    """Policy and critics."""
    trained: nn.Module
    """Module that the update runs: `model`, or its wrapper that averages gradients over the ranks."""
    sampler: PreTrainedModel
    """Model that samples: the policy, or with FSDP a whole copy of it, which is refreshed after every update."""
    reference: PreTrainedModel | AdapterDisabledModel
    """π_init, frozen."""
    moving_reference: PreTrainedModel | None
    """The loss's reference if it is refreshed; kl/sequence and kl/token_k3 are still against `reference`."""
    guide: PreTrainedModel | None = None
    """The guide of `guide.path`, frozen; None if no guide is needed or if it is π_init."""

    @property
    def policy(self) -> PreTrainedModel:
        """The policy under training, sharded with FSDP."""
        return self.model.policy

    @property
    def critics(self) -> nn.ModuleDict:
        """The critics by name."""
        return self.model.critics

    def refresh_sampler(self) -> None:
        """Copy the policy into the sampler if the sampler is a copy."""
        if self.sampler is not self.policy:
            copy_gathered_weights(self.sampler, self.policy)

    def refresh_moving_reference(self) -> None:
        """Copy the policy into the moving reference, if there is one."""
        if self.moving_reference is not None:
            copy_gathered_weights(self.moving_reference, self.policy)

    def borrow_reference_sampler(self) -> PreTrainedModel | AdapterDisabledModel:
        """Return the reference as a model that can sample; `refresh_sampler` must follow.

        A sharded reference is gathered into the sampler, because responses end at different steps on each rank, while
        all ranks must run a sharded model equally often.
        """
        reference: Any = self.reference
        if not hasattr(reference, "unshard"):
            return reference
        reference.reshard()
        copy_gathered_weights(self.sampler, reference)
        return self.sampler

    def gather_policy(self) -> PreTrainedModel:
        """Return the whole policy in full precision; every rank must call this, after the last sampling.

        With FSDP its weights are gathered into the sampler.
        """
        if self.sampler is not self.policy:
            copy_gathered_weights(self.sampler.float(), self.policy)
        return self.sampler


def build_samplers(config: Config, models: RunModels, tokenizer: PreTrainedTokenizerBase) -> dict[str, Sampler]:
    """Return the samplers that algorithm and plan need, by name, the policy's among them."""
    dtype = config.model.dtype
    reference = get_reference_for_sampling(models)
    guide = {name: getattr(config.guide, name) for name in ("temperature", "top_k", "top_p")}
    samplers: dict[str, Sampler] = {POLICY: build_policy_sampler(config, models, tokenizer)}
    for name in config.needs.samplers:
        if name == DATA:
            samplers[name] = DataSampler()
        elif name == GUIDE and models.guide is not None:
            samplers[name] = ModelSampler(models.guide, tokenizer, config.guide.dtype, guide)
        elif name == REFERENCE and models.moving_reference is not None:
            samplers[name] = ModelSampler(models.moving_reference, tokenizer, dtype)
        elif name in (INIT, REFERENCE, GUIDE):
            samplers[name] = ModelSampler(reference, tokenizer, dtype, guide if name == GUIDE else {})
        elif name != POLICY:
            raise ConfigError(f"plan: there is no sampler {name!r}; there are policy, init, reference, guide and data")
    return samplers


def get_reference_for_sampling(models: RunModels) -> PreTrainedModel:
    """Return π_init as a model that can sample; the policy must not have been trained yet.

    A sharded one cannot, because responses end at different steps on each rank: then it is a copy of the policy's copy.
    """
    reference: Any = models.reference
    return make_frozen_copy(models.sampler, models.sampler.dtype) if hasattr(reference, "unshard") else reference


def build_policy_sampler(config: Config, models: RunModels, tokenizer: PreTrainedTokenizerBase) -> PolicySampler:
    """Return the sampler of the policy, which decodes with the critics if the algorithm overrides `adjust_logits`."""
    sampler = PolicySampler(models.sampler, tokenizer, config.model.dtype)
    if type(config.algo).adjust_logits is not Algorithm.adjust_logits:
        if models.sampler is not models.policy:
            raise ConfigError("launch.strategy: fsdp cannot decode with critics; give launch.strategy=ddp")
        sampler.decoding = partial(adjust_decoding, models.model, config.algo.adjust_logits)
    return sampler


def load_guide(config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel | None:
    """Load the guide of `guide.path`, frozen, if algorithm or plan need one; None if it is the run's SFT model.

    Its architecture is free. Raise ConfigError if its vocabulary is not the policy's.
    """
    needs, path = config.needs, config.guide.path
    is_needed = GUIDE in needs.samplers or any(GUIDE in passes for passes in needs.passes.values())
    if not is_needed or path is None:
        return None
    settings = replace(
        config.model, path=path, tokenizer=None, dtype=config.guide.dtype, quantization=Quantization.none,
        trust_remote_code=config.guide.trust_remote_code,
    )  # fmt: skip
    if load_tokenizer(settings, path, "guide.path").get_vocab() != tokenizer.get_vocab():
        raise ConfigError(f"guide.path: the vocabulary of {path} is not the policy's")
    guide = load_policy(settings, path, frozen_base=True, key="guide.path").requires_grad_(False)
    check_positions(config, guide, "guide.path")
    move_to_device(guide, policy.device)
    check_sampling(guide, config.guide.dtype, "guide.path")
    return guide


def build_training_model(
    config: Config, policy: PreTrainedModel
) -> tuple[TrainingModel, PreTrainedModel | AdapterDisabledModel]:
    """Return policy and critics with `requires_grad` on the trained weights, and the reference.

    The reference is a frozen copy in the compute dtype, or with LoRA the policy's own base.
    """
    # Critics with a network of their own copy the trunk before the adapter is added to it.
    critics = build_critics(config, policy) if config.critic.kind is CriticKind.separate else {}
    reference: Any
    if config.lora.rank:
        add_adapter(
            policy, config.lora, POLICY_ADAPTER, derive_torch_seed(config.run.seed, Stream.initialization, ADAPTER_KEY)
        )
        reference = AdapterDisabledModel(policy)
    else:
        reference = make_frozen_copy(policy, TORCH_DTYPES[config.model.dtype])
        if reference.dtype is not policy.dtype:
            check_sampling(reference, config.model.dtype, "model.dtype")
        if config.model.trainable_layers is not None:
            freeze_all_but_top(policy, config.model.trainable_layers)
    critics = critics or build_critics(config, policy)
    if config.model.gradient_checkpointing:
        for part in (policy, *(critic.backbone for critic in critics.values() if critic.backbone is not None)):
            enable_activation_checkpointing(part)
    return TrainingModel(policy, critics, config.sampling.temperature, config.needs.critics), reference


def build_critics(config: Config, policy: PreTrainedModel) -> dict[str, CriticModule]:
    """Return the critics that algorithm and plan need, by name."""
    specs = config.needs.critics
    has_own_network = any(spec.on == "configured" for spec in specs)
    start = load_reward_start(config, policy) if has_own_network and config.critic.init is CriticInit.reward else None
    return {
        spec.name: build_critic(
            policy,
            spec,
            config.critic,
            config.lora,
            derive_torch_seed(config.run.seed, Stream.initialization, number),
            start,
        )
        for number, spec in enumerate(specs)
    }


def load_reward_start(config: Config, policy: PreTrainedModel) -> CriticStart:
    """Load the reward model's trunk and, in units of the algorithm's scores, its score head, for critic.init=reward.

    Raise ConfigError if the reward is not a model, or if the trunk or its tokenizer differs from the policy's.
    """
    reward = config.reward
    if config.critic.kind is not CriticKind.separate or not isinstance(reward, ModelReward) or reward.path is None:
        raise ConfigError("critic.init: reward needs critic=separate and a reward that is a model; give policy instead")
    model, tokenizer = load_reward_model(reward.path, "float32")
    for name in ("model_type", "vocab_size", "hidden_size"):
        value, expected = getattr(model.config, name), getattr(policy.config, name)
        if value != expected:
            raise ConfigError(f"critic.init: the reward model's {name} is {value}, the policy's {expected}")
    if tokenizer.get_vocab() != load_tokenizer(config.model, config.model.resolved_path).get_vocab():
        raise ConfigError("critic.init: the reward model's tokenizer is not the policy's")
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear):
        return CriticStart(get_trunk(model))
    # Scaled scores have about unit deviation; the stored one is that of the reward model's training pairs.
    is_scaled = getattr(config.algo, "score_scaling", ScoreScaling.none) is not ScoreScaling.none
    factor = reward.scale / (abs(reward.scale) * getattr(model.config, "score_std", 1.0)) if is_scaled else reward.scale
    output = find_output_index(model, reward.output, reward.path)
    mean = read_score_mean(model, reward.path) if reward.centered else 0.0
    bias = 0.0 if head.bias is None else float(head.bias[output])
    return CriticStart(get_trunk(model), factor * head.weight[output], factor * (bias - mean))


def check_training_options(config: Config) -> None:
    """Raise ConfigError for options of lora, critic and quantization that exclude each other."""
    lora = config.lora.rank > 0
    if lora and config.model.trainable_layers is not None:
        raise ConfigError("model.trainable_layers: with lora the base is frozen; leave the key null")
    if config.critic.kind is CriticKind.adapter and not lora:
        raise ConfigError("critic.kind: adapter needs lora; give lora=default")
    if config.model.quantization is not Quantization.none:
        if not lora:
            raise ConfigError("model.quantization: only a frozen base can be quantized; give lora=default")
        if config.reference.refresh_every:
            raise ConfigError(
                "model.quantization: a quantized reference cannot be refreshed; give reference.refresh_every=0"
            )
        if config.critic.kind is CriticKind.separate:
            raise ConfigError("model.quantization: the critic shares the base; give critic=adapter or critic=head")


def check_model_limits(config: Config, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError if prompt and response exceed the model's positions, or the tokenizer its vocabulary.

    The same for a stop string that the tokenizer's texts never contain, and for a model that `check_sampling` refuses.
    """
    check_positions(config, policy, "sampling")
    check_stop_strings(tokenizer, config.sampling.stop_strings)
    embedding = cast(nn.Embedding, policy.get_input_embeddings())
    size, highest = embedding.num_embeddings, max(tokenizer.get_vocab().values())
    if highest >= size:
        raise ConfigError(f"model.tokenizer: the highest token id is {highest}, but the model has {size} embeddings")
    check_sampling(policy, config.model.dtype, "model.path")


def check_positions(config: Config, model: PreTrainedModel, key: str) -> None:
    """Raise ConfigError, beginning with `key`, if prompt and response exceed the model's positions."""
    longest = config.sampling.max_prompt_tokens + config.sampling.max_new_tokens
    positions = get_context_length(model)
    if positions is not None and longest > positions:
        raise ConfigError(
            f"{key}: max_prompt_tokens {config.sampling.max_prompt_tokens} + max_new_tokens "
            f"{config.sampling.max_new_tokens} is more than the model's {positions} positions; lower one of them"
        )
