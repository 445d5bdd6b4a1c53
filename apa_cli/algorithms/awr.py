"""Advantage-Weighted Regression (1910.00177), per token as in 2306.02231."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

from apa_cli.algorithms.base import TOKEN_MASK, ActorCritic
from apa_cli.losses import awr_loss
from apa_cli.types import Batch, Loss, LossTerm, Needs, PolicyOutput, Positive


@dataclass(frozen=True)
class AWR(ActorCritic):
    """Imitation of sampled tokens with weight exp(Â/λ); λ is a step size, and nothing pulls to π_init."""

    label = "AWR"
    color = "#15803d"
    lambda_meaning = "step size"

    lambda_: Annotated[float, Positive]
    weight_clip: Annotated[float | None, Positive]

    def needs(self) -> Needs:
        return replace(super().needs(), reference=False)

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        values = awr_loss(output.logprobs, batch.advantages, self.lambda_, self.weight_clip)
        policy = LossTerm(name="policy", values=values, mask=TOKEN_MASK, weight=1.0)
        return Loss([policy, *self.critic_terms(batch, output)])
