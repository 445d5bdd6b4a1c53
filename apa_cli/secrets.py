"""Secrets of the environment: found, refused, redacted."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from apa_cli.errors import ConfigError

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?$", re.IGNORECASE)
"""The end of an environment variable's name that says that its value is a secret."""
SHORTEST_SECRET = 8
"""Characters; shorter values are words that may stand anywhere."""


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in nested mappings and lists that is neither."""
    if isinstance(value, dict):
        for key, entry in value.items():
            yield from leaves(entry, f"{place}.{key}" if place else str(key))
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from leaves(entry, f"{place}[{number}]")
    else:
        yield place, value


def secrets() -> dict[str, str]:
    """The environment's variables that are secrets by their names."""
    return {
        name: value.strip()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value.strip()) >= SHORTEST_SECRET
    }


def check_secrets(config: dict[str, Any]) -> None:
    """ConfigError for a value that holds a secret of the environment: config.yaml and trackers would get it."""
    hidden = secrets()
    for place, leaf in leaves(config):
        for name, value in hidden.items():
            if isinstance(leaf, str) and value in leaf:
                raise ConfigError(
                    f"{place}: it holds the value of the environment variable {name}, which config.yaml and trackers "
                    "would then hold too; keys that need a token take the variable's name"
                )


def without_secrets(text: str) -> str:
    """A text with the environment's secrets taken out."""
    for name, value in secrets().items():
        text = text.replace(value, f"<{name}>")
    return text
