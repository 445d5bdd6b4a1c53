"""The contract of a reward: settings that load into a function from texts to scores."""

from __future__ import annotations

import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

from apa_cli.errors import UserError
from apa_cli.types import Range
from apa_cli.user_code import describe_exception


@dataclass(frozen=True)
class Scores:
    """One score per response, and for a reward with parts also each part's score per response."""

    values: list[float]
    parts: Mapping[str, list[float]] = field(default_factory=dict)
    """Name of a part → its scores, unweighted."""
    token_scores: list[list[float]] | None = None
    """Scores per token of each response, [N] lists; None if the reward has none. Reserved: nothing uses them yet."""


ScoreFunction = Callable[[list[str], list[str], list[dict[str, Any]]], "list[float] | Scores"]
"""(N prompts, N responses, N dicts of the data set's further columns) → N scores."""

CheckedScoreFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Scores]
"""A score function that returns exactly one finite number per response, or raises UserError."""

InputFunction = Callable[[str, str, dict[str, Any]], dict[str, str]]
"""(prompt, response, columns) → by name the text that a reward's model reads; "" names the only one."""

ScoresT = TypeVar("ScoresT")

TokenLimit = Range(1, 10**9)
"""Range of a text's length in tokens."""
Seconds = Range(0, 10**9, open_low=True)
"""Range of a time limit; longer ones overflow in the system's calls."""


@dataclass(frozen=True)
class ModelScore(Generic[ScoresT]):
    """A score function that can show what the model behind it reads."""

    score: Callable[[list[str], list[str], list[dict[str, Any]]], ScoresT]
    show_input: InputFunction

    def __call__(self, prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> ScoresT:
        return self.score(prompts, responses, columns)


def show_model_input(score: Any, prompt: str, response: str, columns: dict[str, Any]) -> dict[str, str]:
    """Return by name the texts that the models behind a score function read; {} if it has no model."""
    return score.show_input(prompt, response, columns) if isinstance(score, ModelScore) else {}


def join_inputs(scores: Mapping[str, Any]) -> InputFunction:
    """Return the function of the texts of several score functions, each under its name or NAME/NAME."""

    def show_inputs(prompt: str, response: str, columns: dict[str, Any]) -> dict[str, str]:
        return {
            f"{name}/{inner}".rstrip("/"): text
            for name, score in scores.items()
            for inner, text in show_model_input(score, prompt, response, columns).items()
        }

    return show_inputs


@dataclass(frozen=True)
class Placement:
    """The device, precision and sharding of the models that rewards load."""

    device: str
    """A torch device, such as "cpu" or "cuda:0"."""
    dtype: str
    """Compute dtype: "float32" or "bfloat16"."""
    shard: Callable[[Any], Any] | None = None
    """Function that shards a model over the ranks, a collective call; None: every rank holds the whole model."""

    def place_model(self, model: Any) -> Any:
        """Return `model`, a `torch.nn.Module` on the CPU, moved to `device` or sharded over the ranks."""
        return model.to(self.device) if self.shard is None else self.shard(model)


class Reward(ABC):
    """The settings of a reward, a frozen dataclass, which `load` turns into a score function."""

    @property
    def needs_trained_model(self) -> bool:
        """Return True if the reward stage must first train a model for `use_trained_model`. Default: False."""
        return False

    def use_trained_model(self, path: str) -> Reward:
        """Return the same reward with the model in the folder `path`. Raise TypeError if the reward takes none."""
        raise TypeError(f"{type(self).__name__} takes no model")

    @abstractmethod
    def load(self, placement: Placement) -> ScoreFunction:
        """Load models and functions once, models as `placement` says, and return the score function.

        Raise UserError, naming the configuration key, for what cannot be loaded.
        """


@dataclass(frozen=True)
class NamedReward:
    """A reward with a name and a weight: a part of a sum, or a further reward in evaluation (weight unused)."""

    name: str
    weight: float
    reward: Reward

    def use_trained_model(self, path: str) -> NamedReward:
        """Return a copy on the model in the folder `path` if the reward needs a trained model, else self."""
        if not self.reward.needs_trained_model:
            return self
        return NamedReward(self.name, self.weight, self.reward.use_trained_model(path))

    def load(self, placement: Placement) -> CheckedScoreFunction:
        """Load the reward and return its unweighted score function; a UserError begins with the name."""
        with self._prefix_errors():
            score = add_score_check(self.reward.load(placement))

        def score_with_name(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
            with self._prefix_errors():
                return score(prompts, responses, columns)

        return ModelScore(score_with_name, partial(show_model_input, score))

    @contextmanager
    def _prefix_errors(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error


def add_score_check(score: ScoreFunction) -> CheckedScoreFunction:
    """Return `score` with its result checked: parts by `to_finite_floats`, token scores by `check_token_scores`."""

    def score_with_check(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
        result = score(prompts, responses, columns)
        parts = dict(result.parts) if isinstance(result, Scores) else {}
        scores = to_finite_floats(result.values if isinstance(result, Scores) else result, responses)
        checked_parts = {name: to_finite_floats(values, responses) for name, values in parts.items()}
        token_scores = result.token_scores if isinstance(result, Scores) else None
        if token_scores is not None:
            token_scores = check_token_scores(token_scores, responses)
        return Scores(scores, checked_parts, token_scores)

    return ModelScore(score_with_check, partial(show_model_input, score))


def to_finite_floats(result: Any, responses: list[str]) -> list[float]:
    """Return `result` as one finite float per response. Raise UserError naming the first number that is not.

    Any iterable of numbers, such as an array, is taken, but for texts, mappings and sets, which have other items than
    one number per response in order. A boolean counts as 0 or 1.
    """
    wanted, kind = "reward: expected one number per response", type(result).__name__
    if isinstance(result, str | bytes | Mapping | Set):
        hint = "; return the list of its values" if isinstance(result, Mapping) else ""
        raise UserError(f"{wanted}, got {kind}{hint}")
    try:
        values = list(result if hasattr(result, "__len__") else itertools.islice(result, len(responses) + 1))
    except Exception as error:  # the iteration may run any code
        raise UserError(f"{wanted}, got {kind} ({describe_exception(error)})") from error
    if len(values) != len(responses):
        raise UserError(f"{wanted}, got {len(values)} for {len(responses)} responses")
    scores = []
    for i, value in enumerate(values):
        if value is None or isinstance(value, str | bytes):
            raise UserError(f"{wanted}, got {value!r} for response {i}: {responses[i][:80]!r}")
        try:
            scores.append(float(value.item() if hasattr(value, "item") else value))  # arrays of one number
        except Exception as error:  # of a list, of a tensor with several numbers, of a number beyond the range
            got = f"{kind} with {type(value).__name__} for response {i}"
            raise UserError(f"{wanted}, got {got} ({describe_exception(error)})") from error
        if not math.isfinite(scores[-1]):
            raise UserError(f"reward: expected finite scores, got {scores[-1]} for response {i}: {responses[i][:80]!r}")
    return scores


def check_token_scores(rows: list[list[float]], responses: list[str]) -> list[list[float]]:
    """Return `rows` as one list of finite floats per response. Raise UserError if there are fewer, more or others.

    The trainer, which knows the tokens, checks the length of each list.
    """
    if len(rows) != len(responses):
        raise UserError(
            f"reward: expected one list of token scores per response, got {len(rows)} for {len(responses)} responses"
        )
    checked = []
    for i, row in enumerate(rows):
        try:
            checked.append([float(value) for value in row])
        except (TypeError, ValueError, OverflowError) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"reward: expected a list of token scores for response {i} ({reason})") from error
        if not all(map(math.isfinite, checked[-1])):
            raise UserError(f"reward: expected finite token scores, got {row} for response {i}")
    return checked


class CallTimeout(Exception):
    """A call that did not return within its time limit."""


def call_with_timeout(function: Callable[[], Any], seconds: float | None) -> Any:
    """Return or raise what `function()` does; raise CallTimeout if that takes longer than `seconds` (None: no limit).

    With a limit the function runs in a daemon thread, which after a timeout goes on until the program ends.
    """
    if seconds is None:
        return function()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((function(), None))
        except BaseException as error:  # re-raised in the calling thread
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise CallTimeout
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
