"""The contract of an algorithm, and what the three actor-critic ones share: scores → advantages → batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated

from apa_cli import advantages as estimators
from apa_cli.losses import critic_loss
from apa_cli.tensor_ops import masked_variance, whiten
from apa_cli.types import (
    Batch,
    Loss,
    LossTerm,
    Needs,
    NonNegative,
    PolicyOutput,
    Positive,
    Rollout,
    RolloutPlan,
    State,
    Unit,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Algorithm(ABC):
    """An algorithm is a frozen dataclass: its fields are its hyper-parameters, its methods these.

    Every process calls `prepare` with the same whole rollout batch and gets the same answer.
    """

    def needs(self) -> Needs:
        """What the trainer must load and compute."""
        return Needs()

    def initial_state(self) -> State:
        """What changes over a run: plain numbers and tensors, saved in every checkpoint."""
        return {}

    def plan(self, step: int, rng: np.random.Generator) -> RolloutPlan:
        """Who draws the responses of iteration `step` (counted from 1)."""
        return RolloutPlan()

    @abstractmethod
    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Scores → token rewards, advantages, returns, without gradient; and the state after this iteration."""

    def prepare_minibatch(self, batch: Batch) -> Batch:
        """What is computed over one whole minibatch (all processes) before it is split; default: nothing."""
        return batch

    @abstractmethod
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Per-token loss terms and metrics of the sequences in `batch`, a microbatch."""


class ScoreScaling(Enum):
    """What scores are divided by before anything else: the deviation of all so far, of this batch, or nothing."""

    running = "running"
    batch = "batch"
    none = "none"


class Whitening(Enum):
    """Over which tokens advantages are whitened: the rollout batch, each minibatch, or not at all."""

    rollout = "rollout"
    minibatch = "minibatch"
    none = "none"


class Estimator(Enum):
    """How advantages are estimated."""

    gae = "gae"
    monte_carlo = "monte_carlo"
    group_mean = "group_mean"


CRITIC = "value"
"""Name of the one critic."""
TOKENS = "tokens"
"""Name of the one mask: every token the policy chose."""


@dataclass(frozen=True)
class ActorCritic(Algorithm):
    """What the three algorithms have in common; each adds its policy loss, and its token rewards if it shapes them."""

    gamma: Annotated[float, Unit]
    gae_lambda: Annotated[float, Unit]
    score_scaling: ScoreScaling
    score_clip: Annotated[float | None, Positive]
    whitening: Whitening
    advantage_estimator: Estimator
    value_coef: Annotated[float, NonNegative]
    value_clip_range: Annotated[float | None, Positive]

    def needs(self) -> Needs:
        if self.advantage_estimator is Estimator.group_mean:
            return Needs(critics=(), samples_per_prompt=2)
        return Needs(critics=(CRITIC,))

    def initial_state(self) -> State:
        return {"score_moments": (0.0, 0.0, 0.0)}

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        moments = estimators.updated_moments(state["score_moments"], rollout.scores)
        token_rewards = self.token_rewards(rollout, self.scaled(rollout.scores, moments), state)
        advantages, returns = self.estimate(rollout, token_rewards)
        metrics = {"score/scale": self.scale(rollout.scores, moments)}
        for name, target in returns.items():
            error = masked_variance(target - rollout.values[name], rollout.mask)
            spread = masked_variance(target, rollout.mask).clamp(min=1e-12)
            metrics[f"{name}/explained_variance"] = 1 - float(error / spread)
        batch = Batch(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            response_ids=rollout.response_ids,
            mask=rollout.mask,
            masks={TOKENS: rollout.mask},
            sampler_logprobs=rollout.sampler_logprobs,
            advantages=advantages,
            returns=returns,
            values=dict(rollout.values),
            ref_logprobs=rollout.ref_logprobs,
            old_logprobs=rollout.old_logprobs,
            metrics=metrics,
        )
        if self.whitening is Whitening.rollout:
            batch = self.whitened(batch)
        return batch, {**state, "score_moments": moments}

    def prepare_minibatch(self, batch: Batch) -> Batch:
        return self.whitened(batch) if self.whitening is Whitening.minibatch else batch

    def whitened(self, batch: Batch) -> Batch:
        return batch.with_(advantages=whiten(batch.advantages, batch.mask))

    def scale(self, scores: Tensor, moments: tuple[float, float, float]) -> float:
        """The number scores are divided by: a population deviation, at least 1e-8, or 1."""
        if self.score_scaling is ScoreScaling.running:
            count, _, squares = moments
            return max((squares / count) ** 0.5, 1e-8)
        if self.score_scaling is ScoreScaling.batch:
            return max(float(scores.double().std(correction=0)), 1e-8)
        return 1.0

    def scaled(self, scores: Tensor, moments: tuple[float, float, float]) -> Tensor:
        """Scores [N] in the unit that advantages and λ are in: divided, never centred, then clipped to ±score_clip."""
        scores = scores / self.scale(scores, moments)
        return scores if self.score_clip is None else scores.clamp(-self.score_clip, self.score_clip)

    def token_rewards(self, rollout: Rollout, scores: Tensor, state: State) -> Tensor:
        """[N, T]: the scaled score on the last true token."""
        return estimators.end_scores(scores, rollout.mask)

    def estimate(self, rollout: Rollout, token_rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Advantages [N, T], and each critic's targets [N, T]."""
        if self.advantage_estimator is Estimator.group_mean:
            return estimators.group_mean(token_rewards, rollout.groups, rollout.mask), {}
        gae_lambda = 1.0 if self.advantage_estimator is Estimator.monte_carlo else self.gae_lambda
        advantages, returns = estimators.gae(
            token_rewards, rollout.values[CRITIC], rollout.mask, self.gamma, gae_lambda
        )
        return advantages, {CRITIC: returns}

    def critic_terms(self, batch: Batch, output: PolicyOutput) -> list[LossTerm]:
        return [
            LossTerm(
                name=name,
                values=critic_loss(output.values[name], target, batch.values[name], self.value_clip_range),
                mask=TOKENS,
                weight=self.value_coef,
            )
            for name, target in batch.returns.items()
        ]
