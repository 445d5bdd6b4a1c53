"""Detection, refusal and redaction of the environment's secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from apa_cli.errors import ConfigError

SECRET_NAME = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)S?$", re.IGNORECASE)
"""Pattern for the end of an environment variable's name that marks its value as a secret."""
MIN_SECRET_LENGTH = 8
"""Characters; shorter values are common words that a configuration may hold by coincidence."""


def iterate_leaves(value: object, key: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) for every value in nested mappings and lists that is itself neither."""
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from iterate_leaves(entry, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for index, entry in enumerate(value):
            yield from iterate_leaves(entry, f"{key}[{index}]")
    else:
        yield key, value


def read_secrets() -> dict[str, str]:
    """Return the environment variables that hold secrets, recognized by name: variable → value."""
    return {
        name: value.strip()
        for name, value in os.environ.items()
        if SECRET_NAME.search(name) and len(value.strip()) >= MIN_SECRET_LENGTH
    }


def check_secrets(config: dict[str, object]) -> None:
    """Raise ConfigError if a value contains an environment secret, which config.yaml and trackers would record."""
    secrets = read_secrets()
    for key, leaf in iterate_leaves(config):
        for name, secret in secrets.items():
            if isinstance(leaf, str) and secret in leaf:
                raise ConfigError(
                    f"{key}: contains the value of the environment variable {name}, which config.yaml and trackers "
                    "would record; keys that need a token take the variable's name"
                )


def redact_secrets(text: str) -> str:
    """Return the text with every secret of the environment replaced by its variable's name in angle brackets."""
    for name, secret in read_secrets().items():
        text = text.replace(secret, f"<{name}>")
    return text
