"""reward=vader: sentiment of the response by the VADER lexicon, an example of a reward function."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from apa_cli.errors import UserError


@lru_cache(maxsize=1)
def _load_analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("reward=vader: the package vaderSentiment is missing; pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def compound(prompts: list[str], responses: list[str]) -> list[float]:
    """Return VADER's compound score of each response, from −1 (negative) to 1 (positive)."""
    return [_load_analyzer().polarity_scores(response)["compound"] for response in responses]
