"""The contract of a reward."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from apa_cli.errors import UserError


@dataclass(frozen=True)
class Scores:
    """One score per response and, where a reward is made of several, each part's own score per response."""

    values: list[float]
    parts: Mapping[str, list[float]] = field(default_factory=dict)


Score = Callable[[list[str], list[str], list[dict[str, Any]]], "list[float] | Scores"]
"""(prompts, responses, the data set's other columns, one dict per prompt) → one score per response."""

CheckedScore = Callable[[list[str], list[str], list[dict[str, Any]]], Scores]
"""The same, with one finite number per response for certain."""


@dataclass(frozen=True)
class Placement:
    """Where a reward's models compute, in which precision, and how they are held there."""

    device: str
    dtype: str
    """"float32" or "bfloat16"."""
    spread: Callable[[Any], Any] | None = None
    """Spreads a model over the processes and returns it, to be called by all of them alike; None: each holds it."""

    def put(self, model: Any) -> Any:
        """The model, a `torch.nn.Module` on the CPU, as it is held."""
        return model.to(self.device) if self.spread is None else self.spread(model)


class Reward(ABC):
    """A reward is a frozen dataclass of its settings that loads into a function of texts."""

    @property
    def lacks_model(self) -> bool:
        """Whether the reward stage must train a model first, which `with_model` then takes; default: no."""
        return False

    def with_model(self, path: str) -> Reward:
        """The same reward on the model in a folder."""
        raise TypeError(f"{type(self).__name__} takes no model")

    @abstractmethod
    def load(self, place: Placement) -> Score:
        """Whatever is needed is loaded once; `place` is for models."""


@dataclass(frozen=True)
class Part:
    """A reward under a name, among several: in a sum, where its weight counts, or in an evaluation."""

    name: str
    weight: float
    reward: Reward

    def with_model(self, path: str) -> Part:
        """The same part on the model in a folder, if it lacks one; else itself."""
        return Part(self.name, self.weight, self.reward.with_model(path)) if self.reward.lacks_model else self

    def load(self, place: Placement) -> CheckedScore:
        """Its scores, unweighted; an error names the part."""
        with self.named():
            score = checked(self.reward.load(place))

        def with_name(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
            with self.named():
                return score(prompts, responses, columns)

        return with_name

    @contextmanager
    def named(self) -> Iterator[None]:
        try:
            yield
        except UserError as error:
            raise UserError(f"{self.name}: {error}") from error


def checked(score: Score) -> CheckedScore:
    """The same reward, its result checked: one finite number per response, else UserError naming which."""

    def with_check(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Scores:
        result = score(prompts, responses, columns)
        parts = dict(result.parts) if isinstance(result, Scores) else {}
        scores = finite(result.values if isinstance(result, Scores) else result, responses)
        return Scores(scores, {name: finite(values, responses) for name, values in parts.items()})

    return with_check


def finite(result: Any, responses: list[str]) -> list[float]:
    """`result` as one finite number per response; UserError saying what else it is."""
    try:
        scores = [float(value) for value in result]
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:  # the last is a tensor's of two dimensions
        why = " ".join(str(error).split())
        raise UserError(f"reward: expected one number per response, got {type(result).__name__} ({why})") from error
    if len(scores) != len(responses):
        raise UserError(f"reward: {len(responses)} responses were given, {len(scores)} scores came back")
    for i, value in enumerate(scores):
        if not math.isfinite(value):
            raise UserError(f"reward: the score of response {i} is {value}: {responses[i][:80]!r}")
    return scores


class TimeLimit(Exception):
    """A call that took longer than it may."""


def within(seconds: float | None, call: Callable[[], Any]) -> Any:
    """What `call` returns or raises. TimeLimit if it takes longer (None: never); its thread then ends with the run."""
    if seconds is None:
        return call()
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:  # raised again by who waits
            outcome.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise TimeLimit
    value, error = outcome[0]
    if error is not None:
        raise error
    return value
