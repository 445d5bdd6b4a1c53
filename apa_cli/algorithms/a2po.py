"""A*-PO, regression to optimal advantages (2505.20686, algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import ROW_MASK, Algorithm
from apa_cli.tensor_ops import drop_rounding, masked_row_sum
from apa_cli.types import INIT, RESPONSE, Batch, Loss, LossTerm, Needs, PolicyOutput, Positive, Rollout, State, require

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from apa_cli.types import Encode


@dataclass(frozen=True)
class A2PO(Algorithm):
    """Squared error between β₂ log π/π_init of a response and score − V*(x), estimated from samples of π_init."""

    # Without score_scaling: V* is estimated from kept scores, which another divisor would put into another unit.
    label, color, lambda_meaning = "A2PO", "#78350f", "price of KL"
    plans = ("online_init",)

    beta1: Annotated[float, Positive]
    beta2: Annotated[float, Positive]

    def needs(self) -> Needs:
        return Needs(passes={RESPONSE: (INIT,)})  # not "reference", which may be refreshed: V* stays π_init's

    def process_rollout(
        self, rollout: Rollout, state: State, rng: np.random.Generator, encode: Encode
    ) -> tuple[Rollout, State]:
        """Return the policy's rows with V*(x) and score − V*(x) in `extra`; those of π_init are dropped."""
        sampled, scores = rollout.on_policy.any(-1), require(rollout.scores, "scores")
        rows = rollout.select_rows(sampled.nonzero().squeeze(1))
        values = estimate_optimal_values(scores[~sampled], rollout.groups[~sampled], rows.groups, self.beta1)
        advantages = drop_rounding(scores[sampled] - values, values)
        extra = {**rows.extra, "optimal_value": values, "optimal_advantage": advantages}
        return rows.replace(extra=extra), state

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        masks = {**rollout.masks, ROW_MASK: rollout.mask.new_ones(len(rollout))}
        metrics = {"a2po/optimal_value": float(rollout.extra["optimal_value"].mean())}
        return Batch.from_rollout(rollout, masks=masks, metrics=metrics), state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Return (β₂ · Σ(ℓ_θ − ℓ_init) − (r − V*))² [B], in units of the score squared."""
        log_ratio = masked_row_sum(output.logprobs - batch.get_logprobs(INIT), batch.mask)
        error = self.beta2 * log_ratio - batch.extra["optimal_advantage"]
        return Loss([LossTerm("policy", error**2, ROW_MASK, 1.0)])


def estimate_optimal_values(scores: Tensor, groups: Tensor, prompts: Tensor, beta: float) -> Tensor:
    """Return V* = β log mean_k exp(r_k/β) [N] over the scores [M] of the prompt's group; few scores bias it low."""
    same = prompts.unsqueeze(1) == groups.unsqueeze(0)
    exponents = (scores.double() / beta).where(same, -float("inf"))
    return (beta * (exponents.logsumexp(1) - same.sum(1).double().log())).to(scores.dtype)
