"""The reward model: Bradley-Terry on pairs, −log σ(R(x, y⁺) − R(x, y⁻)), evaluated on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.errors import UserError
from apa_cli.models.forward import autocast_to, checkpoint_activations
from apa_cli.models.loading import load_tokenizer, save_model
from apa_cli.models.reward_model import (
    STORED_FORMAT,
    build_reward_model,
    compute_max_text_tokens,
    pad_token_rows,
    score_rows,
)
from apa_cli.models.reward_text import RewardTextEncoder, select_chat_format
from apa_cli.models.structure import move_to_device
from apa_cli.randomness import Stream, derive_torch_seed
from apa_cli.settings import Config, RewardFormat
from apa_cli.stages.fitting import SayFunction, StageContext, fit
from apa_cli.stages.sft import configure_trainable_weights
from apa_cli.tensor_ops import ROUNDING
from apa_cli.types import Example

CALIBRATION_BINS = 10
"""Bins of the expected calibration error."""

TokenPair = tuple[list[int], list[int]]
"""Token ids of a prompt with its chosen reply, and of the same prompt with its rejected reply."""


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, center_coef: float) -> Tensor:
    """Return −log σ(R⁺ − R⁻) + center_coef · (R⁺ + R⁻)², [B], of the scores `chosen` R⁺ and `rejected` R⁻, each [B].

    The second term centers the scores at 0 (2312.09244, equation 2).
    """
    return center_coef * (chosen + rejected).square() - logsigmoid(chosen - rejected)


def compute_preference_metrics(chosen: list[float], rejected: list[float], lengths: list[int]) -> dict[str, float]:
    """Return the metrics of a reward model's scores of N held-out pairs.

    accuracy: share of pairs with the chosen reply scored higher (a tie, up to rounding, counts half);
    accuracy_ci: half width of its normal 95 % interval;
    margin: mean score difference;
    calibration_error: |mean σ(|difference|) − accuracy| in equal-width bins of σ(|difference|) from 0.5 to 1,
    averaged with the bins' numbers of pairs as weights (expected calibration error);
    length_correlation: Pearson's r of score and reply length in characters over both replies of every pair, `lengths`
    being those of all chosen, then of all rejected replies; 0 if either is constant.
    """
    difference = np.array(chosen) - np.array(rejected)
    is_tie = np.abs(difference) <= ROUNDING * np.maximum(np.abs([chosen, rejected]).max(axis=0), 1)
    correct = np.where(is_tie, 0.5, difference > 0)
    accuracy = float(correct.mean())
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    calibration_error = sum(
        abs(confidence[bins == b].mean() - correct[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )
    scores = np.array([*chosen, *rejected])
    is_constant = scores.std() == 0 or np.std(lengths) == 0
    return {
        "accuracy": accuracy,
        "accuracy_ci": 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(correct)),
        "margin": float(difference.mean()),
        "calibration_error": float(calibration_error),
        "length_correlation": 0.0 if is_constant else float(np.corrcoef(scores, lengths)[0, 1]),
    }


def compute_subset_accuracies(examples: list[Example], chosen: list[float], rejected: list[float]) -> dict[str, float]:
    """Return accuracy/NAME and accuracy_ci/NAME for each value NAME of the column `subset`; {} without that column."""
    metrics: dict[str, float] = {}
    for name in sorted({str(e.columns["subset"]) for e in examples if "subset" in e.columns}):
        rows = [i for i, e in enumerate(examples) if str(e.columns.get("subset")) == name]
        subset = compute_preference_metrics([chosen[i] for i in rows], [rejected[i] for i in rows], [0] * 2 * len(rows))
        metrics |= {f"accuracy/{name}": subset["accuracy"], f"accuracy_ci/{name}": subset["accuracy_ci"]}
    return metrics


def train_reward_model(
    config: Config, train: list[Example], held_out: list[Example], seed: int, context: StageContext
) -> dict[str, float]:
    """Train a one-output classifier on the trunk of `model.path` and save it in `context.model_folder`.

    Its config.json gets score_mean and score_std over both replies of the first `scored_pairs` training pairs, and the
    format of its texts. Return the moments, the held-out metrics, the numbers of pairs, and the step of the saved
    weights. Raise UserError if the data set has no pairs.
    """
    settings = config.reward_model
    train, held_out = select_pairs(train), select_pairs(held_out)[: settings.held_out]
    if not train or not held_out:
        raise UserError(
            "reward_model: the data set has no pairs of chosen and rejected responses; set reward.path to a model"
        )
    model, tokenizer = load_trainable_classifier(config, seed, context.device)
    encoder = make_text_encoder(config, model, tokenizer)
    pairs, held_out_pairs = (encode_pairs(encoder, examples, context.say) for examples in (train, held_out))

    def compute_loss(indices: list[int]) -> Tensor:
        rows = [pairs[i][side] for side in (0, 1) for i in indices]
        with autocast_to(context.device, config.model.dtype), checkpoint_activations(model):
            inputs = pad_token_rows(rows, tokenizer.pad_token_id, context.device)
            scores = model(**inputs).logits[:, 0].float()
        return bradley_terry_loss(scores[: len(indices)], scores[len(indices) :], settings.center_coef).mean()

    def score_pairs(pairs: list[TokenPair]) -> tuple[list[float], list[float]]:
        rows = [pair[side] for side in (0, 1) for pair in pairs]
        with autocast_to(context.device, config.model.dtype):
            scores = score_rows(model, model.config, rows, 2 * settings.batch_size, context.device)
        return scores[: len(pairs)], scores[len(pairs) :]

    lengths = [len(getattr(e, side)) for side in ("chosen", "rejected") for e in held_out]

    def measure() -> dict[str, float]:
        chosen, rejected = score_pairs(held_out_pairs)
        losses = bradley_terry_loss(torch.tensor(chosen), torch.tensor(rejected), 0.0)
        metrics = compute_preference_metrics(chosen, rejected, lengths)
        metrics |= compute_subset_accuracies(held_out, chosen, rejected)
        return {"eval/loss": float(losses.mean())} | {f"eval/{name}": value for name, value in metrics.items()}

    best = fit(model, compute_loss, measure, [max(map(len, pair)) for pair in pairs], settings, seed, context)
    metrics = {name.removeprefix("eval/"): value for name, value in best.items() if name.startswith("eval/")}
    train_scores = np.concatenate(score_pairs(pairs[: settings.scored_pairs]))
    moments = {"score_mean": float(train_scores.mean()), "score_std": float(train_scores.std())}
    context.say(format_summary(metrics | moments, len(train), len(held_out)))
    if metrics["accuracy"] - metrics["accuracy_ci"] <= 0.5:
        context.say(
            f"warning: reward_model: the held-out accuracy {metrics['accuracy']:.3f} ± {metrics['accuracy_ci']:.3f} is "
            "not above chance, 0.5, so its scores may mean nothing. Check which response of a pair is the chosen one, "
            "or train on more pairs"
        )
    text_format = RewardFormat.chat if encoder.is_chat else RewardFormat.plain
    save_model(model, tokenizer, context.model_folder, **moments, **{STORED_FORMAT: text_format.value})
    return {**metrics, **moments, "pairs": len(train), "held_out_pairs": len(held_out), "step": best["iteration"]}


def select_pairs(examples: list[Example]) -> list[Example]:
    """Return the examples that have both a chosen and a rejected reply."""
    return [e for e in examples if e.chosen is not None and e.rejected is not None]


def make_text_encoder(config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> RewardTextEncoder:
    """Return the encoder of the model's texts, in training and later as a reward. Raise UserError if none fits."""
    is_chat = select_chat_format(tokenizer, config.reward_model.format, None, "reward_model.format")
    limit = compute_max_text_tokens(model, tokenizer, config.reward_model.max_tokens)
    encoder = RewardTextEncoder(tokenizer, is_chat, limit)
    encoder.check_room("reward_model.max_tokens")
    return encoder


def encode_pairs(encoder: RewardTextEncoder, examples: list[Example], say: SayFunction) -> list[TokenPair]:
    """Return the tokens of both replies of each example after its prompt; report how many texts were cut."""
    rows = [encoder.encode(e.prompt, str(reply), e.messages) for e in examples for reply in (e.chosen, e.rejected)]
    if cut := sum(is_cut for _, is_cut in rows):
        say(
            f"reward model: {cut} of {len(rows)} texts are longer than {encoder.max_tokens} tokens and lose the start "
            "of their prompt"
        )
    return [(chosen, rejected) for (chosen, _), (rejected, _) in zip(rows[::2], rows[1::2], strict=True)]


def load_trainable_classifier(
    config: Config, seed: int, device: torch.device
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the trunk of `model.path` with a new, always trained one-output head, and a right-padding tokenizer."""
    tokenizer = load_tokenizer(config.model, config.model.resolved_path)
    tokenizer.padding_side = "right"
    head_seed, has_lora = derive_torch_seed(seed, Stream.initialization, 1), config.lora.rank > 0
    model, new = build_reward_model(config.model, config.model.resolved_path, tokenizer, head_seed, has_lora)
    configure_trainable_weights(model, config, derive_torch_seed(seed, Stream.initialization, 2))
    for parameter in new:
        parameter.requires_grad_(True)
    return move_to_device(model, device), tokenizer


def format_summary(metrics: Mapping[str, float], pairs: int, held_out_pairs: int) -> str:
    """Return the line that reports a trained reward model: its held-out metrics and the moments of its scores."""
    subsets = "".join(
        f", {name.removeprefix('accuracy/')} {value:.3f} ± {metrics[name.replace('accuracy', 'accuracy_ci')]:.3f}"
        for name, value in metrics.items()
        if name.startswith("accuracy/")
    )
    return (
        f"reward model on {pairs} pairs: accuracy {metrics['accuracy']:.3f} ± {metrics['accuracy_ci']:.3f}{subsets}, "
        f"margin {metrics['margin']:.2f}, calibration error {metrics['calibration_error']:.3f}, correlation with "
        f"length {metrics['length_correlation']:.2f} on {held_out_pairs} held-out pairs; scores "
        f"{metrics['score_mean']:.2f} ± {metrics['score_std']:.2f}"
    )
