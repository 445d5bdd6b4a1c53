"""Probe of language models: left padding and decoding with a KV cache must not change the logits of a whole pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import LongTensor, Tensor
from transformers import PreTrainedModel

from apa_cli.errors import UserError, get_first_line
from apa_cli.models.forward import autocast_to, build_padded_inputs, compute_response_logits
from apa_cli.models.padding_probe import TOLERANCE, build_probe_rows, measure_difference
from apa_cli.rollout.decode_step import EagerDecoder
from apa_cli.rollout.engine import pad_left
from apa_cli.settings import DType, SamplingSettings

RESPONSE_TOKENS = 2
"""Tokens of each response; all of them but the first are decoded from the cache."""


@torch.no_grad()
def check_sampling(model: PreTrainedModel, dtype: DType, key: str) -> None:
    """Raise UserError, beginning with `key`, if the model, computed in `dtype`, gives samples the wrong log-probs.

    Those of training are computed in padded batches: a model fails if it is bidirectional, counts padding as positions,
    or holds a state that is not in its cache.
    """
    config = model.config.get_text_config()
    kind, rows = config.model_type, build_probe_rows(config.vocab_size)
    prompts = [row[:-RESPONSE_TOKENS] for row in rows]
    responses = torch.tensor([row[-RESPONSE_TOKENS:] for row in rows], device=model.device)

    def compute(compute_logits: Callable[..., Tensor], task: str) -> Tensor:
        try:
            with autocast_to(model.device, dtype):
                return compute_logits(model, prompts, responses).float()
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # a model may fail in any way on inputs that it does not expect
            raise UserError(f"{key}: this {kind} model cannot {task}: {get_first_line(error)}") from error

    expected = compute(compute_logits_alone, "compute the log-probs of a sequence")
    if not bool(expected.isfinite().all()):
        raise UserError(f"{key}: the logits of this {kind} model are not finite; its weights may be damaged")
    padded = measure_difference(compute(compute_padded_logits, "compute a padded batch"), expected)
    if not padded <= TOLERANCE[dtype]:  # NaN is not
        raise UserError(
            f"{key}: this {kind} model gives a prompt other log-probs if padding precedes it (relative difference of "
            f"logits {padded:.2g}), so batches cannot be scored; choose another model"
        )
    decoded = measure_difference(compute(compute_decoded_logits, "decode token by token with a cache"), expected)
    if not decoded <= TOLERANCE[dtype]:
        raise UserError(
            f"{key}: this {kind} model gives tokens other log-probs if they are sampled one by one with a cache than "
            f"in a whole pass (relative difference of logits {decoded:.2g}); choose another model"
        )


def compute_logits_alone(model: PreTrainedModel, prompts: list[list[int]], responses: Tensor) -> Tensor:
    """Return the logits at each response position, [B, T, V], from a whole pass over each sequence."""
    logits = []
    for prompt, response in zip(prompts, responses.tolist(), strict=True):
        ids = torch.tensor([prompt + response[:-1]], device=model.device)
        logits.append(model(input_ids=ids, use_cache=False).logits[:, -RESPONSE_TOKENS:])
    return torch.cat(logits)


def compute_padded_logits(model: PreTrainedModel, prompts: list[list[int]], responses: Tensor) -> Tensor:
    """Return the logits at each response position, [B, T, V], as training computes them."""
    ids, mask = pad_left(prompts, 0, model.device)
    padded = build_padded_inputs(ids, mask.bool(), responses, torch.ones_like(responses, dtype=torch.bool))
    return compute_response_logits(model, padded, temperature=1.0)


def compute_decoded_logits(model: PreTrainedModel, prompts: list[list[int]], responses: Tensor) -> Tensor:
    """Return the logits at each response position, [B, T, V], from decode steps; the rows change places meanwhile."""
    settings = SamplingSettings(
        max_prompt_tokens=0, max_new_tokens=RESPONSE_TOKENS, temperature=1.0, top_k=0, top_p=1.0, stop_strings=[],
        microbatch_size=len(prompts), cuda_graph=False,
    )  # fmt: skip
    uniforms = torch.zeros(responses.shape, device=model.device)
    decoder = EagerDecoder(model, *pad_left(prompts, 0, model.device), uniforms, settings)
    order = torch.arange(len(prompts), device=model.device)  # the prompt of each row of the decoder
    swap, logits = cast(LongTensor, order.flip(0)), []
    for step in range(RESPONSE_TOKENS):
        decoder.step()
        logits.append(decoder.logits[order.argsort()])
        decoder.input_ids = responses[order, step : step + 1]
        decoder.select_rows(swap)
        order = order[swap]
    return torch.stack(logits, dim=1)
