"""Metrics of apa-eval that training does not log: intervals, paired differences, the SFT model's metrics, best of n.

Every interval is the half width of the normal 95 % interval of the mean; differences are taken prompt by prompt.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.kl import best_of_n_bound
from apa_cli.randomness import Stream
from apa_cli.rollout.collect import collect_rollout
from apa_cli.rollout.response_text import EOS, LENGTH, STOP
from apa_cli.rollout.samplers import ModelSampler
from apa_cli.rollout.statistics import confidence_half_width, distinct_n, drop_missing
from apa_cli.tensor_ops import masked_mean
from apa_cli.training.evaluator import (
    MAIN_REWARD,
    Evaluator,
    ScoredResponses,
    compare_scores,
    find_equal_responses,
)
from apa_cli.types import POLICY, Prompt

SFT_SUFFIX = "_sft"
"""Suffix of the SFT model's metrics."""


def compute_eval_metrics(
    evaluator: Evaluator, policy_responses: ScoredResponses, sft_responses: ScoredResponses | None
) -> dict[str, float]:
    """Return the metrics that training logs, with intervals, the SFT model's metrics, and the paired differences.

    Without `sft_responses` only the policy's metrics are returned.
    """
    reference = policy_responses if sft_responses is None else sft_responses
    sft_texts = reference.rollout.responses
    metrics = evaluator.compute_metrics(policy_responses, reference.scores, sft_texts)
    metrics |= drop_missing({"eval/kl_exact_ci": confidence_half_width(policy_responses.kl.sum(-1))})
    same = find_equal_responses(policy_responses.rollout.responses, sft_texts)
    metrics |= {f"eval/{name}": value for name, value in compute_unpaired_metrics(evaluator, policy_responses).items()}
    for name in evaluator.scores:
        suffix = f"/{name}" if name != MAIN_REWARD else ""
        summary = summarize_scores(policy_responses.scores[name])
        if sft_responses is not None:
            summary |= compare_with_sft(policy_responses.scores[name], sft_responses.scores[name], same)
        metrics |= {f"eval/{key}{suffix}": value for key, value in summary.items()}
    if sft_responses is None:
        return {key: value for key, value in metrics.items() if not key.split("/")[1].endswith(SFT_SUFFIX)}
    described = compute_unpaired_metrics(evaluator, sft_responses)
    return metrics | {f"eval/{name}{SFT_SUFFIX}": value for name, value in described.items()}


def compute_unpaired_metrics(evaluator: Evaluator, responses: ScoredResponses) -> dict[str, float]:
    """Return the metrics of one model's responses alone: `RESPONSE_METRICS` and the data set's own."""
    rollout, n = responses.rollout, len(responses.rollout.endings)
    return {
        "entropy": float(masked_mean(responses.entropy, rollout.mask)),
        **{f"distinct_{k}": distinct_n(rollout.response_ids, rollout.mask, k) for k in (1, 2, 3)},
        "length": float(rollout.mask.sum(-1).float().mean()),
        "eos_rate": rollout.endings.count(EOS) / n,
        "stop_rate": rollout.endings.count(STOP) / n,
        "truncated_rate": rollout.endings.count(LENGTH) / n,
        **evaluator.describe_responses(rollout),
    }


def summarize_scores(scores: list[float]) -> dict[str, float]:
    """Return the mean score and its interval."""
    values = torch.tensor(scores)
    return drop_missing({"reward_mean": float(values.mean()), "reward_ci": confidence_half_width(values)})


def compare_with_sft(scores: list[float], sft_scores: list[float], same: Tensor | None = None) -> dict[str, float]:
    """Return the SFT model's mean score, and the policy's gain and win rate against it on the same prompts.

    `same` [N] is true for the same response of both, see `compare_scores`.
    """
    won, difference = compare_scores(scores, sft_scores, same), torch.tensor(scores) - torch.tensor(sft_scores)
    return drop_missing({
        **{f"{key}{SFT_SUFFIX}": value for key, value in summarize_scores(sft_scores).items()},
        "gain": float(difference.mean()),
        "gain_ci": confidence_half_width(difference),
        "win_rate_sft": float(won.mean()),
        "win_rate_sft_ci": confidence_half_width(won),
    })  # fmt: skip


def score_many_responses(evaluator: Evaluator, model: PreTrainedModel, prompts: list[Prompt], count: int) -> Tensor:
    """Return the scores [P, count] of `count` responses to each prompt, sampled from the best-of-n random stream."""
    many = [replace(prompt, sample=number) for prompt in prompts for number in range(count)]
    sampler = ModelSampler(model, evaluator.tokenizer, evaluator.dtype)
    rollout = collect_rollout(
        {POLICY: sampler}, evaluator.tokenizer, many, evaluator.sampling, evaluator.end_tokens,
        evaluator.seed, Stream.best_of_n, iteration=0,
    )  # fmt: skip
    scores = evaluator.scores[MAIN_REWARD](rollout.prompts, rollout.responses, rollout.columns).values
    return torch.tensor(scores).view(len(prompts), count)


def compute_best_of_n(scores: Tensor, sizes: list[int], policy_scores: list[float]) -> dict[str, float]:
    """Return for each n of `sizes` the mean best of each prompt's first n scores [P, N], and the KL bound in nats.

    gain is the mean over these prompts, the first P, of the policy's score minus the best score.
    """
    metrics: dict[str, float | None] = {}
    for n in sizes:
        best = scores[:, :n].max(dim=1).values
        gain = torch.tensor(policy_scores[: len(best)]) - best
        metrics |= {
            f"eval/best_of_{n}/reward_mean": float(best.mean()),
            f"eval/best_of_{n}/reward_ci": confidence_half_width(best),
            f"eval/best_of_{n}/kl_bound": best_of_n_bound(n),
            f"eval/best_of_{n}/gain": float(gain.mean()),
            f"eval/best_of_{n}/gain_ci": confidence_half_width(gain),
        }
    return drop_missing(metrics)
