"""reward=function: any Python function of prompts and responses, also in the form of TRL's reward functions."""

from __future__ import annotations

import asyncio
import copy
import inspect
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, Any

from apa_cli.errors import UserError
from apa_cli.rewards.base import CallTimeout, Placement, Reward, ScoreFunction, Seconds, call_with_timeout
from apa_cli.types import MESSAGES
from apa_cli.user_code import describe_exception, format_raise_location, import_object

PROMPTS, RESPONSES, COMPLETIONS = "prompts", "responses", "completions"
"""Names of parameters that receive texts; the others receive columns."""


@dataclass(frozen=True)
class FunctionReward(Reward):
    """A reward that calls the user's function NAME(prompts, responses, **columns), or in TRL's form by keywords.

    `target` names the function as FILE.py:NAME or package.module:NAME. `prompts` and `responses` are lists of N texts;
    each further column of the data set is a list of N values. A function without **keywords receives only the columns
    that its parameters name. A function with a parameter `completions` is one of TRL's: its prompts and completions are
    texts, or lists of messages for rows with turns. The function returns N finite numbers; it may be async, or return N
    coroutines, which then run concurrently. `timeout` is in seconds per call.
    """

    target: str
    timeout: Annotated[float | None, Seconds]

    def load(self, placement: Placement) -> ScoreFunction:
        function = import_function(self.target)
        signature = Signature.read(function, self.target)

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> Any:
            # Copies: a function may change what it is given, but the run and other rewards go on with the originals.
            arguments, keywords = signature.bind(list(prompts), list(responses), copy.deepcopy(columns))
            try:
                return call_with_timeout(
                    lambda: await_result(function(*arguments, **keywords), len(responses)), self.timeout
                )
            except CallTimeout as error:
                raise UserError(
                    f"reward.timeout: {self.target} has not returned within {self.timeout:g} s; raise the limit, or "
                    "set null for no limit"
                ) from error
            except UserError:
                raise
            except (Exception, SystemExit) as error:
                location = format_raise_location(error)
                failure = UserError(f"reward: {self.target} raised {describe_exception(error)}{location}")
                failure.details = "".join(traceback.format_exception(error))
                raise failure from error

        return score


@dataclass(frozen=True)
class Signature:
    """The parameters of a reward function, which decide what the function is called with."""

    target: str
    positional: bool
    """True: the first two parameters receive prompts and responses by position, whatever their names."""
    placed: tuple[str, ...]
    """The names of these two, which no column can fill."""
    named: tuple[str, ...]
    """The parameters that are filled by name."""
    required: tuple[str, ...]
    """Those of them without a default."""
    takes_all: bool
    """True: the function has **keywords, which receive all columns."""

    @classmethod
    def read(cls, function: Callable[..., Any], target: str) -> Signature:
        """Return the signature of a function. Raise UserError for a single parameter of an unknown name."""
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):  # some functions written in C have none
            return cls(target, True, (), (), (), False)
        kinds = inspect.Parameter
        takes_all = any(p.kind is kinds.VAR_KEYWORD for p in parameters)
        places = [p for p in parameters if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)]
        takes_two = len(places) >= 2 or any(p.kind is kinds.VAR_POSITIONAL for p in parameters)
        names = [p.name for p in places]
        is_named = RESPONSES in names[:1] or PROMPTS in names[1:2] or COMPLETIONS in [p.name for p in parameters]
        positional = takes_two and not is_named
        rest = [p for p in parameters if p.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)]
        rest = [p for p in rest if not positional or p not in places[:2]]
        required = tuple(p.name for p in rest if p.default is p.empty)
        known = {PROMPTS, RESPONSES, COMPLETIONS}
        if not positional and not takes_all and not known & {p.name for p in rest}:
            raise UserError(
                f"reward.target: {target} takes ({', '.join(p.name for p in parameters)}), but a reward function takes "
                f"({PROMPTS}, {RESPONSES}) or, as in TRL, ({PROMPTS}, {COMPLETIONS}), and columns of the data set"
            )
        placed = tuple(names[:2]) if positional else ()
        return cls(target, positional, placed, tuple(p.name for p in rest), required, takes_all)

    def bind(
        self, prompts: list[str], responses: list[str], columns: list[dict[str, Any]]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return the positional and keyword arguments of a call. Raise UserError if a needed column is missing."""
        names = {name for row in columns for name in row} - set(self.placed)
        table: dict[str, Any] = {name: [row.get(name) for row in columns] for name in sorted(names)}
        if not self.positional:
            table[PROMPTS], table[RESPONSES] = prompts, responses
            if COMPLETIONS in self.named or (self.takes_all and RESPONSES not in self.named):
                turns = [row.get(MESSAGES) for row in columns]
                table[PROMPTS] = [messages or text for messages, text in zip(turns, prompts, strict=True)]
                table[COMPLETIONS] = [
                    [{"role": "assistant", "content": text.strip()}] if messages else text
                    for messages, text in zip(turns, responses, strict=True)
                ]
        if missing := [name for name in self.required if name not in table]:
            available = f"its columns are {', '.join(sorted(names))}" if names else "it has no further columns"
            raise UserError(
                f"reward.target: {self.target} takes the columns {', '.join(missing)}, which the data set lacks; "
                f"{available}"
            )
        keywords = {name: values for name, values in table.items() if self.takes_all or name in self.named}
        return ((prompts, responses) if self.positional else ()), keywords


def await_result(result: Any, count: int) -> Any:
    """Return a function's result after running a coroutine, a list of coroutines or an iterator in its place.

    Of an iterator at most `count` + 1 items are taken, which tells if there are too many.
    """

    async def run() -> Any:
        value = await result if inspect.isawaitable(result) else result
        return list(await asyncio.gather(*value)) if is_list_of_awaitables(value) else value

    value = asyncio.run(run()) if inspect.isawaitable(result) or is_list_of_awaitables(result) else result
    return list(islice(value, count + 1)) if isinstance(value, Iterator) else value


def is_list_of_awaitables(value: Any) -> bool:
    """Return True if `value` is a non-empty list or tuple of coroutines or other awaitables."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(inspect.isawaitable, value))


def import_function(target: str) -> Callable[..., Any]:
    """Import the function that FILE.py:NAME or package.module:NAME names; of a class, make the object that is called.

    Raise UserError naming the missing part.
    """
    source, separator, name = target.rpartition(":")
    if not separator or not source or not name:
        raise UserError(f"reward.target: {target!r} is not of the form FILE.py:NAME or package.module:NAME")
    try:
        function = import_object(target)
    except ImportError as error:
        raise UserError(f"reward.target: {error}") from error
    if isinstance(function, type):
        try:
            function = function()
        except Exception as error:
            reason = f"{describe_exception(error)}{format_raise_location(error)}"
            raise UserError(
                f"reward.target: {name} is a class that cannot be called without arguments ({reason}); name a "
                "function, or an object of the class"
            ) from error
    if not callable(function):
        raise UserError(f"reward.target: {source} has no function {name}")
    return function
