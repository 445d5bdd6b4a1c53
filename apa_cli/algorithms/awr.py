"""Advantage-Weighted Regression (1910.00177), per token as in 2306.02231."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.algorithms.base import POLICY_MASK, ActorCritic
from apa_cli.losses import awr_loss
from apa_cli.types import Batch, Loss, LossTerm, PolicyOutput, Positive, require


@dataclass(frozen=True)
class AWR(ActorCritic):
    """Imitation of sampled tokens with weight exp(Â/λ); λ is a step size, and nothing pulls to π_init."""

    label = "AWR"
    color = "#15803d"
    lambda_meaning = "step size"

    lambda_: Annotated[float, Positive]
    weight_clip: Annotated[float | None, Positive]

    @property
    def passes(self) -> tuple[str, ...]:
        return ()

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        values = awr_loss(output.logprobs, require(batch.advantages, "advantages"), self.lambda_, self.weight_clip)
        policy = LossTerm(name="policy", values=values, mask=POLICY_MASK, weight=1.0)
        return Loss([policy, *self.critic_terms(batch, output)])
