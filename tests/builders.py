"""Builders of small models, tokenizers, token sequences, rollouts, batches, settings and algorithms for the tests.

Each call returns a new object; fields that are not given have neutral values. Builders that only one test file needs
are in that file, fixtures in the conftest.py files.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from apa_cli.algorithms.apa import APA, Normalizer
from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import ActorCritic, AdvantageEstimator, ScoreScaling, Whitening
from apa_cli.algorithms.ppo import PPO, KLController
from apa_cli.datasets.embedded import EmbeddedDataset
from apa_cli.models.critic import CriticModule, CriticStart, build_critic
from apa_cli.models.forward import PaddedInputs, build_padded_inputs
from apa_cli.models.loading import build_policy, save_model, train_tokenizer
from apa_cli.models.lora import POLICY_ADAPTER, add_adapter
from apa_cli.settings import (
    CriticInit,
    CriticKind,
    CriticSettings,
    DType,
    HeadKind,
    LoraSettings,
    ModelSettings,
    Quantization,
    SamplingSettings,
)
from apa_cli.stages.fitting import StageContext
from apa_cli.types import Batch, Critic, Rollout, Sequences

# Models

TINY = {
    "vocab_size": 11, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
LLAMA_LIKE = {"intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_OF_KIND = {
    "gpt_neox": {"intermediate_size": 32},
    "gptj": {"rotary_dim": 4},
    **dict.fromkeys(("llama", "qwen2", "mistral", "mixtral"), LLAMA_LIKE),
}
"""model_type → the dimensions that TINY does not have, or that differ from it."""


def make_tiny_config(kind: str = "gpt_neox", **changes: Any) -> PreTrainedConfig:
    """Return the configuration of a language model of one layer; `kind` is its model_type.

    The vocabulary is that of `build_word_tokenizer`. Initial weights are ten times the usual (0.2, not 0.02), so that
    models of different seeds differ clearly and every input token matters.
    """
    return AutoConfig.for_model(kind, **{**TINY, **TINY_OF_KIND.get(kind, {}), **changes})


def build_random_policy(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """Return a language model with random weights; the configuration is copied, since `from_config` changes it."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()


def build_tiny_policy(kind: str = "gpt_neox", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Return a language model of one layer with random weights; `changes` are those of `make_tiny_config`."""
    return build_random_policy(make_tiny_config(kind, **changes), seed)


def make_lora_settings(rank: int = 2, alpha: float = 4.0, target_modules: list[str] | None = None) -> LoraSettings:
    """Return the settings of adapters, by default on the layers that peft chooses."""
    return LoraSettings(rank, alpha, target_modules)


def add_random_adapter(model: PreTrainedModel, settings: LoraSettings) -> None:
    """Add the policy's adapter with random weights, so that, unlike a new adapter, it changes the outputs."""
    add_adapter(model, settings, POLICY_ADAPTER, 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)


def build_value_critic(
    policy: PreTrainedModel,
    kind: CriticKind = CriticKind.separate,
    head: HeadKind = HeadKind.linear,
    seed: int = 0,
    start: CriticStart | None = None,
    lora: LoraSettings | None = None,
) -> CriticModule:
    """Return a new critic `value`, which starts from `start`, by default the policy; it has no adapters by default."""
    settings = CriticSettings(kind=kind, init=CriticInit.policy, head=head)
    return build_critic(policy, Critic("value"), settings, lora or make_lora_settings(rank=0), seed, start)


def save_dialogue_model(folder: Path) -> None:
    """Save a two-layer GPT-NeoX with random float32 weights and a tokenizer trained on embedded dialogues.

    The model ends a reply by EOS at about every twelfth token: its last layer norm adds 0.1 to every feature, so
    that a row of ones · 1.2 in the output matrix gives EOS a constant logit of 0.1 · 1.2 · 32 = 3.84.
    """
    rows = EmbeddedDataset(300, 1, 0, []).load("train")
    tokenizer = train_tokenizer([row.prompt + row.chosen for row in rows], 600)
    architecture = {
        "model_type": "gpt_neox", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 128, "initializer_range": 0.1,
    }  # fmt: skip
    settings = ModelSettings(
        None, DType.float32, "sdpa", False, None, 600, None, False, Quantization.none, architecture
    )
    model = build_policy(settings, tokenizer, seed=3)
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.bias.fill_(0.1)
        model.get_output_embeddings().weight[tokenizer.eos_token_id] = 1.2
    save_model(model, tokenizer, folder)


def save_classifier(folder: Path, base: Path, seed: int = 0, **changes: Any) -> None:
    """Save a classifier on the trunk of the model in `base`, with its tokenizer and a random head of two outputs.

    `changes` are fields of its configuration.
    """
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, **{"num_labels": 2, **changes})
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)


# Tokens

PAD, EOS = 0, 10
"""Token ids of `build_word_tokenizer`."""


def build_word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of eleven words separated by spaces: <pad> (0), b to j, <eos> (10)."""
    words = ["<pad>", *"bcdefghij", "<eos>"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def make_mask(lengths: list[int], width: int | None = None) -> Tensor:
    """Return a mask [N, width], true on the first `lengths[i]` tokens of row i; the default width is the longest."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths).unsqueeze(1)


def make_sequences(
    prompts: list[list[int]], responses: list[list[int]], left: int = 0, right: int = 0, junk: int = PAD
) -> Sequences:
    """Return token ids padded with `junk`, prompts on the left and responses on the right.

    `left` and `right` are the numbers of further columns of padding.
    """
    before, after = max(map(len, prompts)) + left, max(map(len, responses)) + right
    mask = make_mask(list(map(len, responses)), after)
    return Sequences(
        prompt_ids=torch.tensor([[junk] * (before - len(p)) + p for p in prompts]),
        prompt_mask=make_mask(list(map(len, prompts)), before).flip(1),
        response_ids=torch.tensor([r + [junk] * (after - len(r)) for r in responses]),
        mask=mask,
        on_policy=mask,
    )


def make_padded_inputs(tokens: Sequences) -> PaddedInputs:
    """Return the inputs of a forward pass over these tokens."""
    return build_padded_inputs(tokens.prompt_ids, tokens.prompt_mask, tokens.response_ids, tokens.mask)


def make_rollout(mask: Tensor, **fields: Any) -> Rollout:
    """Return a rollout of responses with this mask [N, T], each to a prompt of one token; scores etc. by `fields`.

    By default tokens and the sampler's log-probs are 0, texts empty, and the policy sampled every token. `logprobs`
    adds to or replaces the sampler's.
    """
    n = len(mask)
    neutral = {
        "prompt_ids": torch.zeros(n, 1, dtype=torch.int64),
        "prompt_mask": torch.ones(n, 1, dtype=torch.bool),
        "response_ids": torch.zeros(mask.shape, dtype=torch.int64),
        "on_policy": mask,
        "prompts": [""] * n,
        "responses": [""] * n,
        "endings": ["eos"] * n,
        "groups": torch.arange(n),
        "columns": [{} for _ in range(n)],
        "example_index": torch.arange(n),
        "plan_index": torch.zeros(n, dtype=torch.int64),
        "masks": {"policy": mask},
    }
    logprobs = {"sampler": torch.zeros(mask.shape), **fields.pop("logprobs", {})}
    return Rollout(mask=mask, logprobs=logprobs, **{**neutral, **fields})


def make_batch(tokens: Sequences, **fields: Any) -> Batch:
    """Return a batch of these tokens with the masks "policy" and "critic/value", equal to the tokens' mask.

    Log-probs of the sampler, advantages, values and returns are 0; `logprobs` adds to or replaces the sampler's.
    """
    zeros = torch.zeros(tokens.mask.shape)
    neutral = {
        "masks": {"policy": tokens.mask, "critic/value": tokens.mask},
        "advantages": zeros,
        "returns": {"value": zeros},
        "values": {"value": zeros},
    }
    logprobs = {"sampler": zeros, **fields.pop("logprobs", {})}
    return Batch(**{**vars(tokens), **neutral, "logprobs": logprobs, **fields})


# Settings and algorithms


def make_sampling_settings(**changes: Any) -> SamplingSettings:
    """Return settings that sample from the whole distribution at temperature 1, up to 12 tokens."""
    neutral = {
        "max_prompt_tokens": 8, "max_new_tokens": 12, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "stop_strings": [], "microbatch_size": 64, "cuda_graph": True,
    }  # fmt: skip
    return SamplingSettings(**{**neutral, **changes})


NEUTRAL_ALGORITHM = {
    "score_scaling": ScoreScaling.none, "score_clip": None, "gamma": 1.0, "gae_lambda": 1.0,
    "whitening": Whitening.none, "advantage_estimator": AdvantageEstimator.gae, "value_coef": 1.0,
    "value_clip_range": None,
}  # fmt: skip
NEUTRAL_OF_ALGORITHM = {
    APA: {"lambda_": 0.5, "normalizer": Normalizer.none},
    AWR: {"lambda_": 0.5, "weight_clip": 20.0},
    PPO: {
        "kl_coef": 0.1, "clip_range": 0.2, "kl_controller": KLController.fixed, "kl_target": 6.0,
        "kl_horizon": 10_000, "entropy_coef": 0.0,
    },
}  # fmt: skip


def make_algorithm(kind: type[ActorCritic], **fields: Any) -> ActorCritic:
    """Return APA, AWR or PPO with λ = 0.5, or a KL coefficient of 0.1.

    Unless `fields` say otherwise, scores are not scaled, advantages are returns minus values (γ = gae_lambda = 1) and
    not whitened, and the critic's loss is not clipped.
    """
    return kind(**{**NEUTRAL_ALGORITHM, **NEUTRAL_OF_ALGORITHM[kind], **fields})


def make_stage_context(model_folder: Path | None = None, **options: Any) -> StageContext:
    """Return the context of a stage on the CPU that reports nothing; `model_folder` is None if no model is saved."""
    return StageContext(torch.device("cpu"), model_folder, lambda text: None, lambda *progress: None, **options)
