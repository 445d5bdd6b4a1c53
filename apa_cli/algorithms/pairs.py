"""Pairs of responses to one prompt as one row, and the base of algorithms with a loss per pair."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar

from apa_cli.algorithms.base import Algorithm
from apa_cli.tensor_ops import differ, masked_row_sum
from apa_cli.types import REFERENCE, RESPONSE, Batch, Encode, Needs, PolicyOutput, Rollout, Sequences, State, require

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PAIR_MASK = "pair"
"""Name of the mask [N] of the loss terms per pair."""
SECOND_SCORE = "second_score"
"""Name in `extra` of the score [N] of each pair's second response; `scores` are those of the first."""


@dataclass(frozen=True)
class Pairwise(Algorithm):
    """Base of algorithms with a loss per pair, one row each: its own response and `related[second]`."""

    second: ClassVar[str] = "second"
    """Name of the second response in `related`."""
    better_first: ClassVar[bool] = False
    """True: the response with the higher score is the row's own, and pairs of equal scores give no term."""

    @property
    def passes(self) -> tuple[str, ...]:
        """Log-probs that are computed for both responses."""
        return (REFERENCE,)

    def needs(self) -> Needs:
        passes = {RESPONSE: self.passes, self.second: self.passes}
        return Needs(passes=passes, samples_per_prompt=2, least_samples=2, samples_multiple=2)

    def process_rollout(
        self, rollout: Rollout, state: State, rng: np.random.Generator, encode: Encode
    ) -> tuple[Rollout, State]:
        """Return one row per pair; logged pairs are such rows already."""
        if self.second in rollout.related:
            return rollout, state
        return fold_pairs(rollout, self.second, self.better_first), state

    def prepare(self, rollout: Rollout, state: State) -> tuple[Batch, State]:
        both = rollout.mask.any(-1) & rollout.related[self.second].mask.any(-1)  # a logged row may lack the second
        masks = {PAIR_MASK: both, **rollout.masks}
        return Batch.from_rollout(rollout, masks=masks, responses_per_row=2), state


def fold_pairs(rollout: Rollout, second: str, better_first: bool = False) -> Rollout:
    """Return a rollout of half the rows: samples 2k and 2k + 1 of each prompt, the latter in `related[second]`.

    With `better_first` the two are swapped if the latter has the higher score. Rows come in the order of `groups`; the
    second responses' scores are in `extra`. The mask "pair" is true; with `better_first` it is false for scores that do
    not differ beyond rounding.
    Raise ValueError if a prompt has an odd number of responses.
    """
    if bool((rollout.groups.unique(return_counts=True)[1] % 2).any()):
        raise ValueError("samples_per_prompt: pairs need an even number of responses to each prompt")
    order = rollout.groups.argsort(stable=True)
    first, other = order[0::2], order[1::2]
    scores = require(rollout.scores, "scores")
    counted = rollout.mask.new_ones(len(first))
    if better_first:
        swap, counted = scores[other] > scores[first], differ(scores[other], scores[first])
        first, other = other.where(swap, first), first.where(swap, other)
    rows, others = rollout.select_rows(first), rollout.select_rows(other)
    return rows.replace(
        related={**rows.related, second: Sequences(**{f.name: getattr(others, f.name) for f in fields(Sequences)})},
        extra={**rows.extra, SECOND_SCORE: scores[other]},
        masks={**rows.masks, PAIR_MASK: counted},
        responses_per_row=2,
    )


def log_ratio_difference(batch: Batch, output: PolicyOutput, second: str, base: str) -> Tensor:
    """Return Σ(ℓ_θ − ℓ_base) of the rows' responses less that of the responses `second`, in nats → [B] float32."""
    log_ratio = output.logprobs - batch.get_logprobs(base)
    other = batch.related[second]
    other_log_ratio = output.related[second].logprobs - other.get_logprobs(base)
    return masked_row_sum(log_ratio, batch.mask) - masked_row_sum(other_log_ratio, other.mask)
