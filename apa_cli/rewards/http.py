"""reward=http: an endpoint that takes prompts and responses as JSON and answers with their scores."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage
from ssl import SSLCertVerificationError
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import Placement, Reward, Score, TimeLimit, within
from apa_cli.types import AtLeastOne, NonNegative, Positive

PRINTABLE = set(map(chr, range(33, 127)))
"""What an address may be written with."""
THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


class TryAgain(Exception):
    """A request that may succeed later; `wait` is what the endpoint asked for, in seconds."""

    def __init__(self, message: str, wait: float | None = None):
        super().__init__(message)
        self.wait = wait


class NoRedirect(HTTPRedirectHandler):
    """Texts and token go to the address that was given and to no other."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class HTTPReward(Reward):
    """POSTs {"prompts": [...], "responses": [...]} in batches; the answer is {"scores": [...]}, one number for each.

    Certificates are verified, redirects are not followed, and an answer is read up to `max_bytes`. What may pass is
    tried again with growing waits; anything else, and the last failure, is a UserError.
    """

    url: str
    columns: list[str]
    batch_size: Annotated[int, AtLeastOne]
    concurrency: Annotated[int, AtLeastOne]
    timeout: Annotated[float, Positive]
    retries: Annotated[int, NonNegative]
    backoff: Annotated[float, NonNegative]
    longest_backoff: Annotated[float, NonNegative]
    max_bytes: Annotated[int, AtLeastOne]
    token_env: str | None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"reward.url: {self.url!r} is no address ({error})") from error
        if parts.scheme not in ("http", "https") or not host or not set(self.url) <= PRINTABLE:
            raise ConfigError(f"reward.url: {self.url!r} is no address of the form https://HOST/PATH")
        if parts.username or parts.password:
            raise ConfigError("reward.url: it holds a name or password; reward.token_env names a variable with a token")
        if self.token_env is not None and parts.scheme == "http" and host not in THIS_MACHINE:
            raise ConfigError(f"reward.url: a token is sent over https only, or within this machine; got {self.url}")

    def load(self, place: Placement) -> Score:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "apa-cli"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {token(self.token_env)}"

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            bodies = [
                self.body(
                    prompts[i : i + self.batch_size],
                    responses[i : i + self.batch_size],
                    columns[i : i + self.batch_size],
                )
                for i in range(0, len(responses), self.batch_size)
            ]
            counts = [min(self.batch_size, len(responses) - i) for i in range(0, len(responses), self.batch_size)]
            failed = threading.Event()
            with ThreadPoolExecutor(self.concurrency) as pool:
                asked = [
                    pool.submit(self.scores, body, count, headers, failed)
                    for body, count in zip(bodies, counts, strict=True)
                ]
                try:
                    done, _ = wait(asked, return_when=FIRST_EXCEPTION)
                    for answer in done:
                        answer.result()  # raises what one of them raised, whichever others still wait
                    return [value for answer in asked for value in answer.result()]
                finally:  # after a failure nothing more is waited for or sent
                    failed.set()
                    pool.shutdown(wait=False, cancel_futures=True)

        return score

    def body(self, prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> bytes:
        """What is sent for one batch."""
        sent: dict[str, Any] = {"prompts": prompts, "responses": responses}
        for name in self.columns:
            if not any(name in row for row in columns):
                raise UserError(f"reward.columns: the data set has no column {name}")
            sent.setdefault("columns", {})[name] = [row.get(name) for row in columns]
        return json.dumps(sent).encode()

    def scores(self, body: bytes, count: int, headers: dict[str, str], failed: threading.Event) -> list[float]:
        """The scores of one batch of `count` responses, in as many tries as are allowed."""
        for number in range(self.retries + 1):
            try:
                return checked_scores(self.answer(body, headers), count, self.url)
            except TryAgain as error:
                pause = max(self.backoff * 2**number, error.wait or 0.0)
                if number == self.retries or failed.wait(min(pause, self.longest_backoff)):
                    tries = f"{number + 1} {'try' if number == 0 else 'tries'}"
                    raise UserError(f"reward: no scores from {self.url} in {tries}; the last: {error}") from error
        raise AssertionError("unreachable: the last try returns or raises")

    def answer(self, body: bytes, headers: dict[str, str]) -> bytes:
        """The body of one answer. TryAgain where another try may help, else UserError."""
        request = Request(self.url, data=body, headers=headers, method="POST")
        try:
            return within(self.timeout, lambda: self.exchange(request))
        except HTTPError as error:
            raise refused(error, self.url) from error
        except (TimeoutError, TimeLimit) as error:
            raise TryAgain(f"no answer within {self.timeout:g} s") from error
        except URLError as error:
            if isinstance(error.reason, SSLCertVerificationError):
                why = error.reason.verify_message
                raise UserError(f"reward: the certificate of {self.url} is not trusted ({why})") from error
            raise TryAgain(f"no connection ({error.reason})") from error
        except (OSError, HTTPException) as error:
            raise TryAgain(f"the connection broke ({type(error).__name__})") from error

    def exchange(self, request: Request) -> bytes:
        """One request and its answer, at most `max_bytes` of it."""
        with build_opener(NoRedirect).open(request, timeout=self.timeout) as response:
            found = response.read(self.max_bytes + 1)
        if len(found) > self.max_bytes:
            raise UserError(f"reward: the answer of {self.url} is longer than reward.max_bytes {self.max_bytes}")
        return found


def token(variable: str) -> str:
    """The token in an environment variable. UserError, without it, where there is none that can be sent."""
    found = os.environ.get(variable, "").strip()
    if not found or not (found.isascii() and found.isprintable()):
        raise UserError(f"reward.token_env: the environment has no {variable} with a token in it")
    return found


def refused(error: HTTPError, url: str) -> Exception:
    """What an answer with another status than 2xx means."""
    if error.code == 429 or error.code >= 500:
        return TryAgain(f"status {error.code}", retry_after(error.headers))
    if 300 <= error.code < 400:
        target = " ".join(str(error.headers.get("Location", "")).split())[:200]
        return UserError(
            f"reward: {url} redirects to {target!r}, which is not followed; give that address if it is right"
        )
    return UserError(f"reward: {url} answers with status {error.code}, which another try does not change")


def retry_after(headers: HTTPMessage) -> float | None:
    """Seconds that an answer asks to wait: a number, or the time until a date."""
    said = headers.get("Retry-After", "")
    try:
        seconds = float(said) if said[:1].isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def checked_scores(answer: bytes, count: int, url: str) -> list[float]:
    """The scores in an answer. UserError saying what else it is."""
    start = answer[:60].decode("utf-8", "replace")
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise UserError(f"reward: the answer of {url} is not JSON, it begins with {start!r}") from error
    scores = found.get("scores") if isinstance(found, dict) else None
    if not isinstance(scores, list) or any(isinstance(s, bool) or not isinstance(s, int | float) for s in scores):
        raise UserError(f"reward: the answer of {url} is not {{'scores': [numbers]}}, it begins with {start!r}")
    if len(scores) != count:
        raise UserError(f"reward: {url} was sent {count} responses and answered with {len(scores)} scores")
    return scores
