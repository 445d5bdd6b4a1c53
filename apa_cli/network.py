"""Whether a server answers, asked once and briefly, before a library asks it again and again."""

from __future__ import annotations

import ssl
import sys
import threading
from functools import cache
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

HUB_TIMEOUT = 8
"""Seconds the model hub has to answer."""


def answers(url: str, seconds: float) -> bool:
    """Whether a server answers at `url`, be it with an error, within `seconds` (through the proxy if there is one)."""
    return status(url, seconds) is not None


def status(url: str, seconds: float) -> int | None:
    """The HTTP status of an answer within `seconds`, None where there is none.

    Asked from a thread of its own, because looking up a name may hang for longer than any timeout given.
    """
    found: list[int | None] = []
    thread = threading.Thread(target=lambda: found.append(asked(url, seconds)), daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else None


def asked(url: str, seconds: float) -> int | None:
    """The same, as long as looking up a name takes. Status 0: it is there, and its certificate is not known."""
    try:
        with urlopen(url, timeout=seconds) as answer:
            return answer.status
    except HTTPError as error:
        return error.code
    except URLError as error:
        return 0 if isinstance(error.reason, ssl.SSLError) else None
    except (OSError, ValueError):
        return None


@cache
def hub_answers() -> bool:
    """Whether the model hub answers. Asked before anything else is asked of it, and once in a process.

    Where it does not, its libraries are told to work offline: they take what is cached, or fail at once, where they
    would try every file five times over minutes.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    found = status(constants.ENDPOINT, HUB_TIMEOUT)
    if found is None or found >= 500:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
    return True
