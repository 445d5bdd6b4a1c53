"""Direct Preference Optimization (2305.18290), online on responses that the reward ranks (2402.04792)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from apa_cli.algorithms.pairs import PAIR_MASK, Pairwise, log_ratio_difference
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
        """Return −log σ(margin) [B], and as metrics the margin and its accuracy: 1 if positive, ½ if 0."""
        from torch.nn.functional import logsigmoid  # here, so that algorithms can be checked before torch is loaded

        margin = self.beta * log_ratio_difference(batch, output, REJECTED, REFERENCE)
        accuracy = (1 + margin.detach().sign()) / 2
        metrics = {"dpo/accuracy": Metric(accuracy, PAIR_MASK), "dpo/margin": Metric(margin.detach(), PAIR_MASK)}
        return Loss([LossTerm("policy", -logsigmoid(margin), PAIR_MASK, 1.0)], metrics)
