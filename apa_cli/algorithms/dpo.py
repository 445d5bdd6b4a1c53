"""Direct Preference Optimization (2305.18290), online on responses that the reward ranks (2402.04792)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.algorithms.pairs import PAIR_MASK, Pairwise, log_ratio_difference
from apa_cli.tensor_ops import drop_rounding, masked_row_sum
from apa_cli.types import REFERENCE, Batch, Loss, LossTerm, Metric, PolicyOutput, Positive

REJECTED = "rejected"
"""Name of the worse response of each pair in `related`."""


@dataclass(frozen=True)
class DPO(Pairwise):
    """Logistic loss on the margin, β times the difference of log π/π_init between better and worse response."""

    label = "DPO"
    color = "#7c3aed"
    lambda_meaning = "pull to the reference"

    beta: Annotated[float, Positive]

    second = REJECTED
    better_first = True

    def loss(self, batch: Batch, output: PolicyOutput) -> Loss:
        """Return −log σ(margin) [B], and as metrics the margin and its accuracy: 1 if positive, ½ if rounding."""
        from torch.nn.functional import logsigmoid  # here, so that algorithms can be checked before torch is loaded

        difference = log_ratio_difference(batch, output, REJECTED, REFERENCE)
        margin, pair = self.beta * difference, (output.logprobs, output.related[REJECTED].logprobs)
        # The rounding of a sum is that of its terms, each of which has at least that of 1.
        masks = (batch.mask, batch.related[REJECTED].mask)
        sizes = [masked_row_sum(x.detach().abs().clamp(min=1), mask) for x, mask in zip(pair, masks, strict=True)]
        accuracy = (1 + drop_rounding(difference.detach(), sizes[0] + sizes[1]).sign()) / 2
        metrics = {"dpo/accuracy": Metric(accuracy, PAIR_MASK), "dpo/margin": Metric(margin.detach(), PAIR_MASK)}
        return Loss([LossTerm("policy", -logsigmoid(margin), PAIR_MASK, 1.0)], metrics)
