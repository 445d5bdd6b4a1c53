"""REINFORCE Leave-One-Out (2402.14740): a response is compared with the other responses to its prompt."""

from __future__ import annotations

from dataclasses import dataclass

from apa_cli.advantages import spread_over_tokens, subtract_mean_of_others
from apa_cli.algorithms.base import POLICY_MASK, ROW_MASK, entropy_terms
from apa_cli.algorithms.ratio import RatioAlgorithm
from apa_cli.losses import ppo_clip_mask, ppo_loss
from apa_cli.tensor_ops import masked_row_sum
from apa_cli.types import OLD, Batch, Loss, LossTerm, Metric, PolicyOutput, Rollout, State, require


@dataclass(frozen=True)
class RLOO(RatioAlgorithm):
    """Clipped policy gradient per response on score − kl_coef · KL less the mean of the prompt's other responses."""

    label = "RLOO"
    color = "#0e7490"
    samples_per_prompt = 4

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Return the batch with Â, the same on all tokens of a response."""
        scores, metrics, state = self.scale_scores(rollout, state)
        rewards = scores - self.price_kl(rollout).sum(dim=-1)
        advantages = subtract_mean_of_others(rewards, rollout.groups).to(rewards.dtype)
        return self.make_batch(rollout, spread_over_tokens(advantages, rollout.mask), metrics), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Return the clipped loss [B] of whole responses: ρ = exp(Σ_t (ℓ_θ − ℓ_old)), not divided by their lengths."""
        log_ratio = masked_row_sum(output.logprobs - batch.get_logprobs(OLD), batch.masks[POLICY_MASK])
        advantages = require(batch.advantages, "advantages")[:, 0]  # the same on every token
        arguments = (log_ratio, advantages, self.clip_range)
        policy = LossTerm("policy", ppo_loss(*arguments), mask=ROW_MASK, weight=1.0)
        clipped = Metric(ppo_clip_mask(*arguments), mask=ROW_MASK)
        return Loss([policy, *entropy_terms(output, self.entropy_coef)], {"policy/clip_fraction": clipped})
