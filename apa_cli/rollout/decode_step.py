"""Decode steps: each samples one token for every row of a batch, with a KV cache."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import LongTensor, Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from apa_cli.models.lora import AdapterDisabledModel
from apa_cli.rollout.kv_cache import build_kv_cache, find_cache_argument, make_static_cache
from apa_cli.rollout.token_sampling import sample_tokens
from apa_cli.settings import SamplingSettings

CAPTURE_DEVICES = {"cuda"}
"""Device types on which steps are captured as CUDA graphs."""
MIN_FREE_BYTES = 2**31
"""Bytes of free GPU memory below which PyTorch's cached blocks are released before a capture, which cannot release
them."""

first_graphs: dict[torch.device, torch.cuda.CUDAGraph] = {}
"""First graph of each device; all later graphs share its memory pool, so that the pool is reused."""
failed_devices: set[torch.device] = set()
"""Devices on which a capture has failed; no further capture is attempted there."""


class Decoder:
    """Model, inputs and KV cache of a batch; the base of both kinds of decoder."""

    model: PreTrainedModel | AdapterDisabledModel
    settings: SamplingSettings
    cache: DynamicCache
    cache_argument: str
    """Name of the model's cache argument."""
    input_ids: Tensor
    """Tokens that the next forward pass reads: [B, P] in the prefill, then [B, 1]."""
    position_ids: Tensor
    """Positions of `input_ids`, of the same shape."""
    uniforms: Tensor
    """[B, T]; step t samples with column t."""
    last_position: int | None
    """Position at which `position_ids` stop; None: at no position."""
    logits: Tensor
    """Logits of the latest step, [B, V]."""

    def forward(self, attention_mask: Tensor | None) -> None:
        """Compute the logits of the next token and append `input_ids` to the cache."""
        self.logits = self.model(
            input_ids=self.input_ids,
            attention_mask=attention_mask,
            position_ids=self.position_ids,
            **{self.cache_argument: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class EagerDecoder(Decoder):
    """Decode steps whose cache and mask grow by one token each, so that a step reads no more than it needs."""

    def __init__(
        self,
        model: PreTrainedModel | AdapterDisabledModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        uniforms: Tensor,
        settings: SamplingSettings,
        last_position: int | None = None,
    ):
        """Start from prompts `input_ids` and `attention_mask` [B, P], padded on the left, and `uniforms` [B, T]."""
        self.model, self.settings, self.last_position = model, settings, last_position
        self.input_ids, self.attention_mask, self.uniforms = input_ids, attention_mask, uniforms
        self.position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)
        self.cache, self.cache_argument = build_kv_cache(model), find_cache_argument(model)
        layers = self.cache.layers
        self.has_attention = not layers or any(isinstance(layer, CacheLayerMixin) for layer in layers)
        """False if the cache holds recurrent states alone, which have no padding; Mamba misreads a mask after the
        prefill."""
        self.step_index = 0
        """Index of the next step."""

    def step(self) -> tuple[Tensor, Tensor]:
        """Return the next token of each row, [B] int64, and its log-probability, [B]. The first step is the prefill."""
        self.forward(self.attention_mask if self.has_attention or self.step_index == 0 else None)
        tokens, logprobs = sample_tokens(self.logits, self.uniforms[:, self.step_index], self.settings)
        self.step_index += 1
        self.input_ids = tokens.unsqueeze(-1)
        self.attention_mask = torch.cat([self.attention_mask, self.attention_mask.new_ones(len(tokens), 1)], dim=1)
        self.position_ids = self.position_ids[:, -1:] + 1
        if self.last_position is not None:
            self.position_ids.clamp_(max=self.last_position)
        return tokens, logprobs

    def select_rows(self, rows: LongTensor) -> None:
        """Keep only these rows of the batch."""
        self.cache.reorder_cache(rows)
        self.input_ids, self.attention_mask = self.input_ids[rows], self.attention_mask[rows]
        self.position_ids, self.uniforms = self.position_ids[rows], self.uniforms[rows]


class GraphDecoder(Decoder):
    """Decode steps over fixed buffers, capturable as one CUDA graph.

    The cache has room for all tokens to come, and the mask hides those that have not been sampled. A small model on a
    fast GPU is otherwise bound by kernel launches.
    """

    def __init__(self, decoder: EagerDecoder):
        """Continue from `decoder`, which has done its prefill; its cache is taken over.

        Raise TypeError if the cache has layers without a static counterpart.
        """
        self.model, self.settings, self.uniforms = decoder.model, decoder.settings, decoder.uniforms
        self.cache_argument, self.last_position = decoder.cache_argument, decoder.last_position
        device, steps = decoder.input_ids.device, self.uniforms.shape[1]
        cache_length = decoder.attention_mask.shape[1] - 1
        self.steps_left = steps - decoder.step_index
        self.cache_position = torch.tensor([cache_length], device=device)
        """Cache position of the next token, [1]."""
        self.step_index = torch.tensor([decoder.step_index], device=device)
        """Index of the next step, [1]."""
        self.input_ids, self.position_ids = decoder.input_ids.clone(), decoder.position_ids.clone()
        self.tokens = decoder.input_ids.squeeze(-1).clone()
        self.logprobs = torch.zeros(len(self.tokens), device=device)
        prompt_mask = decoder.attention_mask[:, :cache_length].bool()
        self.attention_mask = nn.functional.pad(prompt_mask, (0, self.steps_left))[:, None, None]
        """[B, 1, 1, S] bool, S counting all tokens to come."""
        self.cache = make_static_cache(decoder.cache, self.steps_left, self.cache_position)
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> tuple[Tensor, Tensor]:
        """Return the next token of each row, [B] int64, and its log-probability, [B]; the next step overwrites both."""
        if self.graph is not None:
            self.graph.replay()
        elif can_capture(self.input_ids.device) and self.steps_left > 2:  # a capture costs more than two steps
            self.graph = capture_step(self)
        else:
            self.compute_step()
        self.steps_left -= 1
        return self.tokens, self.logprobs

    def compute_step(self) -> None:
        """Compute one step into the buffers."""
        self.attention_mask.index_fill_(3, self.cache_position, True)
        self.forward(self.attention_mask)
        uniforms = self.uniforms.index_select(1, self.step_index).squeeze(1)
        tokens, logprobs = sample_tokens(self.logits, uniforms, self.settings)
        self.tokens.copy_(tokens)
        self.logprobs.copy_(logprobs)
        self.input_ids.copy_(self.tokens.unsqueeze(-1))
        for counter in (self.cache_position, self.step_index, self.position_ids):
            counter.add_(1)
        if self.last_position is not None:
            self.position_ids.clamp_(max=self.last_position)

    def select_rows(self, rows: LongTensor) -> None:
        """Keep only these rows of the batch; the new shapes need a new graph."""
        self.graph = None
        self.cache.reorder_cache(rows)
        self.input_ids, self.position_ids = self.input_ids[rows], self.position_ids[rows]
        self.uniforms, self.attention_mask = self.uniforms[rows], self.attention_mask[rows]
        self.tokens, self.logprobs = self.tokens[rows], self.logprobs[rows]


# --- CUDA graphs --------------------------------------------------------------------------------------------


def can_capture(device: torch.device) -> bool:
    """Return True if steps on this device are captured as CUDA graphs."""
    return device.type in CAPTURE_DEVICES and device not in failed_devices


def capture_step(decoder: GraphDecoder) -> torch.cuda.CUDAGraph | None:
    """Compute one step and capture it as a graph for the following ones; return None if the capture fails.

    The step is computed on the capture stream first, so that libraries allocate their per-stream workspaces before the
    capture. An earlier graph must be freed first, since workspaces allocated during its capture are freed with it.
    """
    device = decoder.input_ids.device
    stream, current = get_capture_stream(device), torch.cuda.current_stream(device)
    if torch.cuda.mem_get_info(device)[0] < MIN_FREE_BYTES:
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            decoder.compute_step()
            logits = decoder.logits
            if not capture_graph(graph, decoder.compute_step, first_graphs.get(device)):
                decoder.logits = logits
                failed_devices.add(device)
                return None
            decoder.logits.copy_(logits)  # the captured step's own buffer, not computed yet
    finally:
        current.wait_stream(stream)
    first_graphs.setdefault(device, graph)
    return graph


def capture_graph(
    graph: torch.cuda.CUDAGraph, compute: Callable[[], None], first_graph: torch.cuda.CUDAGraph | None
) -> bool:
    """Capture the kernels that `compute` launches, without running them. Return True if the capture succeeded.

    Only this thread's calls can invalidate the capture ("thread_local"): another thread, such as NCCL's watchdog, may
    query the GPU meanwhile.
    """
    graph.capture_begin(pool=None if first_graph is None else first_graph.pool(), capture_error_mode="thread_local")
    succeeded = False
    try:
        compute()
        succeeded = True
    except Exception:  # out of memory, or a call that synchronizes with the GPU, which a capture forbids
        pass
    finally:
        try:
            graph.capture_end()
        except RuntimeError:
            succeeded = False
    return succeeded


@cache
def get_capture_stream(device: torch.device) -> torch.cuda.Stream:
    """Return the stream on which steps are captured, one per device."""
    return torch.cuda.Stream(device)
