"""Proximal Policy Optimization (1707.06347) with a KL penalty in the token rewards (1909.08593)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import TOKENS, ActorCritic
from apa_cli.kl import adapted_coefficient, k1, sequence_kl
from apa_cli.losses import ppo_clipped, ppo_loss
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
)

if TYPE_CHECKING:
    from torch import Tensor


class Controller(Enum):
    """Whether kl_coef stays, or is adapted to hold kl/sequence near kl_target."""

    fixed = "fixed"
    adaptive = "adaptive"


@dataclass(frozen=True)
class PPO(ActorCritic):
    """Clipped policy gradient on score − kl_coef · KL; `lambda` is the price of a nat of KL."""

    kl_coef: Annotated[float, NonNegative]
    clip_range: Annotated[float, Range(0, 1, open_low=True, open_high=True)]
    kl_controller: Controller
    kl_target: Annotated[float, Positive]
    kl_horizon: Annotated[int, AtLeastOne]

    def needs(self) -> Needs:
        return replace(super().needs(), old_logprobs=True)

    def initial_state(self) -> State:
        return {**super().initial_state(), "kl_coef": self.kl_coef}

    def token_rewards(self, rollout: Rollout, scores: Tensor, state: State) -> Tensor:
        """[N, T]: −kl_coef · k1_t on every true token, plus the scaled score on the last one."""
        penalty = state["kl_coef"] * k1(rollout.sampler_logprobs, rollout.ref_logprobs)
        return super().token_rewards(rollout, scores, state) - penalty * rollout.mask

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """As for the others; the state it returns holds the coefficient for the next iteration."""
        batch, new_state = super().prepare(rollout, state)
        batch = batch.with_(metrics={**batch.metrics, "ppo/kl_coef": state["kl_coef"]})
        if self.kl_controller is Controller.adaptive:
            kl = float(sequence_kl(rollout.sampler_logprobs, rollout.init_logprobs, rollout.mask))
            new_state["kl_coef"] = adapted_coefficient(
                state["kl_coef"], kl, self.kl_target, n=len(rollout.mask), horizon=self.kl_horizon
            )
        return batch, new_state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        arguments = (output.logprobs, batch.old_logprobs, batch.advantages, self.clip_range)
        policy = LossTerm(name="policy", values=ppo_loss(*arguments), mask=TOKENS, weight=1.0)
        clipped = Metric(ppo_clipped(*arguments).detach(), mask=TOKENS)
        return Loss([policy, *self.critic_terms(batch, output)], {"policy/clip_fraction": clipped})
