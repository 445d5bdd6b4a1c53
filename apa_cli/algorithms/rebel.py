"""REBEL, regression to relative rewards (2404.16767, algorithm 1), with KL from the reference in the rewards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.algorithms.pairs import PAIR_MASK, SECOND_SCORE, Pairwise, log_ratio_difference
from apa_cli.kl import sum_k1
from apa_cli.tensor_ops import differ
from apa_cli.types import (
    OLD,
    REFERENCE,
    Batch,
    Loss,
    LossTerm,
    NonNegative,
    PolicyOutput,
    Positive,
    Rollout,
    State,
    require,
)

REWARD_DIFFERENCE = "reward_difference"
"""Name in `extra` of r₁ − r₂ [N], in units of the score."""


@dataclass(frozen=True)
class REBEL(Pairwise):
    """Squared error between η⁻¹ times the difference of log π/π_old and the difference in reward of two responses.

    η⁻¹ prices the step away from π_old; only kl_coef holds the policy near the reference.
    """

    label = "REBEL"
    color = "#be185d"
    lambda_meaning = "inverse step size"

    inverse_eta: Annotated[float, Positive]
    kl_coef: Annotated[float, NonNegative]

    @property
    def passes(self) -> tuple[str, ...]:
        return (REFERENCE, OLD) if self.kl_coef else (OLD,)

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Return the batch with the difference in reward, r = score − kl_coef · Σ_t k1_t over on-policy tokens."""
        batch, state = super().prepare(rollout, state)
        scores, second_scores = require(rollout.scores, "scores"), rollout.extra[SECOND_SCORE]
        difference = (scores - second_scores).where(differ(scores, second_scores), scores.new_zeros(()))
        if self.kl_coef:
            kl, second_kl = sum_k1(rollout, REFERENCE), sum_k1(rollout.related[self.second], REFERENCE)
            difference = difference - self.kl_coef * (kl - second_kl)
        return batch.replace(extra={**batch.extra, REWARD_DIFFERENCE: difference}), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Return (η⁻¹ · log-ratio difference − (r₁ − r₂))² [B], in units of the score squared."""
        step = self.inverse_eta * log_ratio_difference(batch, output, self.second, OLD)
        return Loss([LossTerm("policy", (step - batch.extra[REWARD_DIFFERENCE]) ** 2, PAIR_MASK, 1.0)])
