"""Quick reachability checks, made before a library would retry the same request for minutes."""

from __future__ import annotations

import ssl
import sys
import threading
from functools import cache
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

HUB_TIMEOUT = 8
"""Seconds to wait for the model hub."""


def is_reachable(url: str, timeout: float) -> bool:
    """Return True if a server responds at `url`, even with an error, within `timeout` seconds."""
    return fetch_status(url, timeout) is not None


def fetch_status(url: str, timeout: float) -> int | None:
    """Return the HTTP status of a GET request, or None without a response within `timeout` seconds.

    The request runs in a thread of its own because a DNS lookup may exceed any socket timeout. The environment's
    proxy settings apply.
    """
    statuses: list[int | None] = []
    thread = threading.Thread(target=lambda: statuses.append(request_status(url, timeout)), daemon=True)
    thread.start()
    thread.join(timeout)
    return statuses[0] if statuses else None


def request_status(url: str, timeout: float) -> int | None:
    """Return the HTTP status of a GET request, 0 if the server's certificate is not trusted, None without a response.

    `timeout`, in seconds, does not cover the DNS lookup.
    """
    try:
        with urlopen(url, timeout=timeout) as response:
            return int(response.status)
    except HTTPError as error:
        return error.code
    except URLError as error:
        return 0 if isinstance(error.reason, ssl.SSLError) else None
    except (OSError, ValueError):
        return None


@cache
def probe_hub() -> bool:
    """Return True if the model hub responds; checked once per process, before the first request to the hub.

    If the hub does not respond, `huggingface_hub` and `datasets` are switched to offline mode: they then use cached
    files or fail at once, instead of retrying every file for minutes.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    status = fetch_status(constants.ENDPOINT, HUB_TIMEOUT)
    if status is None or status >= 500:
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True
        return False
    return True
