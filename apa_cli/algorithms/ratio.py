"""Base of RLOO, GRPO and REINFORCE++, and the reductions of their losses over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Annotated, ClassVar

from apa_cli.algorithms.base import POLICY_MASK, ROW_MASK, ScoreScalingAlgorithm
from apa_cli.kl import k1
from apa_cli.tensor_ops import masked_row_mean, masked_row_sum
from apa_cli.types import (
    OLD,
    REFERENCE,
    RESPONSE,
    SAMPLER,
    Batch,
    LossTerm,
    Needs,
    NonNegative,
    Range,
    Rollout,
)

if TYPE_CHECKING:
    from torch import Tensor


class LossReduction(Enum):
    """Reduction of a loss over tokens.

    sequence: mean over each response's tokens, then over responses (GRPO). token: mean over all tokens (DAPO).
    constant: sum over each response's tokens, divided by max_new_tokens, then mean over responses (Dr. GRPO).
    """

    sequence = "sequence"
    token = "token"
    constant = "constant"


class ImportanceLevel(Enum):
    """Ratio of a token: its own, or its response's, exp(mean_t(ℓ_θ − ℓ_old)), for every token (GSPO)."""

    token = "token"
    sequence = "sequence"


@dataclass(frozen=True)
class RatioAlgorithm(ScoreScalingAlgorithm):
    """Base of the algorithms with PPO's clipped ratio and no critic; λ is kl_coef, the price of one nat of KL."""

    lambda_meaning = "price of KL"

    kl_coef: Annotated[float, NonNegative]
    clip_range: Annotated[float, Range(0, 1, open_low=True, open_high=True)]
    entropy_coef: Annotated[float, NonNegative]

    samples_per_prompt: ClassVar[int]
    """Responses to each prompt unless the run says otherwise."""
    least_samples: ClassVar[int] = 2

    def needs(self) -> Needs:
        return Needs(
            passes={RESPONSE: (REFERENCE, OLD) if self.kl_coef else (OLD,)},
            entropy=self.entropy_coef > 0,
            samples_per_prompt=self.samples_per_prompt,
            least_samples=self.least_samples,
        )

    def price_kl(self, rollout: Rollout) -> Tensor:
        """Return kl_coef · k1_t [N, T] on the tokens that the present policy sampled, 0 elsewhere."""
        sampler = rollout.get_logprobs(SAMPLER)
        reference = rollout.get_logprobs(REFERENCE) if self.kl_coef else sampler
        return (self.kl_coef * k1(sampler, reference)).where(rollout.on_policy, sampler.new_zeros(()))

    def make_batch(self, rollout: Rollout, advantages: Tensor, metrics: Mapping[str, float]) -> Batch:
        """Return the batch with these advantages [N, T] and the mask of rows."""
        masks = {**rollout.masks, ROW_MASK: rollout.masks[POLICY_MASK].any(-1)}
        return Batch.from_rollout(rollout, masks=masks, advantages=advantages, metrics=metrics)


def reduce_term(term: LossTerm, batch: Batch, reduction: LossReduction, max_new_tokens: int) -> LossTerm:
    """Return a term with a value per policy token as the term that the trainer's mean reduces by `reduction`."""
    if reduction is LossReduction.token:
        return term
    if reduction is LossReduction.sequence:
        rows = masked_row_mean(term.values, batch.masks[POLICY_MASK])
    else:
        rows = masked_row_sum(term.values, batch.masks[POLICY_MASK]) / max_new_tokens
    return LossTerm(term.name, rows, ROW_MASK, term.weight)
