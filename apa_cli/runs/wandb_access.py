"""Check of wandb's mode, API key and server, made before wandb itself tries to connect."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from apa_cli.network import is_reachable

SERVER_TIMEOUT = 4
"""Seconds that the wandb server has to respond before the run goes offline."""

PUBLIC_HOSTS = {"api.wandb.ai", "api.forge.coreweave.com"}
"""Two addresses of one public service: a key stored for either is valid for both."""


def find_offline_reason(mode: str, base_url: str, api_key: str | None) -> str | None:
    """Return the reason why a run is recorded offline, in words; None if it should go online.

    `mode` is the configured one; WANDB_MODE in the environment takes precedence. `base_url` and `api_key` are those of
    wandb's settings.
    """
    environment_mode = os.environ.get("WANDB_MODE", "").lower()
    if environment_mode in ("offline", "dryrun"):
        return f"WANDB_MODE is {environment_mode}"
    if mode == "offline":
        return "as configured"
    if not has_key(base_url, api_key):
        return "no API key (`wandb login` stores one)"
    if mode == "auto" and environment_mode != "online" and not is_reachable(base_url, SERVER_TIMEOUT):
        return f"no response from {base_url}"
    return None


def has_key(base_url: str, api_key: str | None) -> bool:
    """Return True if wandb would find credentials for its server without a prompt."""
    if api_key or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).netloc
    hosts = PUBLIC_HOSTS if host in PUBLIC_HOSTS else {host}
    files = [os.environ["NETRC"]] if os.environ.get("NETRC") else ["~/.netrc", "~/_netrc"]
    for name in files:
        try:
            stored = netrc.netrc(Path(name).expanduser()).hosts
        except (OSError, netrc.NetrcParseError, RuntimeError):  # missing or malformed file, no home folder
            continue
        if hosts & set(stored):
            return True
    return False
