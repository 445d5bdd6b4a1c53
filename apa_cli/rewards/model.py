"""reward=model: a sequence-classification model with its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement, Reward, ScoreFunction
from apa_cli.settings import DType
from apa_cli.types import AtLeastOne


@dataclass(frozen=True)
class ModelReward(Reward):
    """`scale` · one output of a sequence-classification model on prompt + response.

    `path` is a model's folder or hub id, or a LoRA adapter's, whose base model then scores with the adapter merged in;
    None: the reward stage trains a model from the data set's pairs. `output` is the output's number or label. With
    `centered`, the mean score in the model's config.json is subtracted before scaling.
    """

    path: str | None
    output: int | str
    scale: float
    centered: bool
    dtype: DType | None
    microbatch_size: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, AtLeastOne]

    @property
    def needs_trained_model(self) -> bool:
        return self.path is None

    def use_trained_model(self, path: str) -> ModelReward:
        return replace(self, path=path)

    def load(self, placement: Placement) -> ScoreFunction:
        from apa_cli.models.reward_model import (
            compute_max_text_tokens,
            find_output_index,
            load_reward_model,
            read_score_mean,
            score_texts,
        )

        if self.path is None:
            raise UserError("reward.path: no model; the reward stage trains one first")
        path = self.path
        model, tokenizer = load_reward_model(path, self.dtype.value if self.dtype else placement.dtype)
        output = find_output_index(model, self.output, path)
        max_tokens = compute_max_text_tokens(model, tokenizer, self.max_tokens)
        mean = read_score_mean(model, path) if self.centered else 0.0
        model = placement.place_model(model)

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            pairs = list(zip(prompts, responses, strict=True))
            values = score_texts(model, tokenizer, pairs, self.microbatch_size, max_tokens, placement.device, output)
            return [self.scale * (value - mean) for value in values]

        return score
