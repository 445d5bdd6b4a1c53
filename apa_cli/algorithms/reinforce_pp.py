"""REINFORCE++ (2501.03262): returns whitened over the whole rollout batch instead of a critic."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from apa_cli.advantages import center_in_groups, place_scores_at_end, sum_rewards_to_go
from apa_cli.algorithms.base import POLICY_MASK, entropy_terms
from apa_cli.algorithms.ratio import RatioAlgorithm
from apa_cli.losses import ppo_clip_mask, ppo_loss
from apa_cli.tensor_ops import whiten
from apa_cli.types import OLD, Batch, Loss, LossTerm, Metric, Needs, PolicyOutput, Rollout, State, require


class Baseline(Enum):
    """Subtrahend of the scores: nothing, or the mean score of all responses to the prompt (REINFORCE++-baseline)."""

    none = "none"
    group_mean = "group_mean"


@dataclass(frozen=True)
class ReinforcePP(RatioAlgorithm):
    """Clipped policy gradient on whitened sums of the score and −kl_coef · KL of the tokens to come."""

    label = "REINFORCE++"
    color = "#7a6a00"
    samples_per_prompt = 1
    least_samples = 1

    baseline: Baseline

    def needs(self) -> Needs:
        needs = super().needs()
        return needs if self.baseline is Baseline.none else replace(needs, samples_per_prompt=2, least_samples=2)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Return the batch with Â_t: the whitened sum of the token rewards from t on."""
        scores, metrics, state = self.scale_scores(rollout, state)
        if self.baseline is Baseline.group_mean:
            scores = center_in_groups(scores, rollout.groups)[0].to(scores.dtype)
        token_rewards = place_scores_at_end(scores, rollout.mask) - self.price_kl(rollout)
        returns = sum_rewards_to_go(token_rewards, rollout.mask, 1.0)
        advantages = whiten(returns, rollout.masks[POLICY_MASK])
        return self.make_batch(rollout, advantages, metrics), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        log_ratio = output.logprobs - batch.get_logprobs(OLD)
        arguments = (log_ratio, require(batch.advantages, "advantages"), self.clip_range)
        policy = LossTerm("policy", ppo_loss(*arguments), mask=POLICY_MASK, weight=1.0)
        clipped = Metric(ppo_clip_mask(*arguments), mask=POLICY_MASK)
        return Loss([policy, *entropy_terms(output, self.entropy_coef)], {"policy/clip_fraction": clipped})
