"""Errors that a user can fix, and their one-line messages."""

from __future__ import annotations


class UserError(Exception):
    """An error that the user can fix, shown as one line without a traceback; `status` is the exit status."""

    status = 1
    details = ""
    """Lines for run.log alone, such as the traceback of the user's code."""


class ConfigError(UserError):
    """A configuration that cannot be run."""

    status = 2


def find_details(error: BaseException | None) -> str:
    """Return the details of the error or of the first of its causes that has any; "" if none has."""
    while error is not None:
        if details := getattr(error, "details", ""):
            return details
        error = error.__cause__
    return ""


def get_first_line(error: BaseException) -> str:
    """Return the first line of the error's message, or the name of its class if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
