"""Advantage-Induced Policy Alignment (2306.02231)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import POLICY_MASK, ActorCritic, Whitening
from apa_cli.kl import k1
from apa_cli.losses import apa_loss
from apa_cli.tensor_ops import masked_mean
from apa_cli.types import (
    REFERENCE,
    SAMPLER,
    Batch,
    Loss,
    LossTerm,
    PolicyOutput,
    Positive,
    Rollout,
    State,
    require,
)

if TYPE_CHECKING:
    from torch import Tensor


LOG_NORMALIZER = "log_normalizer"
"""Name in `Batch.extra` of log Z [N, T], which may be added to every token's residual."""


class Normalizer(Enum):
    """Value of log Z(s) in the target: 0, as in the paper, or one constant per batch."""

    none = "none"
    batch = "batch"


@dataclass(frozen=True)
class APA(ActorCritic):
    """Squared error between log π and log π_init + Â/λ; λ is the target's temperature and the pull to π_init."""

    label = "APA"
    color = "#1d5fa8"
    lambda_meaning = "temperature and pull"

    lambda_: Annotated[float, Positive]
    normalizer: Normalizer

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        batch, state = super().prepare(rollout, state)
        if self.whitening is not Whitening.minibatch:
            batch = self.add_log_z(batch)
        return batch, state

    def prepare_minibatch(self, batch: Batch) -> Batch:
        batch = super().prepare_minibatch(batch)
        return self.add_log_z(batch) if self.whitening is Whitening.minibatch else batch

    def add_log_z(self, batch: Batch) -> Batch:
        """Return the batch with the diagnostics of log Z and, if `normalizer` is batch, the constant for the target.

        Diagnostics and constant are computed over the on-policy tokens of the rollout batch, or of the minibatch if Â
        is whitened there; without such a token there are none.
        """
        log_ratio = k1(batch.get_logprobs(SAMPLER), batch.get_logprobs(REFERENCE))
        exponent = require(batch.advantages, "advantages") / self.lambda_ - log_ratio
        mask = batch.on_policy & batch.masks[POLICY_MASK]
        if not bool(mask.any()):
            return batch
        diagnostics = log_z(exponent, mask)
        batch = batch.replace(metrics={**batch.metrics, **diagnostics})
        if self.normalizer is Normalizer.none:
            return batch
        constant = exponent.new_full(exponent.shape, diagnostics["apa/log_z_lower"])
        return batch.replace(extra={**batch.extra, LOG_NORMALIZER: constant})

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        advantages, constant = require(batch.advantages, "advantages"), batch.extra.get(LOG_NORMALIZER, 0.0)
        values = apa_loss(output.logprobs, batch.get_logprobs(REFERENCE), advantages, self.lambda_, constant)
        policy = LossTerm(name="policy", values=values, mask=POLICY_MASK, weight=1.0)
        return Loss([policy, *self.critic_terms(batch, output)])


def log_z(exponent: Tensor, mask: Tensor) -> dict[str, float]:
    """Return the log of the batch-mean Z, which the paper takes as 0, its effective sample size and its Jensen bound.

    With e = Â/λ − k1 on the n true tokens (exponent and mask [N, T]): log_z = logsumexp_m(e) − log n;
    ess = (Σ w)² / Σ w² for w = exp(e), between 1 and n (below 10, log_z is unreliable); log_z_lower = mean_m(e),
    which is also the constant that minimizes the squared error.
    """
    tokens = exponent[mask].double()
    total = float(tokens.logsumexp(0))
    return {
        "apa/log_z": total - math.log(len(tokens)),
        "apa/log_z_lower": float(masked_mean(exponent.double(), mask)),
        "apa/log_z_ess": math.exp(2 * total - float((2 * tokens).logsumexp(0))),
    }
