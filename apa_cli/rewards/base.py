"""The contract of a reward."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from apa_cli.types import UserError

Score = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]
"""(prompts, responses, the data set's other columns, one dict per prompt) → one score per response."""


class Reward(ABC):
    """A reward is a frozen dataclass of its settings that loads into a function of texts."""

    @property
    def lacks_model(self) -> bool:
        """Whether the reward stage must train a model first, which `with_model` then takes; default: no."""
        return False

    def with_model(self, path: str) -> Reward:
        """The same reward on the model in a folder."""
        raise TypeError(f"{type(self).__name__} takes no model")

    @abstractmethod
    def load(self, device: str, dtype: str) -> Score:
        """Whatever is needed is loaded once; `device` and `dtype` ("float32", "bfloat16") are for models."""


def checked(score: Score) -> Score:
    """The same reward, its result checked: one finite number per response, else UserError naming which."""

    def with_check(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
        result = score(prompts, responses, columns)
        try:
            scores = [float(value) for value in result]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward: expected one number per response, got {type(result).__name__} ({error})"
            ) from error
        if len(scores) != len(responses):
            raise UserError(f"reward: {len(responses)} responses were given, {len(scores)} scores came back")
        for i, value in enumerate(scores):
            if not math.isfinite(value):
                raise UserError(f"reward: the score of response {i} is {value}: {responses[i][:80]!r}")
        return scores

    return with_check
