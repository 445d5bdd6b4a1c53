"""reward=sum: a weighted sum of other rewards."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from apa_cli.errors import ConfigError
from apa_cli.rewards.base import ModelScore, Placement, Reward, ScoreFunction, Scores, join_inputs
from apa_cli.settings import RewardSpecs


@dataclass(frozen=True)
class SumReward(Reward):
    """The sum over `parts` of weight · score.

    The configuration holds a spec for each part, from which `config.build` builds a `NamedReward`. Each part's
    unweighted scores are returned with the sum, under the part's name; a part of a part is named NAME/NAME.
    The parts' token scores are dropped.
    """

    parts: Annotated[list[Any], RewardSpecs]

    def __post_init__(self) -> None:
        if not self.parts:
            raise ConfigError("reward=sum: parts needs at least one reward")

    @property
    def needs_trained_model(self) -> bool:
        return any(part.reward.needs_trained_model for part in self.parts)

    def use_trained_model(self, path: str) -> SumReward:
        return replace(self, parts=[part.use_trained_model(path) for part in self.parts])

    def load(self, placement: Placement) -> ScoreFunction:
        functions = [part.load(placement) for part in self.parts]

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
            total, parts = [0.0] * len(responses), {}
            for part, function in zip(self.parts, functions, strict=True):
                scores = function(prompts, responses, columns)
                total = [
                    value + part.weight * part_score for value, part_score in zip(total, scores.values, strict=True)
                ]
                parts[part.name] = scores.values
                parts |= {f"{part.name}/{name}": values for name, values in scores.parts.items()}
            return Scores(total, parts)

        named = {part.name: function for part, function in zip(self.parts, functions, strict=True)}
        return ModelScore(score, join_inputs(named))
