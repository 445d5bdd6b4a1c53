"""Advantage-Induced Policy Alignment (2306.02231)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import TOKENS, ActorCritic, Whitening
from apa_cli.kl import k1
from apa_cli.losses import apa_loss
from apa_cli.tensor_ops import masked_mean
from apa_cli.types import Batch, Loss, LossTerm, PolicyOutput, Positive, Rollout, State

if TYPE_CHECKING:
    from torch import Tensor


class Normalizer(Enum):
    """What stands for log Z(s) in the target: 0, as in the paper, or one constant per batch."""

    none = "none"
    batch = "batch"


@dataclass(frozen=True)
class APA(ActorCritic):
    """Pulls log π towards log π_init + Â/λ by squared error; λ is both temperature and pull to π_init."""

    lambda_: Annotated[float, Positive]
    normalizer: Normalizer

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        batch, state = super().prepare(rollout, state)
        if self.whitening is not Whitening.minibatch:
            batch = self.normalized(batch)
        return batch, state

    def prepare_minibatch(self, batch: Batch) -> Batch:
        batch = super().prepare_minibatch(batch)
        return self.normalized(batch) if self.whitening is Whitening.minibatch else batch

    def normalized(self, batch: Batch) -> Batch:
        """Adds the diagnostics of log Z, computed where Â was whitened, and the constant if it is asked for."""
        exponent = batch.advantages / self.lambda_ - k1(batch.sampler_logprobs, batch.ref_logprobs)
        diagnostics = log_z(exponent, batch.mask)
        batch = batch.with_(metrics={**batch.metrics, **diagnostics})
        if self.normalizer is Normalizer.none:
            return batch
        constant = exponent.new_full(exponent.shape, diagnostics["apa/log_z_lower"])
        return batch.with_(log_normalizer=constant)

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        constant = 0.0 if batch.log_normalizer is None else batch.log_normalizer
        values = apa_loss(output.logprobs, batch.ref_logprobs, batch.advantages, self.lambda_, constant)
        policy = LossTerm(name="policy", values=values, mask=TOKENS, weight=1.0)
        return Loss([policy, *self.critic_terms(batch, output)])


def log_z(exponent: Tensor, mask: Tensor) -> dict[str, float]:
    """Is Z ≈ 1? The log of the batch-mean Z, its effective sample size, and its Jensen bound.

    With e = Â/λ − k1 on the n true tokens (exponent and mask [N, T]): log_z = logsumexp_m(e) − log n;
    ess = (Σ w)² / Σ w² for w = exp(e), between 1 and n (below 10 log_z means little); log_z_lower = mean_m(e),
    which is also the constant that minimises the squared error.
    """
    tokens = exponent[mask].double()
    total = float(tokens.logsumexp(0))
    return {
        "apa/log_z": total - math.log(len(tokens)),
        "apa/log_z_lower": float(masked_mean(exponent.double(), mask)),
        "apa/log_z_ess": math.exp(2 * total - float((2 * tokens).logsumexp(0))),
    }
