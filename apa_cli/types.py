"""What flows between the rooms of the package: prompts, rollouts, batches, outputs, loss terms.

Shape letters, here and everywhere: N sequences of a rollout batch (all processes), B sequences of a
minibatch or microbatch, P prompt tokens, T response tokens, V vocabulary. Masks are boolean and true
on tokens the policy chose. Nothing in this module imports torch, so that commands can check a
configuration before it is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]
"""What an algorithm carries from one iteration to the next: plain numbers and tensors, checkpointed."""


@dataclass(frozen=True)
class Range:
    """The values a number in the configuration may take, as the metadata of its type.

    `low` and `high` are inclusive unless `open_low` / `open_high`; None means unbounded.
    """

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def __contains__(self, value: float) -> bool:
        above = self.low is None or (value > self.low if self.open_low else value >= self.low)
        below = self.high is None or (value < self.high if self.open_high else value <= self.high)
        return above and below

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{'greater than' if self.open_low else 'at least'} {self.low:g}")
        if self.high is not None:
            parts.append(f"{'less than' if self.open_high else 'at most'} {self.high:g}")
        return " and ".join(parts)


Positive = Range(0, open_low=True)
NonNegative = Range(0)
AtLeastOne = Range(1)
Unit = Range(0, 1)


@dataclass(frozen=True)
class Example:
    """One row of a data set: a prompt, optionally a preferred and a rejected response, and further columns.

    `messages` are the prompt's turns, each {"role", "content"}, where the data set knows them: what a chat model's
    template renders. `prompt` is the same as plain text, which is what rewards see.
    """

    prompt: str
    chosen: str | None
    rejected: str | None
    columns: dict[str, Any]
    messages: list[dict[str, str]] | None = None


class Examples(list[Example]):
    """The rows of a split, with how many were left out, by reason."""

    def __init__(self, rows: Iterable[Example] = (), dropped: Mapping[str, int] | None = None):
        super().__init__(rows)
        self.dropped = dict(dropped or {})


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt and its `place` in the rollout batch, which keys its random numbers."""

    text: str
    token_ids: list[int]
    place: int
    sample: int
    columns: dict[str, Any]


@dataclass(frozen=True)
class RolloutPlan:
    """Who draws the sequences: each is begun by `roll_in`, and with `rollin_probability` a uniformly random
    prefix of it is kept, which `roll_out` completes. The default: the policy draws everything."""

    roll_in: str = "policy"
    roll_out: str = "policy"
    rollin_probability: float = 0.0


@dataclass(frozen=True)
class Needs:
    """What an algorithm uses; nothing else is loaded or computed."""

    reference: bool = True
    """log π_init on the sampled tokens, in the loss or in the token rewards."""
    critics: tuple[str, ...] = ("value",)
    """Names of the critics whose values are computed before, and trained in, the update."""
    old_logprobs: bool = False
    """log π_old recomputed by the training forward pass (the sampler's own log-probs are always there)."""
    guide: bool = False
    """A guide policy, which `plan` may name."""
    samples_per_prompt: int = 1
    """The fewest responses to each prompt that it can work with."""


@dataclass(frozen=True)
class Tokens:
    """Prompts and responses as tensors: all that a forward pass needs. `Batch` has the same four and more."""

    prompt_ids: Tensor
    """[B, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[B, P] bool."""
    response_ids: Tensor
    """[B, T] int64, padded on the right."""
    mask: Tensor
    """[B, T] bool."""


@dataclass(frozen=True)
class Rollout:
    """One iteration's responses and everything known about them before the update. All processes hold all of it."""

    prompt_ids: Tensor
    """[N, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[N, P] bool, true on prompt tokens."""
    response_ids: Tensor
    """[N, T] int64, padded on the right."""
    mask: Tensor
    """[N, T] bool, true on tokens really chosen in sampling, the terminating one included."""
    prefix_mask: Tensor
    """[N, T] bool, true on the kept roll-in prefix (all false under the default plan)."""
    sampler_logprobs: Tensor
    """[N, T] float32, log π_old of each token as the sampler computed it; 0 outside `mask`."""
    prompts: list[str]
    responses: list[str]
    """The texts that are scored: stop string and terminator cut off."""
    endings: list[str]
    """How each response ended: "eos", "stop" or "length"."""
    groups: Tensor
    """[N] int64, the prompt each response belongs to."""
    columns: list[dict[str, Any]]
    scores: Tensor | None = None
    """[N] float32, what the reward gave."""
    ref_logprobs: Tensor | None = None
    """[N, T] float32, log π of the reference that the loss uses (π_init, or the refreshed one)."""
    init_logprobs: Tensor | None = None
    """[N, T] float32, log π_init; kl/* are measured against it."""
    old_logprobs: Tensor | None = None
    """[N, T] float32, log π_old by the training forward pass, where the algorithm needs it."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """critic name → [N, T] float32; V(s_t) at the position before token t; 0 outside `mask`."""

    def with_(self, **changes: Any) -> Rollout:
        return replace(self, **changes)


@dataclass(frozen=True)
class Batch:
    """What the update trains on. Every tensor's first dimension is the sequence, so rows can be taken."""

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    """[N, T] bool: the tokens whose log-probs and values the forward pass computes."""
    masks: Mapping[str, Tensor]
    """name → [N, T] bool: the masks that the loss terms name; each term is divided by its own mask's count."""
    sampler_logprobs: Tensor
    advantages: Tensor
    """[N, T] float32, Â; 0 outside `mask`."""
    returns: Mapping[str, Tensor]
    """critic name → [N, T] float32, the target G."""
    values: Mapping[str, Tensor]
    """critic name → [N, T] float32, V_old."""
    ref_logprobs: Tensor | None = None
    old_logprobs: Tensor | None = None
    log_normalizer: Tensor | None = None
    """[N, T] float32, the constant an algorithm adds to every token's residual, where it does."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Numbers about the whole batch, for the log."""

    def __len__(self) -> int:
        return len(self.mask)

    def rows(self, index: Tensor) -> Batch:
        """The sequences at `index` (int64 [B]), in that order, without the metrics."""

        def take(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: tensor[index] for name, tensor in value.items()}
            return None if value is None else value[index]

        changes = {f.name: take(getattr(self, f.name)) for f in fields(self) if f.name != "metrics"}
        return replace(self, **changes, metrics={})

    def with_(self, **changes: Any) -> Batch:
        return replace(self, **changes)


@dataclass(frozen=True)
class PolicyOutput:
    """What one forward pass of the models under training gives a loss; all float32, 0 outside `batch.mask`."""

    logprobs: Tensor
    """[B, T], log π_θ of each response token."""
    values: Mapping[str, Tensor]
    """critic name → [B, T]."""


@dataclass(frozen=True)
class LossTerm:
    """One part of a loss: a value per token, before any reduction.

    The trainer sums `values` over the tokens of `batch.masks[mask]`, over all microbatches and processes of
    the minibatch, divides once by that mask's count there, and multiplies by `weight`. The mask is named,
    not given, so that the count is known before the first of several microbatches is computed.
    """

    name: str
    values: Tensor
    """[B, T]"""
    mask: str
    weight: float


@dataclass(frozen=True)
class Metric:
    """A number per token for the log, reduced over `batch.masks[mask]` of the minibatch: its mean or its maximum."""

    values: Tensor
    """[B, T], without gradient."""
    mask: str
    reduce: str = "mean"


@dataclass(frozen=True)
class Loss:
    terms: list[LossTerm]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
