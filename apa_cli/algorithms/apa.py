"""Advantage-Induced Policy Alignment (2306.02231)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import TOKEN_MASK, ActorCritic, Whitening
from apa_cli.kl import k1
from apa_cli.losses import apa_loss
from apa_cli.tensor_ops import masked_mean
from apa_cli.types import Batch, Loss, LossTerm, PolicyOutput, Positive, Rollout, State, require

if TYPE_CHECKING:
    from torch import Tensor


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

        Diagnostics and constant are computed over the tokens over which Â was whitened.
        """
        log_ratio = k1(batch.sampler_logprobs, require(batch.ref_logprobs, "ref_logprobs"))
        exponent = batch.advantages / self.lambda_ - log_ratio
        diagnostics = log_z(exponent, batch.mask)
        batch = batch.replace(metrics={**batch.metrics, **diagnostics})
        if self.normalizer is Normalizer.none:
            return batch
        constant = exponent.new_full(exponent.shape, diagnostics["apa/log_z_lower"])
        return batch.replace(log_normalizer=constant)

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        constant = 0.0 if batch.log_normalizer is None else batch.log_normalizer
        reference = require(batch.ref_logprobs, "ref_logprobs")
        values = apa_loss(output.logprobs, reference, batch.advantages, self.lambda_, constant)
        policy = LossTerm(name="policy", values=values, mask=TOKEN_MASK, weight=1.0)
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
