"""reward=ensemble: several reward models of one kind, their scores reduced to one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from apa_cli.errors import ConfigError
from apa_cli.rewards.base import (
    ModelScore,
    Placement,
    Reward,
    ScoreFunction,
    Scores,
    TokenLimit,
    add_score_check,
    join_inputs,
)
from apa_cli.rewards.model import ModelReward
from apa_cli.settings import DType, RewardFormat
from apa_cli.types import AtLeastOne, NonNegative


class Reduction(Enum):
    """Reduction of the models' scores to one: mean, minimum, or a lower bound (see `EnsembleReward`)."""

    mean = "mean"
    min = "min"
    lower = "lower"


@dataclass(frozen=True)
class EnsembleReward(Reward):
    """Reward models that each score as in reward=model; the score of model N, counted from 1, is the part `model_N`.

    The reduction `lower` is a lower bound: the mean minus `deviations` population standard deviations over the models.
    """

    paths: list[str]
    reduce: Reduction
    deviations: Annotated[float, NonNegative]
    output: int | str
    scale: float
    centered: bool
    dtype: DType | None
    microbatch_size: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, TokenLimit]
    format: RewardFormat

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError("reward=ensemble: paths needs at least one model")

    def load(self, placement: Placement) -> ScoreFunction:
        options = (
            self.output, self.scale, self.centered, self.dtype, self.microbatch_size, self.max_tokens, self.format
        )  # fmt: skip
        models = [add_score_check(ModelReward(path, *options).load(placement)) for path in self.paths]

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
            rows = [model(prompts, responses, columns).values for model in models]
            values = [self.reduce_scores(scores) for scores in zip(*rows, strict=True)]
            return Scores(values, {f"model_{number}": row for number, row in enumerate(rows, 1)})

        return ModelScore(score, join_inputs({f"model_{number}": model for number, model in enumerate(models, 1)}))

    def reduce_scores(self, scores: tuple[float, ...]) -> float:
        """Return one score from all models' scores of the same text."""
        if self.reduce is Reduction.min:
            return min(scores)
        mean = math.fsum(scores) / len(scores)
        if self.reduce is Reduction.mean:
            return mean
        variance = math.fsum((score - mean) ** 2 for score in scores) / len(scores)
        return mean - self.deviations * math.sqrt(variance)
