"""Probe of models for CUDA-graph decoding: a trial run of `GraphDecoder` against `EagerDecoder`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.rollout import decode_step
from apa_cli.rollout.decode_step import EagerDecoder, GraphDecoder
from apa_cli.settings import SamplingSettings

_probe_results: WeakKeyDictionary[PreTrainedModel | AdapterDisabledModel, bool] = WeakKeyDictionary()


def can_decode_with_graph(model: PreTrainedModel | AdapterDisabledModel) -> bool:
    """Return True if the model is on a GPU and passes `probe_graph_decoding`, which runs once per model."""
    if model not in _probe_results:
        _probe_results[model] = model.device.type == "cuda" and probe_graph_decoding(model)
    return _probe_results[model]


@torch.no_grad()
def probe_graph_decoding(model: PreTrainedModel | AdapterDisabledModel) -> bool:
    """Return True if `GraphDecoder` computes the logits of `EagerDecoder`: a few tokens after two short prompts.

    The first steps are computed eagerly, then one under the synchronization check; only a model that passes these is
    captured, since a failed capture may leak memory. Both decoders read the same tokens, whatever they sample.
    """
    settings = SamplingSettings(
        max_prompt_tokens=3, max_new_tokens=9, temperature=0.7, top_k=2, top_p=0.9, stop_strings=[], microbatch_size=2,
        cuda_graph=True,
    )  # fmt: skip
    input_ids = torch.tensor([[0, 1, 2], [3, 4, 5]], device=model.device) % model.config.get_text_config().vocab_size
    attention_mask = torch.tensor([[0, 1, 1], [1, 1, 1]], device=model.device)
    uniforms = torch.full((2, settings.max_new_tokens), 0.5, device=model.device)
    try:
        reference, prefilled = (EagerDecoder(model, input_ids, attention_mask, uniforms, settings) for _ in range(2))
        reference.step()
        prefilled.step()
        decoder = GraphDecoder(prefilled)
        steps: list[Callable[[], object]] = [decoder.compute_step] * 2
        steps.append(partial(run_without_sync, decoder.compute_step))
        steps += [decoder.step] * (decoder.steps_left - len(steps))
        for token, step in enumerate(steps):
            reference.input_ids.fill_(token)
            decoder.input_ids.fill_(token)
            reference.step()
            step()
            if not is_close(reference.logits, decoder.logits):
                return False
        return (decoder.graph is not None) == (model.device.type in decode_step.CAPTURE_DEVICES)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # a model may fail in any way on inputs that it does not support
        return False


def is_close(logits: Tensor, others: Tensor) -> bool:
    """Return True if two tensors of logits differ by rounding only, relative to the largest logit."""
    tolerance = 1e-3 if logits.dtype is torch.float32 else 0.05
    return float((logits - others).abs().max()) <= tolerance * float(logits.abs().max())


def run_without_sync(compute: Callable[[], None]) -> None:
    """Call `compute`. Raise RuntimeError if it synchronizes with the GPU, which a capture forbids."""
    if not torch.cuda.is_available():
        return compute()
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Ss]ynchronization debug mode")
        try:
            torch.cuda.set_sync_debug_mode("error")
            return compute()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
