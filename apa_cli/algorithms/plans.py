"""The contract of a plan, which says who samples the responses of an iteration and which tokens train whom."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from apa_cli.algorithms.base import POLICY_MASK
from apa_cli.datasets.base import shuffle_rows
from apa_cli.types import Example, Needs, Rollout, RolloutPlan, State

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class Plan(ABC):
    """A plan: a frozen dataclass whose fields are its settings, chosen apart from the algorithm."""

    name: ClassVar[str]
    """Name by which an algorithm lists the plans on which it can train."""

    def examples(self, examples: list[Example]) -> list[Example]:
        """Return the rows to train on, from those of the data set; default: the same."""
        return examples

    def rows(self, step: int, size: int, count: int, seed: int) -> list[int]:
        """Return the rows, of `size`, whose prompts are those of iteration `step`; default: the next `count` of endless
        shuffled epochs.
        """
        return shuffle_rows((step - 1) * count, count, size, seed)

    def needs(self, needs: Needs) -> Needs:
        """Return what algorithm and plan need together, from the algorithm's `needs`; default: the same."""
        return needs

    @abstractmethod
    def rollout(self, step: int, rng: np.random.Generator, state: State) -> tuple[RolloutPlan, ...]:
        """Return the rollout plans of iteration `step`, counted from 1; each is carried out for every prompt.

        `rng` is keyed by the run's seed and the iteration; `state` is the algorithm's.
        """

    @abstractmethod
    def masks(self, rollout: Rollout) -> Mapping[str, Tensor]:
        """Return the masks [N, T] of the policy's loss terms, "policy", and of critics', "critic/NAME".

        A critic without a mask of its own has the policy's. `rollout.iteration` is the number of the iteration.
        """


@dataclass(frozen=True)
class Online(Plan):
    """The policy samples every response and trains on all of its tokens."""

    name = "online"

    def rollout(self, step: int, rng: np.random.Generator, state: State) -> tuple[RolloutPlan, ...]:
        return (RolloutPlan(),)

    def masks(self, rollout: Rollout) -> Mapping[str, Tensor]:
        return {POLICY_MASK: rollout.mask}
