"""reward=model: a sequence-classification model with its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from apa_cli.rewards.base import Placement, Reward, Score
from apa_cli.settings import DType
from apa_cli.types import AtLeastOne


@dataclass(frozen=True)
class ModelReward(Reward):
    """The score is `scale` · one output of a sequence-classification model on prompt + response.

    A path of None stands for the model that the reward stage trains from the data set's pairs; a LoRA adapter's
    folder or hub id stands for its base model with the adapter merged in. `output` is a number or a label. With
    `centered` the mean score that the model's config.json holds is subtracted before scaling.
    """

    path: str | None
    output: int | str
    scale: float
    centered: bool
    dtype: DType | None
    microbatch_size: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, AtLeastOne]

    @property
    def lacks_model(self) -> bool:
        return self.path is None

    def with_model(self, path: str) -> ModelReward:
        return replace(self, path=path)

    def load(self, place: Placement) -> Score:
        from apa_cli.models.reward_model import (
            load_reward_model,
            longest_text,
            output_number,
            score_mean,
            score_texts,
        )

        model, tokenizer = load_reward_model(self.path, self.dtype.value if self.dtype else place.dtype)
        output = output_number(model, self.output, self.path)
        longest = longest_text(model, tokenizer, self.max_tokens)
        mean = score_mean(model, self.path) if self.centered else 0.0
        model = place.put(model)

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            pairs = list(zip(prompts, responses, strict=True))
            values = score_texts(model, tokenizer, pairs, self.microbatch_size, longest, place.device, output)
            return [self.scale * (value - mean) for value in values]

        return score
