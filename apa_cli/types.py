"""Data passed between the packages: prompts, rollouts, batches, model outputs, loss terms.

A row is one prompt with one or more named sequences; each token is known to be the present policy's or not.

Shape letters, here and everywhere: N rows of a rollout batch (all processes), B rows of a minibatch or microbatch,
P prompt tokens, T response tokens, V vocabulary. Masks are boolean and true on what counts. This module does not import
torch at the top, so that commands can check a configuration before torch is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, Self

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, Any]
"""An algorithm's state, carried from one iteration to the next and checkpointed.

Nested dicts, whose keys are strings, of numbers, strings, booleans, None, lists, tensors and `pool.Pool`s. After a
resume tuples are lists and tensors are on the CPU. A pool's path in the state names its file; the name "kept" is the
trainer's.
"""


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


class EscapedText:
    """Marker of a text, or a list of texts, in the configuration in which \\n, \\t, \\r and \\\\ name characters.

    A shell and Hydra pass the two characters of an escape on; in YAML's double quotes they are one character already.
    """

    CHARACTERS: ClassVar = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

    @classmethod
    def read(cls, text: str) -> str:
        """Return the text with the characters that its escapes name; any other backslash stays."""
        return re.sub(r"\\([ntr\\])", lambda match: cls.CHARACTERS[match[1]], text)


@dataclass(frozen=True)
class Example:
    """One row of a data set: a prompt, optionally responses and a score, and further columns."""

    prompt: str
    """The prompt as plain text, which rewards read."""
    chosen: str | None
    """The preferred response; None if the data set has no responses."""
    rejected: str | None
    """The rejected response; None if the data set has no preference pairs."""
    columns: dict[str, Any]
    """Further fields of the row, passed to reward functions."""
    messages: list[dict[str, str]] | None = None
    """The prompt's turns, each {"role", "content"}, which a chat template renders; None if the prompt has no turns."""
    response: str | None = None
    """The logged response, which the sampler "data" returns; None: `chosen` is returned."""
    score: float | None = None
    """The score of `response`, which replaces the reward's; None if the data set has no scores."""


class Examples(list[Example]):
    """The rows of a split; `drop_counts` maps each reason for leaving rows out to their number."""

    def __init__(self, rows: Iterable[Example] = (), drop_counts: Mapping[str, int] | None = None) -> None:
        super().__init__(rows)
        self.drop_counts = dict(drop_counts or {})


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt for one response; `place` and `sample` key the response's random numbers."""

    text: str
    """The prompt's text as rewards read it, without an algorithm's instruction."""
    token_ids: list[int]
    """The tokens that the policy reads."""
    place: int
    """Index of the prompt in the rollout batch of all processes."""
    sample: int
    """Number of the response among those to the same prompt, from 0."""
    columns: dict[str, Any]
    example_index: int = 0
    """Index of the prompt's row in the data set."""
    response_ids: list[int] | None = None
    """Tokens of the row's logged response, with EOS unless it was cut; None if the row has none."""


# --- what an algorithm and a plan ask for -------------------------------------------------------------------

MESSAGES = "messages"
"""Column of a prompt that holds its turns, each {"role", "content"}, if it has turns."""
POLICY, INIT, REFERENCE, GUIDE, DATA = "policy", "init", "reference", "guide", "data"
"""Names of samplers and of log-probs: the present policy, its frozen start, the loss's reference (the frozen start
unless it is refreshed), the guide, and the data set, whose logged responses are read instead of sampled."""
SAMPLER, OLD = "sampler", "old"
"""Further names of log-probs: as the token's sampler computed them; under π_old by the training forward pass."""
RESPONSE = "response"
"""Name of a row's own sequence, beside those in `related`."""
TARGET = "/target"
"""Suffix that names the Polyak copy of a critic."""


def critic_mask(critic: str) -> str:
    """Return the name of a critic's mask, "critic/NAME"."""
    return f"critic/{critic}"


@dataclass(frozen=True)
class Prefix:
    """Part of a rolled-in response that is kept.

    none: nothing. all: the whole response. uniform: with `probability` a uniformly random prefix of 1 … length − 1
    tokens (nothing of a response of fewer than 2 tokens), otherwise nothing.
    """

    kind: Literal["none", "uniform", "all"] = "all"
    probability: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in ("none", "uniform", "all") or not 0 <= self.probability <= 1:
            raise ValueError(f"Prefix: kind none, uniform or all and a probability from 0 to 1 are needed, got {self}")


@dataclass(frozen=True)
class RolloutPlan:
    """How the responses of an iteration come about: `roll_in` gives a response, `prefix` of it is kept, `roll_out`
    completes it. By default the policy samples all of it.
    """

    roll_in: str = POLICY
    """Name of the sampler that gives a whole response."""
    prefix: Prefix = Prefix()
    """Part of that response that is kept."""
    roll_out: str | None = None
    """Name of the sampler that completes the prefix; None: nothing is added."""
    samples: int | None = None
    """Responses to each prompt; None: the run's `samples_per_prompt`."""
    critic: str = "value"
    """Name of the critic from which the advantages of these responses are computed."""
    once_per_prompt: bool = False
    """True: sampled the first time that a prompt of the data set comes up, kept, and added again each later time."""

    def __post_init__(self) -> None:
        if (self.prefix.kind == "all") != (self.roll_out is None):
            raise ValueError(f"RolloutPlan: prefix {self.prefix.kind} does not fit roll_out {self.roll_out}")
        if self.samples is not None and self.samples < 1:
            raise ValueError(f"RolloutPlan: samples must be at least 1, got {self.samples}")
        if self.once_per_prompt and POLICY in (self.roll_in, self.roll_out):
            raise ValueError("RolloutPlan: once_per_prompt needs samplers that do not change, not the policy")


@dataclass(frozen=True)
class Critic:
    """A critic that an algorithm or a plan needs, by its name in `values`."""

    name: str
    kind: Literal["state", "action"] = "state"
    """state: V(s) per position. action: Q(s, a) for every token of the vocabulary."""
    on: Literal["configured", "trunk"] = "configured"
    """configured: as the config group `critic` says. trunk: a head on the policy's trunk."""
    head: Literal["linear", "mlp"] | None = None
    """Shape of the head; None: as `critic.head` says."""
    init: Literal["zero", "random"] = "zero"
    """zero: the head's last layer is 0, so that all values are 0 at the start. random: PyTorch's initialization."""
    polyak: float | None = None
    """Rate τ of the Polyak copy `NAME/target` ← (1 − τ) copy + τ critic; None: no copy."""
    polyak_every: int = 1
    """Optimizer steps between updates of the copy."""

    def __post_init__(self) -> None:
        if not self.name.isidentifier() or self.name in (POLICY, INIT, REFERENCE, GUIDE, OLD, SAMPLER):
            raise ValueError(f"Critic: {self.name!r} is not an identifier, or is reserved; give another name")
        if self.polyak is not None and not 0 < self.polyak <= 1:
            raise ValueError(f"Critic {self.name}: polyak must be above 0 and at most 1, got {self.polyak}")


@dataclass(frozen=True)
class Needs:
    """The models and quantities that an algorithm or a plan uses; nothing else is loaded or computed."""

    samplers: tuple[str, ...] = ()
    """Samplers beside the policy: "init", "reference", "guide", "data"."""
    critics: tuple[Critic, ...] = ()
    """Critics that are trained."""
    passes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Sequence ("response" or a name in `related`) → what is computed for it before `prepare`: "reference", "init",
    "old", "guide" for log-probs; a critic's name or "NAME/target" for values."""
    texts: tuple[str, ...] = ()
    """Columns of the data set ("chosen", "rejected" or others) that become `related` sequences."""
    entropy: bool = False
    """`PolicyOutput.entropy` in the update."""
    mean_logprob: bool = False
    """`PolicyOutput.mean_logprob` in the update."""
    samples_per_prompt: int = 1
    """Responses to each prompt if the run's `samples_per_prompt` is null."""
    least_samples: int = 1
    """Smallest `samples_per_prompt` with which the algorithm works."""
    samples_multiple: int = 1
    """Number of which `samples_per_prompt` must be a multiple: 2 for pairs."""


# --- sequences ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """N prompts with a response each, as tensors; the first dimension of every tensor is the row."""

    prompt_ids: Tensor
    """[N, P] int64, padded on the left."""
    prompt_mask: Tensor
    """[N, P] bool, true on prompt tokens."""
    response_ids: Tensor
    """[N, T] int64, padded on the right."""
    mask: Tensor
    """[N, T] bool, true on response tokens, whoever chose them, the terminating one included."""
    on_policy: Tensor
    """[N, T] bool, true on the tokens among them that the present policy sampled."""
    logprobs: Mapping[str, Tensor] = field(default_factory=dict)
    """"sampler", "init", "reference", "old" or "guide" → [N, T] float32, log-probs of the response tokens in nats; 0
    outside `mask`."""
    values: Mapping[str, Tensor] = field(default_factory=dict)
    """Critic name, or "NAME/target" → [N, T] float32, its value at the position before token t (of an action critic: Q
    at token t); 0 outside `mask`."""

    def __len__(self) -> int:
        return len(self.mask)

    def select_rows(self, index: Tensor) -> Self:
        """Return the rows at `index` (int64 [B]), in that order."""
        return self.map_rows(lambda rows: [rows[i] for i in index.tolist()] if isinstance(rows, list) else rows[index])

    def map_rows(self, function: Callable[[Any], Any]) -> Self:
        """Return a copy with `function` applied to every tensor and list of rows, those of `related` included."""
        from torch import Tensor

        def apply(value: Any) -> Any:
            if isinstance(value, Tensor | list):
                return function(value)
            if isinstance(value, Sequences):
                return value.map_rows(function)
            return {key: apply(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value

        return replace(self, **{f.name: apply(getattr(self, f.name)) for f in fields(self)})

    def get_logprobs(self, name: str) -> Tensor:
        """Return the log-probs [N, T] of this name. Raise ValueError if the trainer was not asked to compute them."""
        return require(self.logprobs.get(name), f"logprobs {name!r}")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return replace(self, **changes)


def require(value: Tensor | None, name: str) -> Tensor:
    """Return an optional field of a rollout or batch. Raise ValueError if the trainer was not asked to compute it."""
    if value is None:
        raise ValueError(f"{name}: not computed; the algorithm's needs() must ask for it")
    return value


@dataclass(frozen=True, kw_only=True)
class Rollout(Sequences):
    """One iteration's rows, complete on every rank: responses, scores, and what models computed before the update.

    Fields that default to None or {} are filled in by later phases of the iteration; see `require`.
    """

    prompts: list[str]
    """The prompts' texts, as rewards read them."""
    responses: list[str]
    """The responses' texts, as rewards read them: without stop string and terminator."""
    endings: list[str]
    """The end of each response: "eos", "stop" or "length"."""
    groups: Tensor
    """[N] int64, index of the prompt that each response belongs to, equal for all responses to one prompt."""
    columns: list[dict[str, Any]]
    """Further fields of each prompt's row."""
    example_index: Tensor
    """[N] int64, index of the prompt's row in the data set."""
    plans: tuple[RolloutPlan, ...] = (RolloutPlan(),)
    """The plans of the iteration."""
    plan_index: Tensor
    """[N] int64, the row's plan in `plans`."""
    iteration: int = 0
    """Number of the iteration, from 1."""
    scores: Tensor | None = None
    """[N] float32, the rewards' scores, less the configured penalties."""
    token_scores: Tensor | None = None
    """[N, T] float32, scores per token if the reward gives them (reserved: no algorithm uses them yet)."""
    masks: Mapping[str, Tensor] = field(default_factory=dict)
    """As in `Batch`; the plan's "policy" and "critic/NAME" at first."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """As in `Batch`."""
    related: Mapping[str, Sequences] = field(default_factory=dict)
    """As in `Batch`."""
    responses_per_row: int = 1
    """As in `Batch`."""


@dataclass(frozen=True, kw_only=True)
class Batch(Sequences):
    """The training data of an update, from which rows are selected."""

    masks: Mapping[str, Tensor]
    """Mask name → bool [N], [N, T] or a related sequence's [N, T′]; each loss term names its mask and is divided by
    that mask's count."""
    advantages: Tensor | None = None
    """[N, T] float32, Â; 0 outside `mask`."""
    returns: Mapping[str, Tensor] = field(default_factory=dict)
    """Critic name → [N, T] float32, the critic's target G."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Tensors that an algorithm carries to its loss, [N] or [N, T]."""
    related: Mapping[str, Sequences] = field(default_factory=dict)
    """Further sequences of each row, by name, such as "rejected"; all are forwarded in the update."""
    responses_per_row: int = 1
    """Responses that `minibatch_size` counts for each row: 2 for pairs. Other related sequences do not count."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Metrics of the whole batch, for the log."""

    @classmethod
    def from_rollout(cls, rollout: Rollout, **fields: Any) -> Batch:
        """Return the batch of a rollout's rows: its sequences, masks and extra, and the given fields."""
        shared = {name: getattr(rollout, name) for name in SHARED_FIELDS}
        return cls(**{**shared, **fields})

    def select_rows(self, index: Tensor) -> Self:
        """Return the rows at `index` (int64 [B]), in that order, without the metrics."""
        return replace(super().select_rows(index), metrics={})


SHARED_FIELDS = (*(f.name for f in fields(Sequences)), "masks", "extra", "related", "responses_per_row")
"""Fields that a `Batch` takes over from a `Rollout`."""


@dataclass(frozen=True)
class PolicyOutput:
    """The output of one forward pass of the models under training; float32, 0 outside the sequences' mask."""

    logprobs: Tensor
    """[B, T], log π_θ of each response token."""
    values: Mapping[str, Tensor]
    """Critic name → [B, T], V before the token, or of an action critic Q at the token; "NAME/target" without
    gradient."""
    logsumexp: Mapping[str, Tensor] = field(default_factory=dict)
    """Action critic name → [B, T], logsumexp of Q over the vocabulary."""
    entropy: Tensor | None = None
    """[B, T], exact entropy of π_θ before the token, in nats, with gradient; see `Needs.entropy`."""
    mean_logprob: Tensor | None = None
    """[B, T], mean of log π_θ over the vocabulary, with gradient, for label smoothing; see `Needs.mean_logprob`."""
    related: Mapping[str, PolicyOutput] = field(default_factory=dict)
    """The outputs for the batch's `related` sequences."""


@dataclass(frozen=True)
class LossTerm:
    """One term of a loss: a value per token or per row, before any reduction.

    The trainer sums `values` over what is true in `batch.masks[mask]`, over all microbatches and processes of the
    minibatch, divides once by that mask's count there, and multiplies by `weight`. The term holds the mask's name, not
    the mask, so that the count is known before the first of several microbatches is computed.
    """

    name: str
    """Name in the metrics, `loss/NAME`."""
    values: Tensor
    """Float32 of the mask's shape: [B, T], [B], or [B, T′] of a related sequence."""
    mask: str
    """A key of `batch.masks`."""
    weight: float


@dataclass(frozen=True)
class Metric:
    """A number per token or row for the log, reduced over `batch.masks[mask]` of the minibatch: its mean or maximum."""

    values: Tensor
    """Of the mask's shape, without gradient."""
    mask: str
    """A key of `batch.masks`."""
    reduction: Literal["mean", "max"] = "mean"


@dataclass(frozen=True)
class Loss:
    """An algorithm's loss on a microbatch: the terms that are summed, and metrics by name."""

    terms: list[LossTerm]
    metrics: Mapping[str, Metric] = field(default_factory=dict)


class Encode(Protocol):
    """Encoder of an algorithm's own rows."""

    examples: Sequence[Example]
    """The rows of the data set that the run trains on."""

    def __call__(self, examples: list[Example], responses: list[list[int] | str]) -> Sequences:
        """Return one off-policy row per example: its prompt as it is given, and the response.

        A response is token ids, taken as they are, or a text, which gets EOS and is cut to the run's longest response.
        """
