"""Supervised fine-tuning: cross-entropy on the tokens of the chosen replies, each ended by EOS."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.models.forward import compute_precision
from apa_cli.models.loading import build_policy, load_policy, load_tokenizer, save_model, train_tokenizer
from apa_cli.models.reward_model import padded
from apa_cli.randomness import Stream, torch_seed
from apa_cli.settings import FitSettings, ModelSettings
from apa_cli.stages.fitting import fit
from apa_cli.tensor_ops import masked_mean, masked_sum, token_logprobs
from apa_cli.types import Example, UserError


def target_tokens(
    tokenizer: PreTrainedTokenizerBase, prompt: str, reply: str, longest: int
) -> tuple[list[int], list[bool]]:
    """Tokens of prompt + reply + EOS and which of them are the reply's, EOS included.

    What is too long loses prompt tokens on the left; a reply that is too long by itself is cut and has no EOS.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    both = tokenizer(prompt + reply)["input_ids"]
    joined = both[: len(prompt_ids)] == prompt_ids
    reply_ids = both[len(prompt_ids) :] if joined else tokenizer(reply, add_special_tokens=False)["input_ids"]
    reply_ids = [*reply_ids, tokenizer.eos_token_id][: longest - 1]
    prompt_ids = prompt_ids[-(longest - len(reply_ids)) :]
    return prompt_ids + reply_ids, [False] * len(prompt_ids) + [True] * len(reply_ids)


def reply_logprobs(model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], pad: int) -> tuple[Tensor, Tensor]:
    """log p of each next token [B, S−1] and the mask of those that are a reply's."""
    inputs = padded([ids for ids, _ in rows], pad, model.device)
    targets = padded([[int(flag) for flag in flags] for _, flags in rows], 0, model.device)["input_ids"].bool()
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    return token_logprobs(logits, inputs["input_ids"][:, 1:]), targets[:, 1:]


@torch.no_grad()
def perplexity(model: PreTrainedModel, rows: list[tuple[list[int], list[bool]]], pad: int, batch: int) -> float:
    """exp of the mean negative log-prob of the replies' tokens."""
    total, count = 0.0, 0
    for start in range(0, len(rows), batch):
        logprobs, mask = reply_logprobs(model, rows[start : start + batch], pad)
        total, count = total + float(masked_sum(logprobs, mask)), count + int(mask.sum())
    return math.exp(-total / max(count, 1))


def run_sft(
    model_settings: ModelSettings,
    settings: FitSettings,
    train: list[Example],
    held_out: list[Example],
    seed: int,
    device: torch.device,
    folder: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int, float], None],
) -> dict[str, float]:
    """Fine-tunes `model.path`, or a new model of `model.architecture`, and writes it to `folder`.

    Returns perplexity on the held-out replies before and after.
    """
    train = [example for example in train if example.chosen is not None]
    held_out = [example for example in held_out if example.chosen is not None][: settings.held_out]
    if not train or not held_out:
        raise UserError("sft: the data set has no chosen replies to learn from; give model.path an SFT model instead")
    model, tokenizer = starting_model(model_settings, train, seed)
    model.to(device)
    pad = tokenizer.pad_token_id
    rows, test_rows = (
        [target_tokens(tokenizer, e.prompt, e.chosen, settings.max_tokens) for e in part] for part in (train, held_out)
    )

    def loss(indices: list[int]) -> Tensor:
        with compute_precision(device, model_settings.dtype):
            logprobs, mask = reply_logprobs(model, [rows[i] for i in indices], pad)
        return -masked_mean(logprobs, mask)

    before = perplexity(model, test_rows, pad, settings.batch)
    fit(model, loss, [len(ids) for ids, _ in rows], settings, seed, progress)
    after = perplexity(model, test_rows, pad, settings.batch)
    say(f"SFT on {len(rows)} replies: perplexity on {len(test_rows)} held-out replies {before:.2f} → {after:.2f}")
    result = {"perplexity_before": before, "perplexity_after": after, "replies": len(rows)}
    save_model(model, tokenizer, folder)
    return result


def starting_model(
    settings: ModelSettings, train: list[Example], seed: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model to fine-tune: loaded from `model.path`, or new, with a tokenizer trained on the data."""
    if settings.path is not None:
        return load_policy(settings, settings.path), load_tokenizer(settings, settings.path)
    if settings.tokenizer is not None:
        tokenizer = load_tokenizer(settings, settings.tokenizer)
    elif settings.tokenizer_vocabulary is not None:
        texts = [example.prompt + (reply or "") for example in train for reply in (example.chosen, example.rejected)]
        tokenizer = train_tokenizer(texts, settings.tokenizer_vocabulary)
    else:
        raise UserError("model.tokenizer_vocabulary: a size is needed to train a tokenizer")
    return build_policy(settings, tokenizer, torch_seed(seed, Stream.initialization)), tokenizer
