"""The contract of an algorithm, and the bases of those that scale scores and of those that have a critic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from apa_cli import advantages as estimators
from apa_cli.losses import critic_loss
from apa_cli.tensor_ops import choose_divisor, whiten
from apa_cli.types import (
    REFERENCE,
    RESPONSE,
    Batch,
    Critic,
    Encode,
    Example,
    Loss,
    LossTerm,
    Needs,
    NonNegative,
    PolicyOutput,
    Positive,
    Rollout,
    State,
    UnitInterval,
    critic_mask,
    require,
)

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

POLICY_MASK = "policy"
"""Name of the mask of the policy's loss terms, which the plan gives: online every token of a response."""
ROW_MASK = "row"
"""Name of the mask [N] of loss terms per row: the rows with a token that trains the policy."""
WHITENING_MASK = "whitening"
"""Name of the mask of the tokens over which advantages are whitened, if a plan gives another than the policy's."""


class Algorithm(ABC):
    """An algorithm: a frozen dataclass whose fields are its hyper-parameters and whose methods the trainer calls.

    Every process calls `process_rollout` and `prepare` with the same whole rollout batch and gets the same result; an
    algorithm never communicates.
    """

    label: ClassVar[str]
    """Name in tables and plots; default: the name of the class."""
    color: ClassVar[str] = "#6b7280"
    """Color in plots, "#rrggbb", readable on white; default: a neutral gray."""
    lambda_meaning: ClassVar[str | None] = None
    """Meaning of λ in a few words, as in "lambda 0.05: price of KL"; None if the algorithm has no λ."""
    plans: ClassVar[tuple[str, ...]] = ("online",)
    """Names of the plans (`Plan.name`) on which the algorithm can train."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "label" not in cls.__dict__:
            cls.label = cls.__name__

    def needs(self) -> Needs:
        """Return the models and quantities that the trainer must load and compute; default: none."""
        return Needs()

    def idle_fields(self) -> Mapping[str, str]:
        """Return the fields without effect beside the values of others, each with the "field=value" that is the reason;
        default: none.
        """
        return {}

    def initial_state(self) -> State:
        """Return the state before the first iteration, saved in every checkpoint; see `State`."""
        return {}

    def instruct(self, example: Example, step: int | None) -> Example:
        """Return the example whose prompt the policy reads in iteration `step` (None: in evaluation); default: as is.

        Rewards, and π_init in the exact KL, read the prompt of the example as it was.
        """
        return example

    def process_rollout(
        self, rollout: Rollout, state: State, rng: np.random.Generator, encode: Encode
    ) -> tuple[Rollout, State]:
        """Return the rows to train on and the next state; default: all rows.

        Called after scoring, before log-probs and values are computed. It may fold rows into pairs, relabel, filter, or
        sample rows from a pool: the number of rows is free, 0 included. Rows that the present policy did not sample
        must have `on_policy` false. `rng` is keyed by the run's seed and the iteration.
        """
        return rollout, state

    @abstractmethod
    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        """Compute what the loss needs, without gradient; return the batch and the next state.

        Not called for a rollout without rows.
        """

    def prepare_minibatch(self, batch: Batch) -> Batch:
        """Return the minibatch of all ranks with the quantities that are computed over it; default: unchanged."""
        return batch

    @abstractmethod
    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Return the loss terms, a value per token or per row each, and metrics of a microbatch."""

    def adjust_logits(self, logits: Tensor, critic_outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the logits [n, V] of the decoded policy, in sampling and in the exact KL; default: the policy's own.

        `critic_outputs` are those of the critics on the policy's trunk, "NAME/target" included: [n] of a state critic,
        [n, V] of an action critic. Overridden by algorithms that decode with their critics.
        """
        return logits


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


@dataclass(frozen=True)
class ScoreScalingAlgorithm(Algorithm):
    """Base of algorithms that divide scores by a standard deviation; its state holds the moments of all scores."""

    score_scaling: ScoreScaling
    score_clip: Annotated[float | None, Positive]

    def initial_state(self) -> State:
        return {"score_moments": (0.0, 0.0, 0.0)}

    def score_scale(self, scores: Tensor, moments: estimators.Moments) -> float:
        """Return the divisor of the scores: a population standard deviation, or 1 without a spread beyond rounding."""
        if self.score_scaling is ScoreScaling.running:
            count, mean, squares = moments
            return choose_divisor((squares / count) ** 0.5, mean)
        if self.score_scaling is ScoreScaling.batch:
            wide = scores.double()
            return choose_divisor(float(wide.std(correction=0)), float(wide.mean()))
        return 1.0

    def scale_scores(self, rollout: Rollout, state: State) -> tuple[Tensor, dict[str, float], State]:
        """Return the scores [N] in the unit of advantages and λ, the metric score/scale, and the next state.

        Scores are divided, not centered, then clipped to ±score_clip.
        """
        scores = require(rollout.scores, "scores")
        moments = estimators.update_moments(state["score_moments"], scores)
        scale = self.score_scale(scores, moments)
        scaled = scores / scale
        scaled = scaled if self.score_clip is None else scaled.clamp(-self.score_clip, self.score_clip)
        return scaled, {"score/scale": scale}, {**state, "score_moments": moments}


CRITIC = "value"
"""Name of the actor-critic algorithms' critic."""


@dataclass(frozen=True)
class ActorCritic(ScoreScalingAlgorithm):
    """Base of APA, AWR and PPO; a subclass adds its policy loss, and overrides `token_rewards` to shape the rewards."""

    gamma: Annotated[float, UnitInterval]
    gae_lambda: Annotated[float, UnitInterval]
    whitening: Whitening
    advantage_estimator: AdvantageEstimator
    value_coef: Annotated[float, NonNegative]
    value_clip_range: Annotated[float | None, Positive]

    @property
    def passes(self) -> tuple[str, ...]:
        """Log-probs that the loss or the token rewards read."""
        return (REFERENCE,)

    def idle_fields(self) -> Mapping[str, str]:
        reason = f"advantage_estimator={self.advantage_estimator.name}"
        if self.advantage_estimator is AdvantageEstimator.group_mean:
            return dict.fromkeys(("gamma", "gae_lambda", "value_coef", "value_clip_range"), reason)
        idle = {"gae_lambda": reason} if self.advantage_estimator is AdvantageEstimator.monte_carlo else {}
        return idle if self.value_coef else {**idle, "value_clip_range": "value_coef=0"}

    def needs(self) -> Needs:
        if self.advantage_estimator is AdvantageEstimator.group_mean:
            return Needs(passes={RESPONSE: self.passes}, samples_per_prompt=2, least_samples=2)
        return Needs(critics=(Critic(CRITIC),), passes={RESPONSE: (*self.passes, CRITIC)})

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        scores, metrics, next_state = self.scale_scores(rollout, state)
        token_rewards = self.token_rewards(rollout, scores, state)
        advantages, returns = self.estimate_advantages(rollout, token_rewards)
        rewards_to_go = estimators.sum_rewards_to_go(token_rewards, rollout.mask, self.gamma)
        masks = dict(rollout.masks)
        for name in returns:
            mask = masks.get(critic_mask(name), masks[POLICY_MASK]) & select_critic_rows(rollout, name)
            masks[critic_mask(name)] = mask
            explained = estimators.explained_variance(rollout.values[name], rewards_to_go, mask)
            if explained is not None:
                metrics[f"{name}/explained_variance"] = explained
        batch = Batch.from_rollout(rollout, masks=masks, advantages=advantages, returns=returns, metrics=metrics)
        if self.whitening is Whitening.rollout:
            batch = self.whiten_advantages(batch)
        return batch, next_state

    def prepare_minibatch(self, batch: Batch) -> Batch:
        return self.whiten_advantages(batch) if self.whitening is Whitening.minibatch else batch

    def whiten_advantages(self, batch: Batch) -> Batch:
        """Return the batch with advantages of mean 0 and variance 1 over the policy's tokens, or the whitening mask."""
        mask = batch.masks.get(WHITENING_MASK, batch.masks[POLICY_MASK])
        return batch.replace(advantages=whiten(require(batch.advantages, "advantages"), mask))

    def token_rewards(self, rollout: Rollout, scores: Tensor, state: State) -> Tensor:
        """Return the token rewards [N, T]: the scaled score on the last true token."""
        return estimators.place_scores_at_end(scores, rollout.mask)

    def estimate_advantages(self, rollout: Rollout, token_rewards: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return advantages [N, T] and, by critic, targets [N, T], of which those of its plans' rows count."""
        if self.advantage_estimator is AdvantageEstimator.group_mean:
            return estimators.group_mean(token_rewards, rollout.groups, rollout.mask), {}
        gae_lambda = 1.0 if self.advantage_estimator is AdvantageEstimator.monte_carlo else self.gae_lambda
        critics = list(dict.fromkeys(plan.critic for plan in rollout.plans))
        values = rollout.values[critics[0]]
        for name in critics[1:]:
            values = rollout.values[name].where(select_critic_rows(rollout, name), values)
        advantages, returns = estimators.gae(token_rewards, values, rollout.mask, self.gamma, gae_lambda)
        return advantages, dict.fromkeys(critics, returns)

    def critic_terms(self, batch: Batch, output: PolicyOutput) -> list[LossTerm]:
        """Return the loss term of each critic, weighted by `value_coef`."""
        return [
            LossTerm(
                name=name,
                values=critic_loss(output.values[name], target, batch.values[name], self.value_clip_range),
                mask=critic_mask(name),
                weight=self.value_coef,
            )
            for name, target in batch.returns.items()
        ]


def select_critic_rows(rollout: Rollout, critic: str) -> Tensor:
    """Return [N, 1] bool, true on the rows whose plan computes advantages from this critic."""
    plans = rollout.plan_index.new_tensor([plan.critic == critic for plan in rollout.plans]).bool()
    return plans[rollout.plan_index].unsqueeze(-1)


def entropy_terms(output: PolicyOutput, coef: float) -> list[LossTerm]:
    """Return the term −coef · entropy over the policy's tokens, none if `coef` is 0; `Needs.entropy` must be true."""
    if not coef:
        return []
    return [LossTerm("entropy", -require(output.entropy, "entropy"), mask=POLICY_MASK, weight=coef)]
