"""Evaluation on fixed held-out prompts with fixed random numbers: score, exact KL, entropy, diversity, win rate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.distributed.world import ALONE, World
from apa_cli.hardware.oom import Halving
from apa_cli.kl import exact_kl
from apa_cli.models.forward import compute_precision, response_states, sequences
from apa_cli.models.lm_head import pieces
from apa_cli.models.lora import WithoutAdapter
from apa_cli.randomness import Stream
from apa_cli.rewards.base import CheckedScore
from apa_cli.rollout.collect import collect, concatenated, extended
from apa_cli.rollout.statistics import mean_interval, response_statistics
from apa_cli.settings import DType, SamplingSettings
from apa_cli.tensor_ops import masked_mean, tempered, token_entropy
from apa_cli.types import Prompt, Rollout

MAIN = ""
"""The run's own reward, among those that an evaluation scores with; the further ones go by their names."""


@dataclass(frozen=True)
class Replies:
    """One model's replies to the held-out prompts."""

    rollout: Rollout
    scores: dict[str, list[float]]
    """By each reward, as `Evaluator.scores` names them."""
    kl: Tensor
    """[N, T] float32, exact KL to the reference at each position, 0 outside the mask."""
    entropy: Tensor
    """[N, T] float32, of the whole distribution at each position, 0 outside the mask."""


@dataclass(frozen=True)
class Evaluator:
    """Samples the same prompts with the same random numbers each time, so that curves and runs pair."""

    prompts: list[Prompt]
    sources: list[str]
    """The prompts' texts as the data set has them, before any was cut to fit."""
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | WithoutAdapter
    scores: Mapping[str, CheckedScore]
    """The run's reward under `MAIN`, and after it further ones that only measure."""
    describe: Callable[[list[str], list[str]], dict[str, float]]
    sampling: SamplingSettings
    end_tokens: frozenset[int]
    eval_seed: int
    sampling_batch: Halving
    microbatch: Halving
    dtype: DType
    world: World = ALONE

    def evaluate(
        self, policy: PreTrainedModel, sft_scores: Mapping[str, list[float]]
    ) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]:
        """Metrics under eval/, one row per prompt for the sample table, and the scores by reward.

        eval/win_rate_sft compares each score with `sft_scores`, those of the SFT model on the same prompts and
        random numbers; a tie counts half. Where there are none this is the evaluation of the SFT model itself. A
        further reward's figures are eval/reward_mean/NAME and eval/win_rate_sft/NAME; the latter is left out where
        the SFT model was not scored by it.
        """
        replies = self.replies(policy)
        rollout, scores = replies.rollout, replies.scores
        rows = [
            {"prompt": prompt, "response": response, "score": score, "kl": float(nats), "ending": ending}
            for prompt, response, score, nats, ending in zip(
                rollout.prompts, rollout.responses, scores[MAIN], replies.kl.sum(-1), rollout.endings, strict=True
            )
        ]
        return self.metrics(replies, sft_scores or scores), rows, scores

    @torch.no_grad()
    def replies(self, policy: PreTrainedModel) -> Replies:
        """A model's replies to the prompts, scored by every reward and measured against the reference."""
        own = [self.prompts[i] for i in self.world.share(len(self.prompts))]

        def drawn(microbatch: int) -> Rollout:
            with compute_precision(policy.device, self.dtype):
                return collect(
                    {"policy": policy}, self.tokenizer, own, replace(self.sampling, microbatch_size=microbatch),
                    self.end_tokens, self.eval_seed, Stream.evaluation, iteration=0,
                )  # fmt: skip

        rollout = self.sampling_batch.run(drawn)
        kl, entropy = self.microbatch.run(lambda size: self.exact(policy, rollout, size))
        texts = (rollout.prompts, rollout.responses, rollout.columns)
        scores = self.world.together(lambda: {name: score(*texts).values for name, score in self.scores.items()})
        return self.gathered(Replies(rollout, scores, kl, entropy))

    def gathered(self, own: Replies) -> Replies:
        """The replies of all processes, on each of them."""
        if self.world.size == 1:
            return own
        parts, count = self.world.gather(own), len(self.prompts)
        rollout = concatenated([part.rollout for part in parts], self.tokenizer.pad_token_id, count)
        width = rollout.mask.shape[1]
        kl, entropy = (
            torch.cat([extended(getattr(part, name), width, left=False, filling=0) for part in parts])[:count]
            for name in ("kl", "entropy")
        )
        scores = {name: [value for part in parts for value in part.scores[name]][:count] for name in own.scores}
        return Replies(rollout, scores, kl, entropy)

    def metrics(self, replies: Replies, sft_scores: Mapping[str, list[float]]) -> dict[str, float]:
        """What training logs of replies, see `evaluate`."""
        rollout, scores, kl = replies.rollout, replies.scores, replies.kl
        values, sft = torch.tensor(scores[MAIN]), torch.tensor(sft_scores[MAIN])
        statistics = response_statistics(rollout)
        metrics = {
            "eval/reward_mean": float(values.mean()),
            "eval/reward_ci": mean_interval(values),
            "eval/reward_mean_sft": float(sft.mean()),
            "eval/win_rate_sft": win_rate(scores[MAIN], sft_scores[MAIN]),
            "eval/kl_exact": float(kl.sum(-1).mean()),
            "eval/kl_exact_token": float(masked_mean(kl, rollout.mask)),
            "eval/entropy": float(masked_mean(replies.entropy, rollout.mask)),
            "eval/distinct_2": statistics["response/distinct_2"],
            "eval/length": statistics["response/length"],
            "eval/eos_rate": statistics["response/eos_rate"],
        }
        for name in list(self.scores)[1:]:
            metrics[f"eval/reward_mean/{name}"] = float(torch.tensor(scores[name]).mean())
            if name in sft_scores:
                metrics[f"eval/win_rate_sft/{name}"] = win_rate(scores[name], sft_scores[name])
        described = self.describe(self.sources, rollout.responses)
        return metrics | {f"eval/{name}": value for name, value in described.items()}

    def exact(self, policy: PreTrainedModel, rollout: Rollout, microbatch: int) -> tuple[Tensor, Tensor]:
        """KL(π_θ ‖ π_init) and the entropy of π_θ at each response position, over the whole vocabulary, [N, T]."""
        kls, entropies = [], []
        device, temperature = policy.device, self.sampling.temperature
        for start in range(0, len(rollout.endings), microbatch):
            part = slice(start, start + microbatch)
            mask = rollout.mask[part].to(device)
            rows = sequences(
                rollout.prompt_ids[part].to(device), rollout.prompt_mask[part].to(device),
                rollout.response_ids[part].to(device), mask,
            )  # fmt: skip
            with compute_precision(device, self.dtype):
                states, head = response_states(policy, rows)
                ref_states, ref_head = response_states(self.reference, rows)
                values = torch.empty(2, len(states), device=device)
                for piece in pieces(len(states), policy.config.get_text_config().vocab_size):
                    logits = tempered(head(states[piece]).float(), temperature)
                    ref_logits = tempered(ref_head(ref_states[piece]).float(), temperature)
                    values[:, piece] = torch.stack([exact_kl(logits, ref_logits), token_entropy(logits)])
            kls.append(torch.zeros(mask.shape).masked_scatter(mask.cpu(), values[0].cpu()))
            entropies.append(torch.zeros(mask.shape).masked_scatter(mask.cpu(), values[1].cpu()))
        return torch.cat(kls), torch.cat(entropies)


def wins(scores: list[float], others: list[float]) -> Tensor:
    """[N], 1 where the score is higher than the other's at the same place, ½ at a tie, 0 where it is lower."""
    mine, other = torch.tensor(scores), torch.tensor(others)
    return (mine > other) + 0.5 * (mine == other)


def win_rate(scores: list[float], others: list[float]) -> float:
    """The share of `scores` higher than the others' at the same place; a tie counts half."""
    return float(wins(scores, others).mean())
