"""reward=function: any Python function of prompts and responses."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from apa_cli.errors import UserError
from apa_cli.rewards.base import CallTimeout, Placement, Reward, ScoreFunction, call_with_timeout
from apa_cli.types import Positive
from apa_cli.user_code import describe_exception, import_object


@dataclass(frozen=True)
class FunctionReward(Reward):
    """A reward that calls the user's function NAME(prompts, responses, **columns).

    `target` names the function as FILE.py:NAME or package.module:NAME. `prompts` and `responses` are lists of N texts;
    each further column of the data set is a list of N values. A function without **keywords receives only the columns
    that its parameters name. The function returns N finite numbers; it may be async, or return N coroutines, which
    then run concurrently. `timeout` is in seconds per call.
    """

    target: str
    timeout: Annotated[float | None, Positive]

    def load(self, placement: Placement) -> ScoreFunction:
        function = import_function(self.target)
        parameters = inspect.signature(function).parameters
        variadic = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        required = [name for name, p in list(parameters.items())[2:] if p.default is p.empty and p.kind not in variadic]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            names = {name for row in columns for name in row}
            if missing := [name for name in required if name not in names]:
                available = f"its columns are {', '.join(sorted(names))}" if names else "it has no further columns"
                raise UserError(
                    f"reward.target: {self.target} takes the columns {', '.join(missing)}, which the data set lacks; "
                    f"{available}"
                )
            passed = {name for name in names if takes_all or name in parameters}
            table = {name: [row.get(name) for row in columns] for name in sorted(passed)}
            try:
                return call_with_timeout(lambda: await_result(function(prompts, responses, **table)), self.timeout)
            except CallTimeout as error:
                raise UserError(
                    f"reward.timeout: {self.target} has not returned within {self.timeout:g} s; raise the limit, or "
                    "set null for no limit"
                ) from error
            except UserError:
                raise
            except Exception as error:
                location = _format_last_frame(error)
                raise UserError(f"reward: {self.target} raised {describe_exception(error)}{location}") from error

        return score


def await_result(result: Any) -> Any:
    """Return a function's result after running a coroutine, a list of coroutines or a generator in its place."""

    async def run() -> Any:
        value = await result if inspect.isawaitable(result) else result
        return list(await asyncio.gather(*value)) if is_list_of_awaitables(value) else value

    value = asyncio.run(run()) if inspect.isawaitable(result) or is_list_of_awaitables(result) else result
    return list(value) if inspect.isgenerator(value) else value


def is_list_of_awaitables(value: Any) -> bool:
    """Return True if `value` is a non-empty list or tuple of coroutines or other awaitables."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(inspect.isawaitable, value))


def import_function(target: str) -> Callable[..., Any]:
    """Import the function that FILE.py:NAME or package.module:NAME names. Raise UserError naming the missing part."""
    source, separator, name = target.rpartition(":")
    if not separator or not source or not name:
        raise UserError(f"reward.target: {target!r} is not of the form FILE.py:NAME or package.module:NAME")
    try:
        function = import_object(target)
    except ImportError as error:
        raise UserError(f"reward.target: {error}") from error
    if not callable(function):
        raise UserError(f"reward.target: {source} has no function {name}")
    return function


def _format_last_frame(error: BaseException) -> str:
    """Return the file and line that raised, in the user's code, as " (FILE, line N)"; "" without a traceback."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
