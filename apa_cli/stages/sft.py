"""Supervised fine-tuning: cross-entropy on the tokens of the chosen replies, each ended by EOS."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.models.forward import checkpoint_activations, compute_precision, recomputing
from apa_cli.models.loading import build_policy, load_policy, load_tokenizer, save_model, train_tokenizer, train_top
from apa_cli.models.lora import POLICY, add_adapter
from apa_cli.models.prompting import PromptFormat
from apa_cli.randomness import Stream, torch_seed
from apa_cli.rollout.engine import left_padded
from apa_cli.settings import Config, ModelSettings
from apa_cli.stages.fitting import Workplace, fit
from apa_cli.tensor_ops import masked_mean, masked_sum, token_logprobs
from apa_cli.types import Example


def reply_logprobs(model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], pad: int) -> tuple[Tensor, Tensor]:
    """log p [B, R] of the last R tokens of each row, R the longest reply's, and the mask of those that are a reply's.

    Rows are padded on the left, so that replies end together and the output head sees little else.
    """
    ids, attention = left_padded([ids for ids, _ in rows], pad, model.device)
    targets, _ = left_padded([[int(flag) for flag in flags] for _, flags in rows], 0, model.device)
    longest = int(targets.sum(1).max())
    output = model(
        input_ids=ids,
        attention_mask=attention,
        position_ids=(attention.cumsum(1) - 1).clamp(min=0),
        use_cache=False,
        logits_to_keep=longest + 1,
    )
    return token_logprobs(output.logits[:, :-1], ids[:, -longest:]), targets[:, -longest:].bool()


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], pad: int, batch: int) -> float:
    """exp of the mean negative log-prob of the replies' tokens."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        logprobs, mask = reply_logprobs(model, rows[start : start + batch], pad)
        total, count = total + float(masked_sum(logprobs, mask)), count + int(mask.sum())
    return math.exp(-total / max(count, 1))


def run_sft(
    config: Config, train: list[Example], held_out: list[Example], seed: int, place: Workplace
) -> dict[str, float]:
    """Fine-tunes `model.path`, or a new model of `model.architecture`, and writes it to `place.folder`.

    Returns perplexity on the held-out replies before and after.
    """
    settings = config.sft
    train = [example for example in train if example.chosen is not None]
    held_out = [example for example in held_out if example.chosen is not None][: settings.held_out]
    if not train or not held_out:
        raise UserError("sft: the data set has no chosen replies to learn from; give model.path an SFT model instead")
    model, tokenizer = starting_model(config.model, train, seed, frozen_base=config.lora.rank > 0)
    trainable(model, config, torch_seed(seed, Stream.initialization, 1))
    model.to(place.device)
    form, pad = PromptFormat(tokenizer, config.dataset.prompt_form), tokenizer.pad_token_id
    rows, test_rows = ([form.target(example, settings.max_tokens) for example in part] for part in (train, held_out))

    def loss(indices: list[int]) -> Tensor:
        with compute_precision(place.device, config.model.dtype), recomputing(model):
            logprobs, mask = reply_logprobs(model, [rows[i] for i in indices], pad)
        return -masked_mean(logprobs, mask)

    def measure() -> dict[str, float]:
        with compute_precision(place.device, config.model.dtype):
            value = perplexity(model, test_rows, pad, settings.batch_size)
        return {"eval/loss": math.log(value), "eval/perplexity": value}

    before = measure()["eval/perplexity"]
    best = fit(model, loss, measure, [len(ids) for ids, _ in rows], settings, seed, place)
    after = best["eval/perplexity"]
    place.say(f"SFT on {len(rows)} replies: perplexity on {len(test_rows)} held-out replies {before:.2f} → {after:.2f}")
    save_model(model, tokenizer, place.folder)
    return {"perplexity_before": before, "perplexity_after": after, "replies": len(rows), "step": best["iteration"]}


def trainable(model: PreTrainedModel, config: Config, seed: int) -> None:
    """Sets which weights of a stage's model are trained, as `lora` and `model` say."""
    if config.lora.rank:
        add_adapter(model, config.lora, POLICY, seed)
    elif config.model.trainable_layers is not None:
        train_top(model, config.model.trainable_layers)
    if config.model.gradient_checkpointing:
        checkpoint_activations(model)


def starting_model(
    settings: ModelSettings, train: list[Example], seed: int, frozen_base: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to fine-tune: loaded from `model.path`, or new, with a tokenizer trained on the data."""
    if settings.path is not None:
        return load_policy(settings, settings.path, frozen_base), load_tokenizer(settings, settings.path)
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings, settings.tokenizer)
    elif settings.tokenizer_vocabulary is not None:
        texts = [example.prompt + (reply or "") for example in train for reply in (example.chosen, example.rejected)]
        tokenizer = train_tokenizer(texts, settings.tokenizer_vocabulary)
    else:
        raise UserError("model.tokenizer_vocabulary: a size is needed to train a tokenizer")
    return build_policy(settings, tokenizer, torch_seed(seed, Stream.initialization)), tokenizer
