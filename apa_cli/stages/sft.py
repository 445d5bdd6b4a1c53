"""Supervised fine-tuning (SFT): cross-entropy on the tokens of the chosen replies, each with its end token."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.models.forward import autocast_to, checkpoint_activations, enable_activation_checkpointing
from apa_cli.models.loading import build_policy, load_policy, load_tokenizer, save_model, train_tokenizer
from apa_cli.models.lora import POLICY_ADAPTER, add_adapter
from apa_cli.models.prompting import PromptFormat, Target
from apa_cli.models.structure import freeze_all_but_top, get_context_length, move_to_device
from apa_cli.models.tokenization import show_tokens
from apa_cli.randomness import Stream, derive_torch_seed
from apa_cli.rollout.engine import pad_left
from apa_cli.rollout.sampling_probe import check_sampling
from apa_cli.runs.formatting import quote_text
from apa_cli.settings import Config, ModelSettings
from apa_cli.stages.fitting import SayFunction, StageContext, fit
from apa_cli.tensor_ops import masked_mean, masked_sum, token_logprobs
from apa_cli.types import Example

TokenRow = tuple[list[int], list[bool]]
"""Token ids of a prompt and its reply, and a flag for each token: True if it is the reply's."""


def compute_reply_logprobs(model: PreTrainedModel, rows: list[TokenRow], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return log p [B, R] of the last R tokens of each row, and their mask [B, R], true on the reply's tokens.

    R is the length of the longest reply. Rows are padded on the left, so that all replies end in the last column and
    the output head computes only R + 1 positions.
    """
    ids, attention = pad_left([ids for ids, _ in rows], pad_id, model.device)
    flags, _ = pad_left([[int(flag) for flag in flags] for _, flags in rows], 0, model.device)
    longest = int(flags.sum(1).max())
    output = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=longest + 1,
    )
    return token_logprobs(output.logits[:, :-1], ids[:, -longest:]), flags[:, -longest:].bool()


@torch.no_grad()
def compute_perplexity(model: PreTrainedModel, rows: list[TokenRow], pad_id: int, batch_size: int) -> float:
    """Return exp(−mean log p) over the replies' tokens."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch_size):
        logprobs, mask = compute_reply_logprobs(model, rows[start : start + batch_size], pad_id)
        total, count = total + float(masked_sum(logprobs, mask)), count + int(mask.sum())
    return math.exp(-total / max(count, 1))


def train_sft_model(
    config: Config, train: list[Example], held_out: list[Example], seed: int, context: StageContext
) -> dict[str, float]:
    """Fine-tune `model.path`, or a new model of `model.architecture`, and save it in `context.model_folder`.

    Return the perplexity on the held-out replies before and after, the number of replies, and the step of the saved
    weights. Raise UserError if the data set has no chosen replies.
    """
    settings = config.sft
    train = select_replies(train, "train", context.say)
    held_out = select_replies(held_out, "held-out", context.say)[: settings.held_out]
    if not train or not held_out:
        raise UserError("sft: the data set has no chosen responses to train on; set model.path to an SFT model")
    model, tokenizer = load_or_build_model(config.model, train, seed, frozen_base=config.lora.rank > 0)
    configure_trainable_weights(model, config, derive_torch_seed(seed, Stream.initialization, 1))
    move_to_device(model, context.device)
    check_sampling(model, config.model.dtype, "model.path")
    prompt_format, pad_id = PromptFormat(tokenizer, config.dataset.prompt_style), tokenizer.pad_token_id
    max_tokens = min(settings.max_tokens, get_context_length(model) or settings.max_tokens)
    targets = encode_targets(prompt_format, train, max_tokens, "train", context.say)
    context.say(describe_target(tokenizer, targets[0]))
    held_out_targets = encode_targets(prompt_format, held_out, max_tokens, "held-out", context.say)
    rows, held_out_rows = ([target.row for target in part] for part in (targets, held_out_targets))

    def compute_loss(indices: list[int]) -> Tensor:
        with autocast_to(context.device, config.model.dtype), checkpoint_activations(model):
            logprobs, mask = compute_reply_logprobs(model, [rows[i] for i in indices], pad_id)
        return -masked_mean(logprobs, mask)

    def measure() -> dict[str, float]:
        with autocast_to(context.device, config.model.dtype):
            perplexity = compute_perplexity(model, held_out_rows, pad_id, settings.batch_size)
        return {"eval/loss": math.log(perplexity), "eval/perplexity": perplexity}

    before = measure()["eval/perplexity"]
    best = fit(model, compute_loss, measure, [len(ids) for ids, _ in rows], settings, seed, context)
    after = best["eval/perplexity"]
    context.say(
        f"SFT on {len(rows)} responses: perplexity on {len(held_out_rows)} held-out responses {before:.2f} → "
        f"{after:.2f}"
    )
    save_model(model, tokenizer, context.model_folder)
    return {"perplexity_before": before, "perplexity_after": after, "replies": len(rows), "step": best["iteration"]}


def select_replies(examples: list[Example], split: str, say: SayFunction) -> list[Example]:
    """Return the examples with a chosen reply that is not empty; report how many are left out, if any are kept."""
    kept = [example for example in examples if example.chosen is not None and example.chosen.strip()]
    if 0 < len(kept) < len(examples):
        say(f"sft: {len(examples) - len(kept)} of {len(examples)} {split} rows have no chosen reply and are left out")
    return kept


def encode_targets(
    prompt_format: PromptFormat, examples: list[Example], max_tokens: int, split: str, say: SayFunction
) -> list[Target]:
    """Return the tokens of each example's prompt and reply, in at most `max_tokens`; report how many are cut."""
    targets = [prompt_format.encode_target(example, max_tokens) for example in examples]
    prompts, replies = (sum(getattr(target, name) for target in targets) for name in ("is_prompt_cut", "is_reply_cut"))
    if prompts or replies:
        say(
            f"sft: of {len(targets)} {split} rows, {prompts} lose text of their prompt and {replies} the end of their "
            f"reply, because sft.max_tokens and the model's context allow {max_tokens} tokens"
        )
    return targets


def describe_target(tokenizer: PreTrainedTokenizerBase, target: Target) -> str:
    """Return one line with a row as the model reads it, special tokens visible."""
    prompt, reply = (show_tokens(tokenizer, ids) for ids in (target.prompt_ids, target.reply_ids))
    return (
        f"sft: first row, {len(target.prompt_ids)} + {len(target.reply_ids)} tokens: {quote_text(prompt)} → "
        f"{quote_text(reply)}"
    )


def configure_trainable_weights(model: PreTrainedModel, config: Config, seed: int) -> None:
    """Add the LoRA adapter or freeze layers, and enable activation checkpointing, as `config` says."""
    if config.lora.rank:
        add_adapter(model, config.lora, POLICY_ADAPTER, seed)
    elif config.model.trainable_layers is not None:
        freeze_all_but_top(model, config.model.trainable_layers)
    if config.model.gradient_checkpointing:
        enable_activation_checkpointing(model)


def load_or_build_model(
    settings: ModelSettings, train: list[Example], seed: int, frozen_base: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the model in `model.path`, or build a new one with the given tokenizer or one trained on `train`.

    With `frozen_base` (for LoRA) a loaded model is in the compute dtype.
    """
    if settings.path is not None:
        return load_policy(settings, settings.path, frozen_base), load_tokenizer(settings, settings.path)
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings, settings.tokenizer)
    elif settings.tokenizer_vocabulary is not None:
        texts = [example.prompt + (reply or "") for example in train for reply in (example.chosen, example.rejected)]
        tokenizer = train_tokenizer(texts, settings.tokenizer_vocabulary)
    else:
        raise UserError("model.tokenizer_vocabulary: a size is needed to train a tokenizer; or give model.tokenizer")
    return build_policy(settings, tokenizer, derive_torch_seed(seed, Stream.initialization)), tokenizer
