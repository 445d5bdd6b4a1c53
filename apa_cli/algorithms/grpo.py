"""Group Relative Policy Optimization (2402.03300), with options of DAPO, Dr. GRPO and GSPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.advantages import center_in_groups, spread_over_tokens
from apa_cli.algorithms.base import POLICY_MASK, entropy_terms
from apa_cli.algorithms.ratio import ImportanceLevel, LossReduction, RatioAlgorithm, reduce_term
from apa_cli.losses import k3_loss, ppo_clip_mask, ppo_loss
from apa_cli.tensor_ops import masked_row_mean
from apa_cli.types import OLD, REFERENCE, Batch, Loss, LossTerm, Metric, PolicyOutput, Positive, Rollout, State, require


@dataclass(frozen=True)
class GRPO(RatioAlgorithm):
    """Clipped policy gradient on scores standardized among a prompt's responses, plus kl_coef · k3 in the loss."""

    label = "GRPO"
    color = "#a21caf"
    lambda_meaning = "weight of KL in the loss"
    samples_per_prompt = 8

    normalize_std: bool
    clip_range_high: Annotated[float | None, Positive]
    loss_reduction: LossReduction
    importance_level: ImportanceLevel
    max_new_tokens: Annotated[int, Positive]

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Return the batch with Â, the same on all tokens of a response."""
        scores, metrics, state = self.scale_scores(rollout, state)
        centered, std = center_in_groups(scores, rollout.groups)
        advantages = centered / (std + 1e-4 if self.normalize_std else 1.0)
        metrics["grpo/zero_std_groups"] = len(rollout.groups[std == 0].unique()) / len(rollout.groups.unique())
        return self.make_batch(rollout, spread_over_tokens(advantages.to(scores.dtype), rollout.mask), metrics), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        log_ratio, mask = output.logprobs - batch.get_logprobs(OLD), batch.masks[POLICY_MASK]
        advantages = require(batch.advantages, "advantages")
        if self.importance_level is ImportanceLevel.sequence:
            log_ratio = masked_row_mean(log_ratio, mask).unsqueeze(-1).expand(mask.shape)
            advantages = advantages.where(mask, advantages.new_zeros(()))  # all tokens share the ratio and its gradient
        arguments = (log_ratio, advantages, self.clip_range, self.clip_range_high)
        terms = [LossTerm("policy", ppo_loss(*arguments), POLICY_MASK, weight=1.0)]
        if self.kl_coef:
            k3 = k3_loss(output.logprobs, batch.get_logprobs(REFERENCE))
            terms.append(LossTerm("kl", k3, POLICY_MASK, weight=self.kl_coef))
        terms = [reduce_term(term, batch, self.loss_reduction, self.max_new_tokens) for term in terms]
        clipped = Metric(ppo_clip_mask(*arguments), mask=POLICY_MASK)
        return Loss([*terms, *entropy_terms(output, self.entropy_coef)], {"policy/clip_fraction": clipped})
