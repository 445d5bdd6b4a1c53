"""Encoding of texts and tokens as off-policy rows: an algorithm's own rows, and texts of the data set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from apa_cli.errors import UserError
from apa_cli.models.prompting import PromptFormat
from apa_cli.rollout.engine import pad_left, pad_right
from apa_cli.settings import SamplingSettings
from apa_cli.types import Example, Sequences


@dataclass(frozen=True)
class RowEncoder:
    """Encoder of an algorithm's own rows, see `types.Encode`."""

    prompt_format: PromptFormat
    settings: SamplingSettings
    examples: Sequence[Example]

    def __call__(self, examples: list[Example], responses: list[list[int] | str]) -> Sequences:
        pad = self.prompt_format.tokenizer.pad_token_id
        longest_prompt, longest = self.settings.max_prompt_tokens, self.settings.max_new_tokens
        prompts = [self.prompt_format.encode_prompt(example, 0, 0, longest_prompt)[0] for example in examples]
        rows = [
            self.prompt_format.encode_response(example, row, longest) if isinstance(row, str) else row
            for example, row in zip(examples, responses, strict=True)
        ]
        if max(map(len, rows), default=0) > longest:
            raise UserError(
                f"algo: encode() got a response of {max(map(len, rows))} tokens, more than sampling.max_new_tokens "
                f"{longest}; cut it"
            )
        ids, mask = pad_left([prompt.token_ids for prompt in prompts], pad)
        return build_sequences(ids, mask.bool(), rows, pad)


def build_sequences(prompt_ids: Tensor, prompt_mask: Tensor, responses: list[list[int]], pad: int) -> Sequences:
    """Return off-policy rows of these prompts [N, P] and responses (token ids)."""
    width = max(1, *map(len, responses))
    mask = pad_right([[1] * len(row) for row in responses], 0, width, torch.bool)
    return Sequences(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        response_ids=pad_right(responses, pad, width, torch.int64),
        mask=mask,
        on_policy=torch.zeros_like(mask),
    )


def get_example_text(example: Example, name: str) -> str | None:
    """Return a response of the data set by its field's or column's name; None if the row has none."""
    text = getattr(example, name, None) or example.columns.get(name)
    return str(text) if text else None
