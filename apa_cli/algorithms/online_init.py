"""The online plan with responses of π_init beside the policy's, as baselines of a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

from apa_cli.algorithms.base import POLICY_MASK
from apa_cli.algorithms.plans import Plan
from apa_cli.types import INIT, AtLeastOne, Needs, Rollout, RolloutPlan, State

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class OnlineInit(Plan):
    """The policy samples and trains as under `Online`; π_init samples further responses to each prompt, once."""

    name = "online_init"

    init_samples: Annotated[int, AtLeastOne]

    def needs(self, needs: Needs) -> Needs:
        return replace(needs, samplers=(*needs.samplers, INIT))

    def rollout(self, step: int, rng: np.random.Generator, state: State) -> tuple[RolloutPlan, ...]:
        return RolloutPlan(), RolloutPlan(roll_in=INIT, samples=self.init_samples, once_per_prompt=True)

    def masks(self, rollout: Rollout) -> Mapping[str, Tensor]:
        """Return the policy's tokens: the responses of π_init train nobody."""
        return {POLICY_MASK: rollout.on_policy}
