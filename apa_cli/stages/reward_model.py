"""The reward model: Bradley-Terry on pairs, −log σ(R(x, y⁺) − R(x, y⁻)), measured on held-out pairs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from apa_cli.models.forward import compute_precision
from apa_cli.models.loading import load_tokenizer, save_model
from apa_cli.models.reward_model import build_reward_model, padded, score_texts, text_tokens
from apa_cli.randomness import Stream, torch_seed
from apa_cli.settings import FitSettings, ModelSettings
from apa_cli.stages.fitting import fit
from apa_cli.types import Example, UserError

CALIBRATION_BINS = 10


def preference_report(chosen: list[float], rejected: list[float], lengths: list[int]) -> dict[str, float]:
    """What held-out pairs say of a reward model.

    accuracy: share of pairs with the chosen reply scored higher (a tie counts half), accuracy_ci the half
    width of its 95 % normal interval; margin: mean score difference; calibration_error: |σ(|difference|) −
    share right| averaged over equal-width bins of σ(|difference|) from 0.5 to 1, weighted by their pairs;
    length_correlation: Pearson's r of score and reply length in characters over both replies of every pair
    (`lengths`: all chosen, then all rejected).
    """
    difference = np.array(chosen) - np.array(rejected)
    right = np.where(difference == 0, 0.5, difference > 0)
    accuracy = float(right.mean())
    confidence = 1 / (1 + np.exp(-np.abs(difference)))
    bins = np.minimum(((confidence - 0.5) * 2 * CALIBRATION_BINS).astype(int), CALIBRATION_BINS - 1)
    error = sum(
        abs(confidence[bins == b].mean() - right[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)
    )
    scores = np.array([*chosen, *rejected])
    constant = scores.std() == 0 or np.std(lengths) == 0
    return {
        "accuracy": accuracy,
        "accuracy_ci": 1.96 * math.sqrt(accuracy * (1 - accuracy) / len(right)),
        "margin": float(difference.mean()),
        "calibration_error": float(error),
        "length_correlation": 0.0 if constant else float(np.corrcoef(scores, lengths)[0, 1]),
    }


def run_reward(
    model_settings: ModelSettings,
    policy_path: str,
    settings: FitSettings,
    train: list[Example],
    held_out: list[Example],
    seed: int,
    device: torch.device,
    folder: Path,
    say: Callable[[str], None],
    progress: Callable[[int, int, float], None],
) -> dict[str, float]:
    """Trains a one-output classifier on the trunk of the model in `policy_path` and writes it to `folder`.

    Its config.json holds score_mean and score_std, of all replies of the training pairs.
    """
    train, held_out = (
        [e for e in part if e.chosen is not None and e.rejected is not None] for part in (train, held_out)
    )
    held_out = held_out[: settings.held_out]
    if not train or not held_out:
        raise UserError(
            "reward_model: the data set has no pairs of chosen and rejected replies; give reward.path a model instead"
        )
    tokenizer = load_tokenizer(model_settings, policy_path)
    tokenizer.padding_side = "right"
    model = build_reward_model(policy_path, tokenizer, torch_seed(seed, Stream.initialization, 1)).to(device)
    pairs = [
        tuple(text_tokens(tokenizer, e.prompt, reply, settings.max_tokens) for reply in (e.chosen, e.rejected))
        for e in train
    ]

    def loss(indices: list[int]) -> Tensor:
        rows = [pairs[i][side] for side in (0, 1) for i in indices]
        with compute_precision(device, model_settings.dtype):
            scores = model(**padded(rows, tokenizer.pad_token_id, device)).logits[:, 0].float()
        return -logsigmoid(scores[: len(indices)] - scores[len(indices) :]).mean()

    fit(model, loss, [max(map(len, pair)) for pair in pairs], settings, seed, progress)

    def scores(examples: list[Example]) -> tuple[list[float], list[float]]:
        texts = [
            (e.prompt, reply) for side in ("chosen", "rejected") for e in examples for reply in (getattr(e, side),)
        ]
        values = score_texts(model, tokenizer, texts, settings.batch, settings.max_tokens)
        return values[: len(examples)], values[len(examples) :]

    chosen, rejected = scores(held_out)
    lengths = [len(getattr(e, side)) for side in ("chosen", "rejected") for e in held_out]
    report = preference_report(chosen, rejected, lengths)
    seen = np.concatenate(scores(train))
    facts = {"score_mean": float(seen.mean()), "score_std": float(seen.std())}
    say(
        f"reward model on {len(train)} pairs: accuracy {report['accuracy']:.3f} ± {report['accuracy_ci']:.3f}, margin "
        f"{report['margin']:.2f}, calibration error {report['calibration_error']:.3f}, correlation with length "
        f"{report['length_correlation']:.2f} on {len(held_out)} held-out pairs; scores "
        f"{facts['score_mean']:.2f} ± {facts['score_std']:.2f}"
    )
    save_model(model, tokenizer, folder, **facts)
    return {**report, **facts, "pairs": len(train), "held_out_pairs": len(held_out)}
