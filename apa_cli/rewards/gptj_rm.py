"""reward=gptj_rm: a GPT-J body with a linear head, kept as one file of weights (Dahoas/gptj-rm-static)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from apa_cli.rewards.base import ModelScore, Placement, Reward, ScoreFunction
from apa_cli.settings import DType
from apa_cli.types import AtLeastOne, Range


@dataclass(frozen=True)
class GPTJReward(Reward):
    """The output of the linear head at the first end-of-text token after prompt + response."""

    path: str
    file: str
    tokenizer: str
    architecture: dict[str, Any]
    dtype: DType | None
    microbatch_size: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, Range(2)]

    def load(self, placement: Placement) -> ScoreFunction:
        from apa_cli.models.gptj_rm import encode_with_eos, load_gptj_rm, score_texts_at_eos
        from apa_cli.models.tokenization import show_tokens

        dtype = self.dtype.value if self.dtype else placement.dtype
        model, tokenizer = load_gptj_rm(self.path, self.file, self.tokenizer, self.architecture, self.max_tokens, dtype)
        model = placement.place_model(model)

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            pairs = list(zip(prompts, responses, strict=True))
            return score_texts_at_eos(model, tokenizer, pairs, self.microbatch_size, self.max_tokens, placement.device)

        def show_input(prompt: str, response: str, row: dict[str, Any]) -> dict[str, str]:
            return {"": show_tokens(tokenizer, encode_with_eos(tokenizer, prompt, response, self.max_tokens))}

        return ModelScore(score, show_input)
