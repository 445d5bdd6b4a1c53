"""Proximal Policy Optimization (1707.06347) with a KL penalty in the token rewards (1909.08593)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import TOKEN_MASK, ActorCritic
from apa_cli.kl import adapt_kl_coef, k1, sequence_kl
from apa_cli.losses import ppo_clip_mask, ppo_loss
from apa_cli.types import (
    AtLeastOne,
    Batch,
    Loss,
    LossTerm,
    Metric,
    Needs,
    NonNegative,
    PolicyOutput,
    Positive,
    Range,
    Rollout,
    State,
    require,
)

if TYPE_CHECKING:
    from torch import Tensor


class KLController(Enum):
    """Controller of kl_coef: fixed, or adapted to hold kl/sequence near kl_target."""

    fixed = "fixed"
    adaptive = "adaptive"


@dataclass(frozen=True)
class PPO(ActorCritic):
    """Clipped policy gradient on score − kl_coef · KL; λ is kl_coef, the price of one nat of KL."""

    label = "PPO"
    color = "#c2410c"
    lambda_meaning = "price of KL"

    kl_coef: Annotated[float, NonNegative]
    clip_range: Annotated[float, Range(0, 1, open_low=True, open_high=True)]
    kl_controller: KLController
    kl_target: Annotated[float, Positive]
    kl_horizon: Annotated[int, AtLeastOne]

    def needs(self) -> Needs:
        return replace(super().needs(), old_logprobs=True)

    def initial_state(self) -> State:
        return {**super().initial_state(), "kl_coef": self.kl_coef}

    def token_rewards(self, rollout: Rollout, scores: Tensor, state: State) -> Tensor:
        """Return the token rewards [N, T]: −kl_coef · k1_t on true tokens, plus the scaled score on the last one."""
        penalty = state["kl_coef"] * k1(rollout.sampler_logprobs, require(rollout.ref_logprobs, "ref_logprobs"))
        return super().token_rewards(rollout, scores, state) - penalty * rollout.mask

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Return the base class's batch and a state that holds the KL coefficient for the next iteration."""
        batch, new_state = super().prepare(rollout, state)
        batch = batch.replace(metrics={**batch.metrics, "ppo/kl_coef": state["kl_coef"]})
        if self.kl_controller is KLController.adaptive:
            init_logprobs = require(rollout.init_logprobs, "init_logprobs")
            kl = float(sequence_kl(rollout.sampler_logprobs, init_logprobs, rollout.mask))
            new_state["kl_coef"] = adapt_kl_coef(
                state["kl_coef"], kl, self.kl_target, n=len(rollout.mask), horizon=self.kl_horizon
            )
        return batch, new_state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        old_logprobs = require(batch.old_logprobs, "old_logprobs")
        arguments = (output.logprobs, old_logprobs, batch.advantages, self.clip_range)
        policy = LossTerm(name="policy", values=ppo_loss(*arguments), mask=TOKEN_MASK, weight=1.0)
        clipped = Metric(ppo_clip_mask(*arguments).detach(), mask=TOKEN_MASK)
        return Loss([policy, *self.critic_terms(batch, output)], {"policy/clip_fraction": clipped})
