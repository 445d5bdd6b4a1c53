"""The contract of an algorithm, and the base of the actor-critic ones: scores → advantages → batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

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
    UnitInterval,
    require,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Algorithm(ABC):
    """An algorithm: a frozen dataclass whose fields are its hyper-parameters and whose methods the trainer calls.

    Every process calls `prepare` with the same whole rollout batch and gets the same result.
    """

    label: ClassVar[str]
    """Name in tables and plots; default: the name of the class."""
    color: ClassVar[str] = "#6b7280"
    """Color in plots, "#rrggbb", readable on white; default: a neutral gray."""
    lambda_meaning: ClassVar[str | None] = None
    """Meaning of λ in a few words, as in "lambda 0.05: price of KL"; None if the algorithm has no λ."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "label" not in cls.__dict__:
            cls.label = cls.__name__

    def needs(self) -> Needs:
        """Return the models and quantities that the trainer must load and compute."""
        return Needs()

    def initial_state(self) -> State:
        """Return the state before the first iteration: plain numbers and tensors, saved in every checkpoint."""
        return {}

    def plan(self, step: int, rng: np.random.Generator) -> RolloutPlan:
        """Return the models that sample the responses of iteration `step`, counted from 1."""
        return RolloutPlan()

    @abstractmethod
    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Compute token rewards, advantages and returns, without gradient; return the batch and the next state."""

    def prepare_minibatch(self, batch: Batch) -> Batch:
        """Return the minibatch of all ranks with the quantities that are computed over it; default: unchanged."""
        return batch

    @abstractmethod
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Return the per-token loss terms and metrics of a microbatch."""


class ScoreScaling(Enum):
    """Divisor of the scores: the standard deviation of all scores so far, that of the batch, or 1."""

    running = "running"
    batch = "batch"
    none = "none"


class Whitening(Enum):
    """Tokens over which advantages are whitened: the rollout batch, each minibatch, or none (no whitening)."""

    rollout = "rollout"
    minibatch = "minibatch"
    none = "none"


class AdvantageEstimator(Enum):
    """Estimator of the advantages: GAE, Monte-Carlo return minus value, or leave-one-out (see `group_mean`)."""

    gae = "gae"
    monte_carlo = "monte_carlo"
    group_mean = "group_mean"


CRITIC = "value"
"""Name of the critic."""
TOKEN_MASK = "tokens"
"""Name of the mask of all loss terms: every token that the policy sampled."""


@dataclass(frozen=True)
class ActorCritic(Algorithm):
    """Base of APA, AWR and PPO; a subclass adds its policy loss, and overrides `token_rewards` to shape the rewards."""

    gamma: Annotated[float, UnitInterval]
    gae_lambda: Annotated[float, UnitInterval]
    score_scaling: ScoreScaling
    score_clip: Annotated[float | None, Positive]
    whitening: Whitening
    advantage_estimator: AdvantageEstimator
    value_coef: Annotated[float, NonNegative]
    value_clip_range: Annotated[float | None, Positive]

    def needs(self) -> Needs:
        if self.advantage_estimator is AdvantageEstimator.group_mean:
            return Needs(critics=(), samples_per_prompt=2)
        return Needs(critics=(CRITIC,))

    def initial_state(self) -> State:
        return {"score_moments": (0.0, 0.0, 0.0)}

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        scores = require(rollout.scores, "scores")
        moments = estimators.update_moments(state["score_moments"], scores)
        token_rewards = self.token_rewards(rollout, self.scale_scores(scores, moments), state)
        advantages, returns = self.estimate_advantages(rollout, token_rewards)
        metrics = {"score/scale": self.score_scale(scores, moments)}
        for name, target in returns.items():
            error = masked_variance(target - rollout.values[name], rollout.mask)
            spread = masked_variance(target, rollout.mask).clamp(min=1e-12)
            metrics[f"{name}/explained_variance"] = 1 - float(error / spread)
        batch = Batch(
            prompt_ids=rollout.prompt_ids,
            prompt_mask=rollout.prompt_mask,
            response_ids=rollout.response_ids,
            mask=rollout.mask,
            masks={TOKEN_MASK: rollout.mask},
            sampler_logprobs=rollout.sampler_logprobs,
            advantages=advantages,
            returns=returns,
            values=dict(rollout.values),
            ref_logprobs=rollout.ref_logprobs,
            old_logprobs=rollout.old_logprobs,
            metrics=metrics,
        )
        if self.whitening is Whitening.rollout:
            batch = self.whiten_advantages(batch)
        return batch, {**state, "score_moments": moments}

    def prepare_minibatch(self, batch: Batch) -> Batch:
        return self.whiten_advantages(batch) if self.whitening is Whitening.minibatch else batch

    def whiten_advantages(self, batch: Batch) -> Batch:
        """Return the batch with advantages of mean 0 and variance 1 over its true tokens."""
        return batch.replace(advantages=whiten(batch.advantages, batch.mask))

    def score_scale(self, scores: Tensor, moments: estimators.Moments) -> float:
        """Return the divisor of the scores: a population standard deviation, at least 1e-8, or 1."""
        if self.score_scaling is ScoreScaling.running:
            count, _, squares = moments
            return max((squares / count) ** 0.5, 1e-8)
        if self.score_scaling is ScoreScaling.batch:
            return max(float(scores.double().std(correction=0)), 1e-8)
        return 1.0

    def scale_scores(self, scores: Tensor, moments: estimators.Moments) -> Tensor:
        """Return scores [N] in the unit of advantages and λ: divided, not centered, then clipped to ±score_clip."""
        scores = scores / self.score_scale(scores, moments)
        return scores if self.score_clip is None else scores.clamp(-self.score_clip, self.score_clip)

    def token_rewards(self, rollout: Rollout, scores: Tensor, state: State) -> Tensor:
        """Return the token rewards [N, T]: the scaled score on the last true token."""
        return estimators.place_scores_at_end(scores, rollout.mask)

    def estimate_advantages(self, rollout: Rollout, token_rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return advantages [N, T] and, by critic, targets [N, T]."""
        if self.advantage_estimator is AdvantageEstimator.group_mean:
            return estimators.group_mean(token_rewards, rollout.groups, rollout.mask), {}
        gae_lambda = 1.0 if self.advantage_estimator is AdvantageEstimator.monte_carlo else self.gae_lambda
        advantages, returns = estimators.gae(
            token_rewards, rollout.values[CRITIC], rollout.mask, self.gamma, gae_lambda
        )
        return advantages, {CRITIC: returns}

    def critic_terms(self, batch: Batch, output: PolicyOutput) -> list[LossTerm]:
        """Return the loss term of each critic, weighted by `value_coef`."""
        return [
            LossTerm(
                name=name,
                values=critic_loss(output.values[name], target, batch.values[name], self.value_clip_range),
                mask=TOKEN_MASK,
                weight=self.value_coef,
            )
            for name, target in batch.returns.items()
        ]
