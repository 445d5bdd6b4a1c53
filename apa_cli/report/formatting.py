"""Settings as short texts for tables, legends and titles."""

from __future__ import annotations

from collections.abc import Sequence


def format_value(value: object) -> str:
    """Return a setting as a user would write it; "–" for a missing setting."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_lambda(value: float, meaning: str | None) -> str:
    """Return λ with its meaning, "0.1 (temperature and pull)", or the number alone if the meaning is unknown."""
    return f"{format_value(value)} ({meaning})" if meaning else format_value(value)


def shorten_keys(keys: Sequence[str]) -> dict[str, str]:
    """Return for each dotted key its shortest ending that no other key has ("optimizer.lr" → "lr")."""

    def end(key: str, length: int) -> str:
        return ".".join(key.split(".")[-length:])

    short = {}
    for key in keys:
        others = [other for other in keys if other != key]
        lengths = range(1, key.count(".") + 2)
        short[key] = next((end(key, n) for n in lengths if end(key, n) not in {end(o, n) for o in others}), key)
    return short
