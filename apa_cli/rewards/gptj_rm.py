"""reward=gptj_rm: a GPT-J body with a linear head, kept as one file of weights (Dahoas/gptj-rm-static)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from apa_cli.rewards.base import Placement, Reward, Score
from apa_cli.settings import DType
from apa_cli.types import AtLeastOne, Range


@dataclass(frozen=True)
class GPTJReward(Reward):
    """The score is the head's output at the first end-of-text token after prompt + response."""

    path: str
    file: str
    tokenizer: str
    architecture: dict[str, Any]
    dtype: DType | None
    microbatch_size: Annotated[int, AtLeastOne]
    max_tokens: Annotated[int, Range(2)]

    def load(self, place: Placement) -> Score:
        from apa_cli.models.gptj_rm import load_gptj_rm, score_texts_at_end

        kind = self.dtype.value if self.dtype else place.dtype
        model, tokenizer = load_gptj_rm(self.path, self.file, self.tokenizer, self.architecture, self.max_tokens, kind)
        model = place.put(model)

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            pairs = list(zip(prompts, responses, strict=True))
            return score_texts_at_end(model, tokenizer, pairs, self.microbatch_size, self.max_tokens, place.device)

        return score
