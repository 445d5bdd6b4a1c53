"""reward=function: any Python function of prompts and responses."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from apa_cli.errors import UserError
from apa_cli.rewards.base import Placement, Reward, Score, TimeLimit, within
from apa_cli.types import Positive


@dataclass(frozen=True)
class FunctionReward(Reward):
    """Calls NAME(prompts, responses, **columns) of `target` FILE.py:NAME or package.module:NAME.

    `prompts` and `responses` are lists of texts; each further column of the data set is a list as long. A
    function without **keywords gets those columns alone whose names it takes. It returns one finite number
    per response; it may be async, or return one coroutine per response, which then run side by side. With a
    `timeout` each call is made in a thread of its own, which is left behind where it takes longer.
    """

    target: str
    timeout: Annotated[float | None, Positive]

    def load(self, place: Placement) -> Score:
        function = imported(self.target)
        parameters = inspect.signature(function).parameters
        optional = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
        required = [name for name, p in list(parameters.items())[2:] if p.default is p.empty and p.kind not in optional]
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            names = {name for row in columns for name in row}
            if lacking := [name for name in required if name not in names]:
                has = f"has {', '.join(sorted(names))}" if names else "has no further ones"
                raise UserError(f"reward: {self.target} takes {', '.join(lacking)}; the data set {has}")
            wanted = {name for name in names if takes_all or name in parameters}
            table = {name: [row.get(name) for row in columns] for name in sorted(wanted)}
            try:
                return within(self.timeout, lambda: settled(function(prompts, responses, **table)))
            except TimeLimit as error:
                raise UserError(
                    f"reward: {self.target} has not returned within {self.timeout:g} s (reward.timeout)"
                ) from error
            except UserError:
                raise
            except Exception as error:
                frame = _last_frame(error)
                raise UserError(f"reward: {self.target} raised {one_line(error)}{frame}") from error

        return score


def settled(result: Any) -> Any:
    """What a function returned; coroutines, one or a list of them, and a generator have run to their end."""

    async def wait() -> Any:
        value = await result if inspect.isawaitable(result) else result
        return list(await asyncio.gather(*value)) if pending(value) else value

    value = asyncio.run(wait()) if inspect.isawaitable(result) or pending(result) else result
    return list(value) if inspect.isgenerator(value) else value


def pending(value: Any) -> bool:
    """Whether it is a list of coroutines."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(map(inspect.isawaitable, value))


def imported(target: str) -> Callable[..., Any]:
    """The function that FILE.py:NAME or package.module:NAME names. UserError says which part is not there."""
    where, separator, name = target.rpartition(":")
    if not separator or not where or not name:
        raise UserError(f"reward.target: {target!r} is not of the form FILE.py:NAME or package.module:NAME")
    try:
        module = _from_file(Path(where).expanduser()) if where.endswith(".py") else _from_name(where)
    except Exception as error:
        raise UserError(f"reward.target: cannot import {where} ({one_line(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"reward.target: {where} has no function {name}")
    return function


def one_line(error: BaseException) -> str:
    """An exception as its name and message, without line breaks."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _from_file(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"no file {file}")
    spec = importlib.util.spec_from_file_location(f"apa_reward_{file.stem}", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _from_name(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    return importlib.import_module(name)


def _last_frame(error: BaseException) -> str:
    """Where in the user's code it happened."""
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    return f" ({Path(trace.tb_frame.f_code.co_filename).name}, line {trace.tb_lineno})" if trace else ""
