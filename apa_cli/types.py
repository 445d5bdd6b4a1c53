"""Data passed between the packages: prompts, rollouts, batches, model outputs, loss terms.

Shape letters, here and everywhere: N sequences of a rollout batch (all processes), B sequences of a
minibatch or microbatch, P prompt tokens, T response tokens, V vocabulary. Masks are boolean and true
on tokens that the policy sampled. This module does not import torch, so that commands can check a
configuration before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]
"""An algorithm's state, carried from one iteration to the next: plain numbers and tensors, checkpointed."""


@dataclass(frozen=True)
class Range:
    """The range of a number in the configuration, as metadata of its type (`Annotated[float, Range(0, 1)]`).

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
UnitInterval = Range(0, 1)


@dataclass(frozen=True)
class Example:
    """One row of a data set: a prompt, optionally a chosen and a rejected reply, and further columns."""

    prompt: str
    """The prompt as plain text, which rewards read."""
    chosen: str | None
    """The preferred reply; None if the data set has no replies."""
    rejected: str | None
    """The rejected reply; None if the data set has no preference pairs."""
    columns: dict[str, Any]
    """Further fields of the row, passed to reward functions."""
    messages: list[dict[str, str]] | None = None
    """The prompt's turns, each {"role", "content"}, which a chat template renders; None if the prompt has no turns."""


class Examples(list[Example]):
    """The rows of a split; `drop_counts` maps each reason for leaving rows out to their number."""

    def __init__(self, rows: Iterable[Example] = (), drop_counts: Mapping[str, int] | None = None) -> None:
        super().__init__(rows)
        self.drop_counts = dict(drop_counts or {})


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt for one response; `place` and `sample` key the response's random numbers."""

    text: str
    token_ids: list[int]
    place: int
    """Index of the prompt in the rollout batch of all processes."""
    sample: int
    """Number of the response among those to the same prompt, from 0."""
    columns: dict[str, Any]


@dataclass(frozen=True)
class RolloutPlan:
    """The models that sample a response; by default the policy samples all of it.

    `roll_in` samples a whole response. With probability `rollin_probability` a uniformly random prefix of it is kept,
    otherwise nothing; `roll_out` completes it.
    """

    roll_in: str = "policy"
    roll_out: str = "policy"
    rollin_probability: float = 0.0


@dataclass(frozen=True)
class Needs:
    """The models and quantities that an algorithm uses; nothing else is loaded or computed."""

    reference: bool = True
    """log π_init of the sampled tokens, used in the loss or in the token rewards."""
    critics: tuple[str, ...] = ("value",)
    """Names of the critics, whose values are computed before the update and trained in it."""
    old_logprobs: bool = False
    """log π_old recomputed by the training forward pass; the sampler's own log-probs are always available."""
    guide: bool = False
    """A guide policy, which the algorithm's `plan` may name."""
    samples_per_prompt: int = 1
    """Minimum number of responses to each prompt."""


@dataclass(frozen=True)
class Sequences:
    """Prompts and responses as tensors: the input of a forward pass. `Batch` has the same four fields and more."""

    prompt_ids: Tensor
    """[B, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[B, P] bool, true on prompt tokens."""
    response_ids: Tensor
    """[B, T] int64, padded on the right."""
    mask: Tensor
    """[B, T] bool, true on response tokens."""


def require(value: Tensor | None, name: str) -> Tensor:
    """Return an optional field of a rollout or batch. Raise ValueError if the trainer was not asked to compute it."""
    if value is None:
        raise ValueError(f"{name}: not computed; the algorithm's needs() must ask for it")
    return value


@dataclass(frozen=True)
class Rollout:
    """One iteration's responses and their scores, log-probs and values before the update, complete on every rank.

    Fields that default to None are filled in by later phases of the iteration; see `require`.
    """

    prompt_ids: Tensor
    """[N, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[N, P] bool, true on prompt tokens."""
    response_ids: Tensor
    """[N, T] int64, padded on the right."""
    mask: Tensor
    """[N, T] bool, true on sampled tokens, the terminating one included."""
    prefix_mask: Tensor
    """[N, T] bool, true on the kept roll-in prefix; all false under the default plan."""
    sampler_logprobs: Tensor
    """[N, T] float32, log π_old of each token as the sampler computed it; 0 outside `mask`."""
    prompts: list[str]
    """The prompts' texts, as rewards read them."""
    responses: list[str]
    """The responses' texts, as rewards read them: without stop string and terminator."""
    endings: list[str]
    """The end of each response: "eos", "stop" or "length"."""
    groups: Tensor
    """[N] int64, index of the prompt that each response belongs to."""
    columns: list[dict[str, Any]]
    """Further fields of each prompt's row."""
    scores: Tensor | None = None
    """[N] float32, the rewards' scores."""
    ref_logprobs: Tensor | None = None
    """[N, T] float32, log π of the loss's reference: π_init, or the refreshed one."""
    init_logprobs: Tensor | None = None
    """[N, T] float32, log π_init, the reference of kl/*."""
    old_logprobs: Tensor | None = None
    """[N, T] float32, log π_old by the training forward pass, if the algorithm needs it."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """critic name → [N, T] float32, V(s_t) at the position before token t; 0 outside `mask`."""

    def replace(self, **changes: Any) -> Rollout:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class Batch:
    """The training data of an update. The first dimension of every tensor is the sequence, so rows can be selected."""

    prompt_ids: Tensor
    """[N, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[N, P] bool, true on prompt tokens."""
    response_ids: Tensor
    """[N, T] int64, padded on the right."""
    mask: Tensor
    """[N, T] bool, true on tokens whose log-probs and values the forward pass computes."""
    masks: Mapping[str, Tensor]
    """mask name → [N, T] bool; each loss term names its mask and is divided by that mask's count."""
    sampler_logprobs: Tensor
    """[N, T] float32, log π_old as the sampler computed it."""
    advantages: Tensor
    """[N, T] float32, Â; 0 outside `mask`."""
    returns: Mapping[str, Tensor]
    """critic name → [N, T] float32, the critic's target G."""
    values: Mapping[str, Tensor]
    """critic name → [N, T] float32, V_old."""
    ref_logprobs: Tensor | None = None
    """[N, T] float32, log π of the loss's reference."""
    old_logprobs: Tensor | None = None
    """[N, T] float32, log π_old by the training forward pass."""
    log_normalizer: Tensor | None = None
    """[N, T] float32, log Z, which APA may add to every token's residual."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the whole batch, for the log."""

    def __len__(self) -> int:
        return len(self.mask)

    def select_rows(self, index: Tensor) -> Batch:
        """Return the sequences at `index` (int64 [B]), in that order, without the metrics."""

        def select(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: tensor[index] for name, tensor in value.items()}
            return None if value is None else value[index]

        changes = {f.name: select(getattr(self, f.name)) for f in fields(self) if f.name != "metrics"}
        return replace(self, **changes, metrics={})

    def replace(self, **changes: Any) -> Batch:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


@dataclass(frozen=True)
class PolicyOutput:
    """The output of one forward pass of the models under training; float32, 0 outside `batch.mask`."""

    logprobs: Tensor
    """[B, T], log π_θ of each response token."""
    values: Mapping[str, Tensor]
    """critic name → [B, T], V."""


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss: a value per token, before any reduction.

    The trainer sums `values` over the tokens of `batch.masks[mask]`, over all microbatches and processes of
    the minibatch, divides once by that mask's count there, and multiplies by `weight`. The term holds the mask's
    name, not the mask, so that the count is known before the first of several microbatches is computed.
    """

    name: str
    """Name in the metrics, `loss/NAME`."""
    values: Tensor
    """[B, T] float32."""
    mask: str
    """A key of `batch.masks`."""
    weight: float


@dataclass(frozen=True)
class Metric:
    """A number per token for the log, reduced over `batch.masks[mask]` of the minibatch: its mean or its maximum."""

    values: Tensor
    """[B, T], without gradient."""
    mask: str
    """A key of `batch.masks`."""
    reduction: Literal["mean", "max"] = "mean"


@dataclass(frozen=True)
class Loss:
    """An algorithm's loss on a microbatch: the terms that are summed, and metrics by name."""

    terms: list[LossTerm]
    metrics: Mapping[str, Metric] = field(default_factory=dict)
