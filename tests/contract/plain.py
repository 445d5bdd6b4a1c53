"""Independent references: one sequence at a time, without padding, by the models of `transformers` alone."""

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.types import Sequences


@torch.no_grad()
def compute_log_distributions(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """Return log π before each token of a response, [T, V]."""
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)


def select_tokens(distributions: Tensor, response: list[int]) -> Tensor:
    """Return the entries [T] of a response's tokens in [T, V]."""
    return distributions.gather(-1, torch.tensor(response).unsqueeze(-1)).squeeze(-1)


def list_rows(sequences: Sequences) -> list[tuple[list[int], list[int]]]:
    """Return the tokens of each row's prompt and response, without padding."""
    return [
        (prompt[prompt_mask].tolist(), response[mask].tolist())
        for prompt, prompt_mask, response, mask in zip(
            sequences.prompt_ids, sequences.prompt_mask, sequences.response_ids, sequences.mask, strict=True
        )
    ]
