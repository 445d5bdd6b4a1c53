"""Evaluation on fixed held-out prompts with fixed random numbers: score, exact KL, entropy, diversity, win rate."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from apa_cli.distributed.world import SINGLE_PROCESS, World
from apa_cli.errors import UserError
from apa_cli.hardware.oom import BatchSizeHalver
from apa_cli.kl import exact_kl
from apa_cli.models.forward import autocast_to, build_padded_inputs, compute_head_inputs
from apa_cli.models.lm_head import split_into_chunks
from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.randomness import Stream
from apa_cli.rewards.base import CheckedScoreFunction
from apa_cli.rollout.collect import collect_rollout, concatenate_sequences, pad_to_width
from apa_cli.rollout.engine import pad_left
from apa_cli.rollout.samplers import Sampler
from apa_cli.rollout.statistics import compute_response_metrics, confidence_half_width, drop_missing
from apa_cli.rollout.token_sampling import truncate_logits
from apa_cli.settings import DType, SamplingSettings
from apa_cli.tensor_ops import apply_temperature, differ, masked_mean, token_entropy
from apa_cli.types import POLICY, Prompt, Rollout

Decoding = Callable[[], AbstractContextManager[object]]
"""Context in which a model's logits are those of the decoded policy."""
RESPONSE_METRICS = (
    "entropy", "distinct_1", "distinct_2", "distinct_3", "length", "eos_rate", "stop_rate", "truncated_rate",
)  # fmt: skip
"""Metrics of any model's responses; a data set may add further metrics."""
OTHER_METRIC_PREFIXES = ("reward_", "win_rate_", "gain", "kl_exact", "best_of_")
"""Prefixes of the evaluation's further metrics."""
MAIN_REWARD = ""
"""Key of the run's own reward among the rewards of an evaluation; further rewards have their names as keys."""


@dataclass(frozen=True)
class ScoredResponses:
    """One model's responses to the held-out prompts, with scores, KL and entropy."""

    rollout: Rollout
    scores: dict[str, list[float]]
    """N scores by each reward, under the keys of `Evaluator.scores`."""
    kl: Tensor
    """[N, T] float32, exact KL(π_θ ‖ π_init) in nats at each position, 0 outside the mask; with top_k or top_p that of
    the truncated, renormalized distribution that was sampled."""
    entropy: Tensor
    """[N, T] float32, entropy in nats of the same distribution at each position, 0 outside the mask."""


@dataclass(frozen=True)
class Evaluator:
    """Evaluation on the same prompts with the same random numbers each time, so that runs can be paired."""

    prompts: list[Prompt]
    plain_prompt_ids: list[list[int]]
    """Tokens that π_init reads in the exact KL: those of the prompts without the algorithm's instruction."""
    sources: list[str]
    """Texts of the prompts in the data set, before truncation."""
    tokenizer: PreTrainedTokenizerBase
    reference: PreTrainedModel | AdapterDisabledModel
    scores: Mapping[str, CheckedScoreFunction]
    """The run's reward under `MAIN_REWARD`, then the rewards that only evaluate."""
    describe: Callable[[list[str], list[str]], dict[str, float]]
    """The data set's own metrics of (sources, responses)."""
    sampling: SamplingSettings
    end_tokens: frozenset[int]
    seed: int
    sampling_batch: BatchSizeHalver
    """Sequences sampled in parallel."""
    microbatch: BatchSizeHalver
    """Sequences per forward pass."""
    dtype: DType
    world: World = SINGLE_PROCESS

    def evaluate(
        self,
        sampler: Sampler,
        policy: PreTrainedModel,
        sft_scores: Mapping[str, list[float]],
        decoding: Decoding = nullcontext,
        sft_responses: Sequence[str] = (),
    ) -> tuple[dict[str, float], list[dict[str, Any]], dict[str, list[float]]]:
        """Return metrics under eval/, one row per prompt for the sample table, and the scores by reward.

        Arguments as in `sample_and_score`.
        eval/win_rate_sft compares each score with `sft_scores`, the scores of the SFT model on the same prompts and
        random numbers; a tie counts half, see `compare_scores`. `sft_responses` are the texts of its responses, empty
        if they are unknown. Empty `sft_scores` mean that `policy` is the SFT model. Further rewards have
        eval/reward_mean/NAME and eval/win_rate_sft/NAME; the win rate is left out if `sft_scores` lacks NAME.
        """
        responses = self.sample_and_score(sampler, policy, decoding)
        rollout, scores = responses.rollout, responses.scores
        rows = [
            {"prompt": prompt, "response": response, "score": score, "kl": float(kl), "ending": ending}
            for prompt, response, score, kl, ending in zip(
                rollout.prompts, rollout.responses, scores[MAIN_REWARD], responses.kl.sum(-1), rollout.endings,
                strict=True,
            )
        ]  # fmt: skip
        return self.compute_metrics(responses, sft_scores or scores, sft_responses), rows, scores

    @torch.no_grad()
    def sample_and_score(
        self,
        sampler: Sampler,
        policy: PreTrainedModel | AdapterDisabledModel,
        decoding: Decoding = nullcontext,
    ) -> ScoredResponses:
        """Sample responses to the prompts, score them by every reward, and measure KL and entropy of `policy` on them.

        Within `decoding()` the policy's logits are those of the decoded policy, which the sampler draws from.
        """
        indices = self.world.shard_indices(len(self.prompts))
        prompts = [self.prompts[i] for i in indices]

        def sample(microbatch: int) -> Rollout:
            return collect_rollout(
                {POLICY: sampler}, self.tokenizer, prompts, replace(self.sampling, microbatch_size=microbatch),
                self.end_tokens, self.seed, Stream.evaluation, iteration=0,
            )  # fmt: skip

        rollout = self.sampling_batch.run(sample)
        plain = [self.plain_prompt_ids[i] for i in indices]
        kl, entropy = self.microbatch.run(
            lambda size: self.compute_kl_and_entropy(policy, rollout, plain, size, decoding)
        )
        texts = (rollout.prompts, rollout.responses, rollout.columns)
        scores = self.world.run_on_all_ranks(
            lambda: {name: score(*texts).values for name, score in self.scores.items()}
        )
        return self.gather_responses(ScoredResponses(rollout, scores, kl, entropy))

    def gather_responses(self, responses: ScoredResponses) -> ScoredResponses:
        """Return the responses of all ranks, on every rank."""
        if self.world.size == 1:
            return responses
        parts, count = self.world.all_gather(responses), len(self.prompts)
        rollout = concatenate_sequences([part.rollout for part in parts], self.tokenizer.pad_token_id)
        rollout = rollout.select_rows(torch.arange(count))
        width = rollout.mask.shape[1]
        kl, entropy = (
            torch.cat([pad_to_width(getattr(part, name), width, left=False, fill=0) for part in parts])[:count]
            for name in ("kl", "entropy")
        )
        scores = {name: [value for part in parts for value in part.scores[name]][:count] for name in responses.scores}
        return ScoredResponses(rollout, scores, kl, entropy)

    def compute_metrics(
        self, responses: ScoredResponses, sft_scores: Mapping[str, list[float]], sft_responses: Sequence[str] = ()
    ) -> dict[str, float]:
        """Return the metrics that training logs, see `evaluate`."""
        same = find_equal_responses(responses.rollout.responses, sft_responses)
        rollout, scores, kl = responses.rollout, responses.scores, responses.kl
        values, sft = torch.tensor(scores[MAIN_REWARD]), torch.tensor(sft_scores[MAIN_REWARD])
        statistics = compute_response_metrics(rollout)
        metrics: dict[str, float | None] = {
            "eval/reward_mean": float(values.mean()),
            "eval/reward_ci": confidence_half_width(values),
            "eval/reward_mean_sft": float(sft.mean()),
            "eval/win_rate_sft": compute_win_rate(scores[MAIN_REWARD], sft_scores[MAIN_REWARD], same),
            "eval/kl_exact": float(kl.sum(-1).mean()),
            "eval/kl_exact_token": float(masked_mean(kl, rollout.mask)),
            "eval/entropy": float(masked_mean(responses.entropy, rollout.mask)),
            "eval/distinct_2": statistics["response/distinct_2"],
            "eval/length": statistics["response/length"],
            "eval/eos_rate": statistics["response/eos_rate"],
        }
        for name in list(self.scores)[1:]:
            metrics[f"eval/reward_mean/{name}"] = float(torch.tensor(scores[name]).mean())
            if name in sft_scores:
                metrics[f"eval/win_rate_sft/{name}"] = compute_win_rate(scores[name], sft_scores[name], same)
        figures = self.describe_responses(rollout)
        return drop_missing(metrics) | {f"eval/{name}": value for name, value in figures.items()}

    def describe_responses(self, rollout: Rollout) -> dict[str, float]:
        """Return the data set's own metrics. Raise UserError for one with a name of the evaluation's, or no number."""
        figures = self.describe(self.sources, rollout.responses)
        for name, value in figures.items():
            if name in RESPONSE_METRICS or name.startswith(OTHER_METRIC_PREFIXES) or name.endswith("_sft"):
                raise UserError(
                    f"dataset: describe gives the metric {name!r}, a name of the evaluation's; give another"
                )
            if not isinstance(value, Real) or not math.isfinite(value):
                raise UserError(f"dataset: describe gives the metric {name!r} the value {value!r}, not a finite number")
        return {name: float(value) for name, value in figures.items()}

    def compute_kl_and_entropy(
        self,
        policy: PreTrainedModel | AdapterDisabledModel,
        rollout: Rollout,
        plain: list[list[int]],
        microbatch: int,
        decoding: Decoding = nullcontext,
    ) -> tuple[Tensor, Tensor]:
        """Return KL(π_θ ‖ π_init) and the entropy of π_θ, exact sums over the vocabulary in nats, each [N, T].

        π_θ is the distribution that the sampler draws from, truncated by top_k and top_p; π_init is whole, so that the
        KL is finite. π_init reads the prompts `plain` (token ids).
        """
        kls, entropies = [], []
        device, temperature = policy.device, self.sampling.temperature
        plain_ids, plain_mask = pad_left(plain, self.tokenizer.pad_token_id)
        for start in range(0, len(rollout.endings), microbatch):
            part = slice(start, start + microbatch)
            mask = rollout.mask[part].to(device)
            tokens = (rollout.response_ids[part].to(device), mask)
            prompts = (rollout.prompt_ids[part].to(device), rollout.prompt_mask[part].to(device))
            plain_prompts = (plain_ids[part].to(device), plain_mask[part].bool().to(device))
            with autocast_to(device, self.dtype):
                with decoding():
                    states, head = compute_head_inputs(policy, build_padded_inputs(*prompts, *tokens))
                ref_states, ref_head = compute_head_inputs(self.reference, build_padded_inputs(*plain_prompts, *tokens))
                values = torch.empty(2, len(states), device=device)
                for piece in split_into_chunks(len(states), policy.config.get_text_config().vocab_size):
                    logits = apply_temperature(head(states[piece]).float(), temperature)
                    logits = truncate_logits(logits, self.sampling)
                    ref_logits = apply_temperature(ref_head(ref_states[piece]).float(), temperature)
                    values[:, piece] = torch.stack([exact_kl(logits, ref_logits), token_entropy(logits)])
            kls.append(torch.zeros(mask.shape).masked_scatter(mask.cpu(), values[0].cpu()))
            entropies.append(torch.zeros(mask.shape).masked_scatter(mask.cpu(), values[1].cpu()))
        return torch.cat(kls), torch.cat(entropies)


def find_equal_responses(responses: Sequence[str], others: Sequence[str]) -> Tensor | None:
    """Return [N] bool, true where two models gave the same response to a prompt; None without the other's responses."""
    return torch.tensor([a == b for a, b in zip(responses, others, strict=True)]) if others else None


def compare_scores(scores: list[float], others: list[float], same: Tensor | None = None) -> Tensor:
    """Return [N] float32: 1 if a score is higher than the other model's on the same prompt, ½ at a tie, 0 if lower.

    Scores tie if they do not differ beyond rounding, or if the responses are the `same` [N], since a reward model may
    score a text differently in another batch.
    """
    first, second = torch.tensor(scores, dtype=torch.float64), torch.tensor(others, dtype=torch.float64)
    tie = ~differ(first, second) if same is None else same | ~differ(first, second)
    return (first > second).float().where(~tie, torch.tensor(0.5))


def compute_win_rate(scores: list[float], others: list[float], same: Tensor | None = None) -> float:
    """Return the share of `scores` that are higher than the other model's on the same prompt, see `compare_scores`."""
    return float(compare_scores(scores, others, same).mean())
