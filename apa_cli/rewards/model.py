"""reward=model: a sequence-classification model with its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from apa_cli.rewards.base import Reward, Score
from apa_cli.types import AtLeastOne, NonNegative, UserError


@dataclass(frozen=True)
class ModelReward(Reward):
    """The score is one output of a sequence-classification model on prompt + response.

    A path of None stands for the model that the reward stage trains from the data set's pairs.
    """

    path: str | None
    output: Annotated[int, NonNegative]
    microbatch: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, AtLeastOne]

    @property
    def lacks_model(self) -> bool:
        return self.path is None

    def with_model(self, path: str) -> ModelReward:
        return replace(self, path=path)

    def load(self, device: str, dtype: str) -> Score:
        from apa_cli.models.reward_model import load_reward_model, score_texts

        model, tokenizer = load_reward_model(self.path, device, dtype)
        if self.output >= model.config.num_labels:
            raise UserError(f"reward.output: {self.path} has {model.config.num_labels} outputs, counted from 0")

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            pairs = list(zip(prompts, responses, strict=True))
            return score_texts(model, tokenizer, pairs, self.microbatch, self.max_tokens, self.output)

        return score
