"""The steps of sampling: each draws one token for every row of a batch, with a key-value cache."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from apa_cli.models.lora import WithoutAdapter, underlying
from apa_cli.models.sequence_packing import packs
from apa_cli.rollout.token_sampling import drawn
from apa_cli.settings import SamplingSettings


class Steps:
    """What both kinds of steps have: a model, its inputs and its cache."""

    model: PreTrainedModel | WithoutAdapter
    cache: DynamicCache
    cache_name: str
    ids: Tensor
    positions: Tensor
    logits: Tensor
    """Of the last step, [B, V]."""

    def read(self, mask: Tensor) -> None:
        """The model's logits behind `ids`, which its cache then holds too."""
        self.logits = self.model(
            input_ids=self.ids,
            attention_mask=mask,
            position_ids=self.positions,
            **{self.cache_name: self.cache},
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]


class Growing(Steps):
    """Steps whose cache and mask grow by a token each: no more is read than there is."""

    def __init__(
        self,
        model: PreTrainedModel | WithoutAdapter,
        ids: Tensor,
        attention: Tensor,
        uniforms: Tensor,
        settings: SamplingSettings,
    ):
        """ids and attention [B, P], prompts padded on the left; uniforms [B, T], step t draws from column t."""
        self.model, self.settings = model, settings
        self.ids, self.attention, self.uniforms = ids, attention, uniforms
        self.positions = (attention.cumsum(1) - 1).clamp(min=0)
        self.cache, self.cache_name = roomy_cache(model), cache_name(model)
        self.taken = 0
        """Steps so far."""

    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of each row, [B] int64, and its log π, [B]."""
        self.read(self.attention)
        tokens, logprobs = drawn(self.logits, self.uniforms[:, self.taken], self.settings)
        self.taken += 1
        self.ids = tokens.unsqueeze(-1)
        self.attention = torch.cat([self.attention, self.attention.new_ones(len(tokens), 1)], dim=1)
        self.positions = self.positions[:, -1:] + 1
        return tokens, logprobs

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone."""
        self.cache.reorder_cache(rows)
        self.ids, self.attention = self.ids[rows], self.attention[rows]
        self.positions, self.uniforms = self.positions[rows], self.uniforms[rows]


class Repeated(Steps):
    """Steps that all do the same to the same memory, so that a GPU replays one of them as a CUDA graph.

    Keys and values lie in rooms for all tokens that may come, of which a mask hides those that have not. A small model
    on a fast GPU is otherwise bound by the launching of its kernels.
    """

    def __init__(self, begun: Growing):
        """Goes on where `begun` is, after one step at least; what it holds goes over to this."""
        self.model, self.settings, self.uniforms = begun.model, begun.settings, begun.uniforms
        self.cache_name = begun.cache_name
        device, total = begun.ids.device, self.uniforms.shape[1]
        held = begun.attention.shape[1] - 1
        self.left = total - begun.taken
        """Steps to come."""
        self.place = torch.tensor([held], device=device)
        self.taken = torch.tensor([begun.taken], device=device)
        self.ids, self.positions = begun.ids.clone(), begun.positions.clone()
        self.tokens = begun.ids.squeeze(-1).clone()
        self.logprobs = torch.zeros(len(self.tokens), device=device)
        self.mask = nn.functional.pad(begun.attention[:, :held].bool(), (0, self.left))[:, None, None]
        self.cache = DynamicCache()
        self.cache.layers = [FixedLayer(layer, self.left, self.place) for layer in begun.cache.layers]
        self.graph: torch.cuda.CUDAGraph | None = None

    def step(self) -> tuple[Tensor, Tensor]:
        """The next token of each row, [B] int64, and its log π, [B], in memory that the next step writes to."""
        if self.graph is not None:
            self.graph.replay()
        elif records(self.ids.device) and self.left > 2:
            self.graph = recorded(self)
        else:
            self.compute()
        self.left -= 1
        return self.tokens, self.logprobs

    def compute(self) -> None:
        self.mask.index_fill_(3, self.place, True)
        self.read(self.mask)
        uniforms = self.uniforms.index_select(1, self.taken).squeeze(1)
        for mine, new in zip((self.tokens, self.logprobs), drawn(self.logits, uniforms, self.settings), strict=True):
            mine.copy_(new)
        self.ids.copy_(self.tokens.unsqueeze(-1))
        for counter in (self.place, self.taken, self.positions):
            counter.add_(1)

    def keep(self, rows: Tensor) -> None:
        """Goes on with these rows alone; another shape, so another graph."""
        self.graph = None
        self.cache.reorder_cache(rows)
        self.ids, self.positions, self.uniforms = self.ids[rows], self.positions[rows], self.uniforms[rows]
        self.tokens, self.logprobs, self.mask = self.tokens[rows], self.logprobs[rows], self.mask[rows]


RECORDING = {"cuda"}
"""Kinds of devices that can record."""
TIGHT = 2**31
"""Bytes of free memory below which what is cached goes back before a recording, which could not ask for it."""

_first: dict[torch.device, torch.cuda.CUDAGraph] = {}
"""The first graph of each device. All others are recorded in its memory, which would not be used again otherwise."""
_refused: set[torch.device] = set()
"""Devices on which a recording failed: none is tried again."""


def records(device: torch.device) -> bool:
    """Whether a step on this device is to be recorded."""
    return device.type in RECORDING and device not in _refused


def recorded(steps: Repeated) -> torch.cuda.CUDAGraph | None:
    """Computes a step and records it, as a graph that computes further ones; None where it cannot be recorded.

    Both on a stream of their own, so that what libraries keep for a stream is there before the recording. An earlier
    graph must be gone by then, and takes with it what they kept for it.
    """
    device = steps.ids.device
    stream, current = side_stream(device), torch.cuda.current_stream(device)
    if torch.cuda.mem_get_info(device)[0] < TIGHT:
        torch.cuda.empty_cache()
    graph = torch.cuda.CUDAGraph()
    stream.wait_stream(current)
    try:
        with torch.cuda.stream(stream):
            steps.compute()
            logits = steps.logits
            if not captured(graph, steps.compute, _first.get(device)):
                steps.logits = logits
                _refused.add(device)
                return None
            steps.logits.copy_(logits)  # the graph's own, which nothing was computed into yet
    finally:
        current.wait_stream(stream)
    _first.setdefault(device, graph)
    return graph


def captured(graph: torch.cuda.CUDAGraph, compute: Callable[[], None], first: torch.cuda.CUDAGraph | None) -> bool:
    """Whether the graph holds what `compute` asks the GPU for, none of which is done.

    Errors are those of this thread alone: another may ask the GPU something meanwhile, as NCCL's does.
    """
    graph.capture_begin(pool=None if first is None else first.pool(), capture_error_mode="thread_local")
    whole = False
    try:
        compute()
        whole = True
    except Exception:  # memory that is wanted, or a question to the GPU, that has to wait until it has recorded
        pass
    finally:
        try:
            graph.capture_end()
        except RuntimeError:
            whole = False
    return whole


@cache
def side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class RoomyLayer(DynamicLayer):
    """Keys and values [B, heads, S, dim] with room behind them, so that another token's do not move those before."""

    ROOM = 128
    """Tokens."""

    def __init__(self, at_least: torch.dtype | None = None):
        """`at_least` is the lowest precision in which they are held; None: that in which they come."""
        super().__init__()
        self.at_least = at_least
        self.rooms: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What was held with these behind it."""
        if self.at_least is not None:
            dtype = torch.promote_types(key_states.dtype, self.at_least)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        held, count = self.get_seq_length(), key_states.shape[-2]
        if self.rooms is None or held + count > self.rooms[0].shape[-2]:
            rooms = tuple(
                new.new_empty(*new.shape[:2], held + count + self.ROOM, new.shape[3])
                for new in (key_states, value_states)
            )
            if held:
                for room, states in zip(rooms, (self.keys, self.values), strict=True):
                    room[:, :, :held] = states
            self.rooms = rooms
        for room, states in zip(self.rooms, (key_states, value_states), strict=True):
            room[:, :, held : held + count] = states
        self.keys, self.values = (room[:, :, : held + count] for room in self.rooms)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keeps these rows."""
        super().reorder_cache(beam_idx)
        self.rooms = None

    def reset(self) -> None:
        """Holds nothing."""
        self.keys = self.values = self.rooms = None
        self.is_initialized = False


def cache_name(model: PreTrainedModel | WithoutAdapter) -> str:
    """What the model calls its argument for the cache: `transformers` renames it on the way to version 5.40."""
    return "cache" if "cache" in inspect.signature(underlying(model).forward).parameters else "past_key_values"


def roomy_cache(model: PreTrainedModel | WithoutAdapter) -> DynamicCache:
    """A cache of `RoomyLayer`s; layers of a kind of their own stay as they are."""
    cache = DynamicCache(config=model.config)
    at_least = torch.float32 if packs(model) else None  # what attention on a CPU computes in
    cache.layers = [RoomyLayer(at_least) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class FixedLayer(DynamicLayer):
    """Keys and values [B, heads, S, dim] of what another layer holds and of all tokens to come, given out whole."""

    def __init__(self, begun: RoomyLayer, more: int, place: Tensor):
        """`place` [1] is where the next token's go; who owns it moves it on."""
        super().__init__()
        self.place = place
        self.keys, self.values = (nn.functional.pad(x, (0, 0, 0, more)) for x in (begun.keys, begun.values))
        self.is_initialized = True
        begun.reset()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All of them, with these at their place."""
        self.keys.index_copy_(2, self.place, key_states.to(self.keys.dtype))
        self.values.index_copy_(2, self.place, value_states.to(self.values.dtype))
        return self.keys, self.values


# Which models

_repeats: WeakKeyDictionary[PreTrainedModel | WithoutAdapter, bool] = WeakKeyDictionary()
"""What `repeats` found out."""


def repeats(model: PreTrainedModel | WithoutAdapter) -> bool:
    """Whether `Repeated` is to draw from this model: on a GPU, where a trial gives what `Growing` gives."""
    if model not in _repeats:
        _repeats[model] = model.device.type == "cuda" and tried(model)
    return _repeats[model]


@torch.no_grad()
def tried(model: PreTrainedModel | WithoutAdapter) -> bool:
    """`repeats`, found out by a few tokens after two short prompts; it is not looked at which tokens are drawn.

    The first steps are computed; then one that must not wait for the GPU; only a model that has come this far is
    recorded, since a recording that fails may cost memory.
    """
    settings = SamplingSettings(
        max_prompt_tokens=3, max_new_tokens=9, temperature=0.7, top_k=2, top_p=0.9, stop_strings=[], microbatch_size=2,
        cuda_graph=True,
    )  # fmt: skip
    ids = torch.tensor([[0, 1, 2], [3, 4, 5]], device=model.device) % model.config.get_text_config().vocab_size
    attention = torch.tensor([[0, 1, 1], [1, 1, 1]], device=model.device)
    uniforms = torch.full((2, settings.max_new_tokens), 0.5, device=model.device)
    try:
        plain, begun = (Growing(model, ids, attention, uniforms, settings) for _ in range(2))
        plain.step()
        begun.step()
        if any(type(layer) is not RoomyLayer for layer in begun.cache.layers):
            return False
        other = Repeated(begun)
        computed = [other.compute, other.compute, partial(without_waiting, other.compute)]
        for token, step in enumerate([*computed, *[other.step] * (other.left - len(computed))]):
            plain.ids.fill_(token)
            other.ids.fill_(token)
            plain.step()
            step()
            if not near(plain.logits, other.logits):
                return False
        return (other.graph is not None) == (model.device.type in RECORDING)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever a model does with what it does not know
        return False


def near(logits: Tensor, others: Tensor) -> bool:
    """Whether they differ by rounding alone."""
    least = 1e-3 if logits.dtype is torch.float32 else 0.05
    return float((logits - others).abs().max()) <= least * float(logits.abs().max())


def without_waiting(compute: Callable[[], None]) -> None:
    """`compute()`; an error where it waits for the GPU."""
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
