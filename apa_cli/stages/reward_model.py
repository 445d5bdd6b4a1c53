"""The reward model: Bradley-Terry on pairs, −log σ(R(x, y⁺) − R(x, y⁻)), measured on held-out pairs."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from apa_cli.errors import UserError
from apa_cli.models.forward import compute_precision, recomputing
from apa_cli.models.loading import load_tokenizer, save_model
from apa_cli.models.reward_model import build_reward_model, padded, score_texts, text_tokens
from apa_cli.randomness import Stream, torch_seed
from apa_cli.settings import Config
from apa_cli.stages.fitting import Workplace, fit
from apa_cli.stages.sft import trainable
from apa_cli.types import Example

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


def subset_accuracies(examples: list[Example], chosen: list[float], rejected: list[float]) -> dict[str, float]:
    """accuracy/NAME and accuracy_ci/NAME for each value of the column `subset`, where the data set has one."""
    report = {}
    for name in sorted({str(e.columns["subset"]) for e in examples if "subset" in e.columns}):
        rows = [i for i, e in enumerate(examples) if str(e.columns.get("subset")) == name]
        part = preference_report([chosen[i] for i in rows], [rejected[i] for i in rows], [0] * 2 * len(rows))
        report |= {f"accuracy/{name}": part["accuracy"], f"accuracy_ci/{name}": part["accuracy_ci"]}
    return report


def pair_loss(chosen: Tensor, rejected: Tensor, center_coef: float) -> Tensor:
    """Bradley-Terry loss [B] of scores [B] and [B]: −log σ(R⁺ − R⁻) + center_coef · (R⁺ + R⁻)² (2312.09244, eq. 2)."""
    return center_coef * (chosen + rejected).square() - logsigmoid(chosen - rejected)


def run_reward(
    config: Config, train: list[Example], held_out: list[Example], seed: int, place: Workplace
) -> dict[str, float]:
    """Trains a one-output classifier on the trunk of the model in `model.path` and writes it to `place.folder`.

    Its config.json holds score_mean and score_std, of both replies of the first `scored_pairs` training pairs.
    """
    settings = config.reward_model
    train, held_out = (
        [e for e in part if e.chosen is not None and e.rejected is not None] for part in (train, held_out)
    )
    held_out = held_out[: settings.held_out]
    if not train or not held_out:
        raise UserError(
            "reward_model: the data set has no pairs of chosen and rejected replies; give reward.path a model instead"
        )
    tokenizer = load_tokenizer(config.model, config.model.path)
    tokenizer.padding_side = "right"
    model = build_reward_model(
        config.model, tokenizer, torch_seed(seed, Stream.initialization, 1), config.lora.rank > 0
    )
    trainable(model, config, torch_seed(seed, Stream.initialization, 2))
    model.score.float().requires_grad_(True)
    model.to(place.device)
    pairs = [
        tuple(text_tokens(tokenizer, e.prompt, reply, settings.max_tokens) for reply in (e.chosen, e.rejected))
        for e in train
    ]

    def loss(indices: list[int]) -> Tensor:
        rows = [pairs[i][side] for side in (0, 1) for i in indices]
        with compute_precision(place.device, config.model.dtype), recomputing(model):
            scores = model(**padded(rows, tokenizer.pad_token_id, place.device)).logits[:, 0].float()
        return pair_loss(scores[: len(indices)], scores[len(indices) :], settings.center_coef).mean()

    def scores(examples: list[Example]) -> tuple[list[float], list[float]]:
        texts = [(e.prompt, getattr(e, side)) for side in ("chosen", "rejected") for e in examples]
        with compute_precision(place.device, config.model.dtype):
            values = score_texts(model, tokenizer, texts, 2 * settings.batch_size, settings.max_tokens, place.device)
        return values[: len(examples)], values[len(examples) :]

    lengths = [len(getattr(e, side)) for side in ("chosen", "rejected") for e in held_out]

    def measure() -> dict[str, float]:
        chosen, rejected = scores(held_out)
        losses = pair_loss(torch.tensor(chosen), torch.tensor(rejected), 0.0)
        report = preference_report(chosen, rejected, lengths) | subset_accuracies(held_out, chosen, rejected)
        return {"eval/loss": float(losses.mean())} | {f"eval/{name}": value for name, value in report.items()}

    best = fit(model, loss, measure, [max(map(len, pair)) for pair in pairs], settings, seed, place)
    report = {name.removeprefix("eval/"): value for name, value in best.items() if name.startswith("eval/")}
    seen = np.concatenate(scores(train[: settings.scored_pairs]))
    facts = {"score_mean": float(seen.mean()), "score_std": float(seen.std())}
    subsets = "".join(
        f", {name.removeprefix('accuracy/')} {value:.3f} ± {report[name.replace('accuracy', 'accuracy_ci')]:.3f}"
        for name, value in report.items()
        if name.startswith("accuracy/")
    )
    place.say(
        f"reward model on {len(train)} pairs: accuracy {report['accuracy']:.3f} ± {report['accuracy_ci']:.3f}"
        f"{subsets}, margin {report['margin']:.2f}, calibration error {report['calibration_error']:.3f}, "
        f"correlation with length {report['length_correlation']:.2f} on {len(held_out)} held-out pairs; scores "
        f"{facts['score_mean']:.2f} ± {facts['score_std']:.2f}"
    )
    save_model(model, tokenizer, place.folder, **facts)
    return {**report, **facts, "pairs": len(train), "held_out_pairs": len(held_out), "step": best["iteration"]}
