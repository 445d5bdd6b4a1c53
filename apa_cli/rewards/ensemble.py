"""reward=ensemble: several reward models of one kind, their scores reduced to one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from apa_cli.errors import ConfigError
from apa_cli.rewards.base import Placement, Reward, Score, Scores
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import DType
from apa_cli.types import AtLeastOne, NonNegative


class Reduce(Enum):
    mean = "mean"
    min = "min"
    lower = "lower"


@dataclass(frozen=True)
class EnsembleReward(Reward):
    """Each model scores as in reward=model; model N's own score is the part `model_N`, counted from 1.

    `lower` is the mean less `deviations` · the population deviation over the models.
    """

    paths: list[str]
    reduce: Reduce
    deviations: Annotated[float, NonNegative]
    output: int | str
    scale: float
    centered: bool
    dtype: DType | None
    microbatch_size: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, AtLeastOne]

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("reward=ensemble: paths needs at least one model")

    def load(self, place: Placement) -> Score:
        shared = (self.output, self.scale, self.centered, self.dtype, self.microbatch_size, self.max_tokens)
        models = [ModelReward(path, *shared).load(place) for path in self.paths]

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
            rows = [model(prompts, responses, columns) for model in models]
            values = [self.reduced(scores) for scores in zip(*rows, strict=True)]
            return Scores(values, {f"model_{number}": row for number, row in enumerate(rows, 1)})

        return score

    def reduced(self, scores: tuple[float, ...]) -> float:
        """One score from those of all models on the same text."""
        if self.reduce is Reduce.min:
            return min(scores)
        mean = math.fsum(scores) / len(scores)
        if self.reduce is Reduce.mean:
            return mean
        variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
        return mean - self.deviations * math.sqrt(variance)
