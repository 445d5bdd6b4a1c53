"""reward=vader: sentiment of the reply by the VADER lexicon, the example of a reward function."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from apa_cli.errors import UserError


@lru_cache(maxsize=1)
def _analyzer() -> Any:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UserError("reward=vader needs the package vaderSentiment: pip install vaderSentiment") from error
    return SentimentIntensityAnalyzer()


def compound(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound score of each response, from −1 (negative) to 1 (positive)."""
    return [_analyzer().polarity_scores(response)["compound"] for response in responses]
