"""reward=model: a sequence-classification model with its own tokenizer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any

from apa_cli.errors import UserError
from apa_cli.rewards.base import ModelScore, Placement, Reward, ScoreFunction, TokenLimit
from apa_cli.settings import DType, RewardFormat
from apa_cli.types import MESSAGES, AtLeastOne


@dataclass(frozen=True)
class ModelReward(Reward):
    """`scale` · one output of a sequence-classification model on prompt + response, in the text of `format`.

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
    max_tokens: Annotated[int, TokenLimit]
    format: RewardFormat

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
            read_stored_format,
            score_rows,
        )
        from apa_cli.models.reward_text import RewardTextEncoder, select_chat_format
        from apa_cli.models.tokenization import show_tokens

        if self.path is None:
            raise UserError("reward.path: no model; the reward stage trains one first")
        path = self.path
        model, tokenizer = load_reward_model(path, self.dtype.value if self.dtype else placement.dtype)
        output = find_output_index(model, self.output, path)
        is_chat = select_chat_format(tokenizer, self.format, read_stored_format(model))
        encoder = RewardTextEncoder(tokenizer, is_chat, compute_max_text_tokens(model, tokenizer, self.max_tokens))
        encoder.check_room("reward.max_tokens")
        mean = read_score_mean(model, path) if self.centered else 0.0
        config, model = model.config, placement.place_model(model)

        def encode(prompt: str, response: str, row: dict[str, Any]) -> list[int]:
            return encoder.encode(prompt, response, row.get(MESSAGES))[0]

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            rows = list(map(encode, prompts, responses, columns))
            values = score_rows(model, config, rows, self.microbatch_size, placement.device, output)
            return [self.scale * (value - mean) for value in values]

        def show_input(prompt: str, response: str, row: dict[str, Any]) -> dict[str, str]:
            return {"": show_tokens(tokenizer, encode(prompt, response, row))}

        return ModelScore(score, show_input)
