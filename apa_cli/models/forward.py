"""Forward passes over prompts and responses: log-probs, values, whole distributions, at the response's positions.

The outputs for response token t come from the position before it: for the first, the last prompt token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.models.critic import Critic
from apa_cli.settings import DType
from apa_cli.tensor_ops import token_logprobs
from apa_cli.types import Batch, PolicyOutput, Tokens


@contextmanager
def compute_precision(device: torch.device, dtype: DType) -> Iterator[None]:
    """Autocast to bfloat16 where that is asked for; weights stay as they are."""
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype is DType.bfloat16):
        yield


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as one input, without columns that are padding in every row."""

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    response_ids: Tensor
    """[B, T'], T' ≤ T"""

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }


def sequences(prompt_ids: Tensor, prompt_mask: Tensor, response_ids: Tensor, mask: Tensor) -> Sequences:
    """prompt_ids [B, P] padded on the left, response_ids [B, T] padded on the right, with their masks.

    The last response token is never an input: nothing is predicted from it.
    """
    first = int(prompt_mask.any(0).long().argmax())
    length = max(int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1, 1)
    prompt_ids, prompt_mask = prompt_ids[:, first:], prompt_mask[:, first:]
    response_ids = response_ids[:, :length]
    attention = torch.cat([prompt_mask, torch.ones_like(response_ids[:, 1:], dtype=torch.bool)], dim=1)
    return Sequences(
        input_ids=torch.cat([prompt_ids, response_ids[:, :-1]], dim=1),
        attention_mask=attention.long(),
        position_ids=(attention.long().cumsum(1) - 1).clamp(min=0),
        response_ids=response_ids,
    )


def widened(x: Tensor, mask: Tensor) -> Tensor:
    """x [B, T'] as float32 [B, T], 0 outside the mask."""
    x = nn.functional.pad(x.float(), (0, mask.shape[1] - x.shape[1]))
    return x.masked_fill(~mask, 0.0)


def response_logits(model: PreTrainedModel, rows: Sequences, temperature: float) -> Tensor:
    """[B, T', V] float32: the logits of the distribution that samples."""
    length = rows.response_ids.shape[1]
    output = model(**rows.inputs, use_cache=False, logits_to_keep=length)
    return tempered(output.logits, temperature)


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits in float32 at a temperature; at 1 nothing is copied."""
    logits = logits.float()
    return logits if temperature == 1 else logits / temperature


def response_logprobs(model: PreTrainedModel, batch: Batch | Tokens, temperature: float) -> Tensor:
    """log π of each response token, [B, T] float32, 0 outside the mask."""
    rows = sequences(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
    return widened(token_logprobs(response_logits(model, rows, temperature), rows.response_ids), batch.mask)


class TrainingModel(nn.Module):
    """Policy and critics as one module, so that one wrapper distributes them and one call computes both."""

    def __init__(self, policy: PreTrainedModel, critics: dict[str, Critic], temperature: float):
        super().__init__()
        self.policy = policy
        self.critics = nn.ModuleDict(critics)
        self.temperature = temperature

    def forward(self, batch: Batch | Tokens) -> PolicyOutput:
        """Log-probs [B, T] and each critic's values [B, T] of the batch's responses."""
        rows = sequences(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
        length = rows.response_ids.shape[1]
        on_trunk = any(critic.backbone is None for critic in self.critics.values())
        output = self.policy(**rows.inputs, use_cache=False, logits_to_keep=length, output_hidden_states=on_trunk)
        logprobs = token_logprobs(tempered(output.logits, self.temperature), rows.response_ids)
        trunk = output.hidden_states[-1] if on_trunk else None
        values = {
            name: widened(critic(rows.inputs, length, trunk), batch.mask) for name, critic in self.critics.items()
        }
        return PolicyOutput(logprobs=widened(logprobs, batch.mask), values=values)

    def values(self, batch: Batch | Tokens) -> dict[str, Tensor]:
        """Each critic's values alone, [B, T]."""
        if any(critic.backbone is None for critic in self.critics.values()):
            return dict(self.forward(batch).values)
        rows = sequences(batch.prompt_ids, batch.prompt_mask, batch.response_ids, batch.mask)
        length = rows.response_ids.shape[1]
        return {name: widened(critic(rows.inputs, length), batch.mask) for name, critic in self.critics.items()}

    def policy_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.policy.parameters() if p.requires_grad]

    def critic_parameters(self) -> list[nn.Parameter]:
        return [p for p in self.critics.parameters() if p.requires_grad]
