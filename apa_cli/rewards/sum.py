"""reward=sum: a weighted sum of other rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from apa_cli.errors import ConfigError
from apa_cli.rewards.base import Placement, Reward, Score, Scores
from apa_cli.settings import RewardSpecs


@dataclass(frozen=True)
class SumReward(Reward):
    """Σ weight · score over `parts`, which the configuration gives as specs and its check makes `Part`s of.

    Each part's own score, unweighted, goes with it under the part's name; a part of a part is NAME/NAME.
    """

    parts: Annotated[list[Any], RewardSpecs]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("reward=sum: parts needs at least one reward")

    @property
    def lacks_model(self) -> bool:
        return any(part.reward.lacks_model for part in self.parts)

    def with_model(self, path: str) -> SumReward:
        return replace(self, parts=[part.with_model(path) for part in self.parts])

    def load(self, place: Placement) -> Score:
        loaded = [(part, part.load(place)) for part in self.parts]

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
            total, parts = [0.0] * len(responses), {}
            for part, scored in loaded:
                scores = scored(prompts, responses, columns)
                total = [value + part.weight * own for value, own in zip(total, scores.values, strict=True)]
                parts[part.name] = scores.values
                parts |= {f"{part.name}/{name}": values for name, values in scores.parts.items()}
            return Scores(total, parts)

        return score
