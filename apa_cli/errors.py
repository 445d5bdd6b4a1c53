"""Errors that a user can mend, and their one-line texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


def first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class UserError(Exception):
    """Something the user can mend: shown as one line, without a traceback. `status` is the exit status."""

    status = 1


class ConfigError(UserError):
    """A configuration that cannot be run."""

    status = 2
