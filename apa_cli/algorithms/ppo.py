"""Proximal Policy Optimization (1707.06347) with a KL penalty in the token rewards (1909.08593)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import POLICY_MASK, ActorCritic, entropy_terms
from apa_cli.kl import adapt_kl_coef, count_on_policy_sequences, k1, measure_sequence_kl
from apa_cli.losses import ppo_clip_mask, ppo_loss
from apa_cli.types import (
    INIT,
    OLD,
    REFERENCE,
    RESPONSE,
    SAMPLER,
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
    entropy_coef: Annotated[float, NonNegative]

    def __post_init__(self) -> None:
        if self.kl_controller is KLController.adaptive and not self.kl_coef:
            raise ValueError("kl_controller adaptive multiplies kl_coef, and 0 stays 0; give lambda above 0")

    def idle_fields(self) -> Mapping[str, str]:
        if self.kl_controller is KLController.adaptive:
            return super().idle_fields()
        return {**super().idle_fields(), **dict.fromkeys(("kl_target", "kl_horizon"), "kl_controller=fixed")}

    def needs(self) -> Needs:
        needs = replace(super().needs(), entropy=self.entropy_coef > 0)
        if self.kl_controller is KLController.adaptive:
            needs = replace(needs, passes={RESPONSE: (*needs.passes[RESPONSE], INIT)})
        return needs

    @property
    def passes(self) -> tuple[str, ...]:
        return (REFERENCE, OLD) if self.kl_coef else (OLD,)

    def initial_state(self) -> State:
        return {**super().initial_state(), "kl_coef": self.kl_coef}

    def token_rewards(self, rollout: Rollout, scores: Tensor, state: State) -> Tensor:
        """Return the token rewards [N, T]: −kl_coef · k1_t on true tokens, plus the scaled score on the last one.

        The log-probs of tokens that the present policy did not sample are those of π_old's training forward pass.
        """
        rewards = super().token_rewards(rollout, scores, state)
        if not state["kl_coef"]:
            return rewards
        logprobs = rollout.get_logprobs(SAMPLER).where(rollout.on_policy, rollout.get_logprobs(OLD))
        return rewards - state["kl_coef"] * k1(logprobs, rollout.get_logprobs(REFERENCE)) * rollout.mask

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Return the base class's batch and a state that holds the KL coefficient for the next iteration."""
        batch, new_state = super().prepare(rollout, state)
        batch = batch.replace(metrics={**batch.metrics, "ppo/kl_coef": state["kl_coef"]})
        if self.kl_controller is KLController.adaptive:
            kl, n = measure_sequence_kl(rollout, INIT), count_on_policy_sequences(rollout)
            if kl is not None:
                new_state["kl_coef"] = adapt_kl_coef(state["kl_coef"], kl, self.kl_target, n, self.kl_horizon)
        return batch, new_state

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        advantages = require(batch.advantages, "advantages")
        arguments = (output.logprobs - batch.get_logprobs(OLD), advantages, self.clip_range)
        policy = LossTerm(name="policy", values=ppo_loss(*arguments), mask=POLICY_MASK, weight=1.0)
        clipped = Metric(ppo_clip_mask(*arguments).detach(), mask=POLICY_MASK)
        terms = [policy, *self.critic_terms(batch, output), *entropy_terms(output, self.entropy_coef)]
        return Loss(terms, {"policy/clip_fraction": clipped})
