"""reward=http: an endpoint that takes prompts and responses as JSON and returns their scores."""

from __future__ import annotations

import json
import math
import os
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from email.message import Message
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from ssl import SSLCertVerificationError
from typing import Annotated, Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import CallTimeout, Placement, Reward, ScoreFunction, Seconds, call_with_timeout
from apa_cli.types import AtLeastOne, NonNegative, Range

URL_CHARACTERS = set(map(chr, range(33, 127)))
"""Printable ASCII characters except the space."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")


class RetryableError(Exception):
    """A failed request that may succeed later. `delay` is the endpoint's Retry-After in seconds; None: not given."""

    def __init__(self, message: str, delay: float | None = None):
        super().__init__(message)
        self.delay = delay


class NoRedirectHandler(HTTPRedirectHandler):
    """A handler that follows no redirect, so that texts and token reach the configured address only."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass(frozen=True)
class HTTPReward(Reward):
    """A reward behind an HTTP endpoint.

    Each batch is sent by POST as {"prompts": [...], "responses": [...]} and answered by {"scores": [...]}, one number
    per response. Certificates are verified, redirects are not followed, and at most `max_bytes` of an answer are read.
    A RetryableError is retried with exponential backoff; the last one, and any other failure, is a UserError.
    `timeout`, `backoff` and `longest_backoff` are in seconds.
    """

    url: str
    columns: list[str]
    batch_size: Annotated[int, AtLeastOne]
    concurrency: Annotated[int, AtLeastOne]
    timeout: Annotated[float, Seconds]
    retries: Annotated[int, NonNegative]
    backoff: Annotated[float, Range(0, 10**9)]
    longest_backoff: Annotated[float, Range(0, 10**9)]
    max_bytes: Annotated[int, Range(1, 10**15)]
    token_env: str | None

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ConfigError(f"reward.url: {self.url!r} is not a URL ({error})") from error
        if parts.scheme not in ("http", "https") or not host or not set(self.url) <= URL_CHARACTERS:
            raise ConfigError(f"reward.url: {self.url!r} is not a URL of the form https://HOST/PATH")
        if parts.username or parts.password:
            raise ConfigError(
                "reward.url: the URL contains a user name or password; give a token through reward.token_env instead"
            )
        if self.token_env is not None and parts.scheme == "http" and host not in LOCAL_HOSTS:
            raise ConfigError(
                f"reward.url: {self.url} is not https, and a token is sent over https or to this machine only; give "
                "https://…"
            )

    def load(self, placement: Placement) -> ScoreFunction:
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "apa-cli"}
        if self.token_env is not None:
            headers["Authorization"] = f"Bearer {read_token(self.token_env)}"

        def score(prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> list[float]:
            size = self.batch_size
            starts = range(0, len(responses), size)
            bodies = [
                self.encode_request(prompts[i : i + size], responses[i : i + size], columns[i : i + size])
                for i in starts
            ]
            counts = [min(size, len(responses) - i) for i in starts]
            cancelled = threading.Event()
            with ThreadPoolExecutor(self.concurrency) as pool:
                futures = [
                    pool.submit(self.request_scores, body, count, headers, cancelled)
                    for body, count in zip(bodies, counts, strict=True)
                ]
                try:
                    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                    for future in done:
                        future.result()  # raises the first failure while other requests are still under way
                    return [value for future in futures for value in future.result()]
                finally:  # after a failure no request is waited for, retried or started
                    cancelled.set()
                    pool.shutdown(wait=False, cancel_futures=True)

        return score

    def encode_request(self, prompts: list[str], responses: list[str], columns: list[dict[str, Any]]) -> bytes:
        """Return the JSON body of one batch. Raise UserError if the data set lacks one of `self.columns`."""
        content: dict[str, Any] = {"prompts": prompts, "responses": responses}
        for name in self.columns:
            if not any(name in row for row in columns):
                raise UserError(f"reward.columns: the data set has no column {name}")
            content.setdefault("columns", {})[name] = [row.get(name) for row in columns]
        return json.dumps(content).encode()

    def request_scores(
        self, body: bytes, count: int, headers: dict[str, str], cancelled: threading.Event
    ) -> list[float]:
        """Return the scores of one batch of `count` responses, retrying up to `retries` times.

        Raise UserError once the retries are used up or `cancelled` is set.
        """
        for attempt in range(1, self.retries + 2):
            try:
                return parse_scores(self.post(body, headers), count, self.url)
            except RetryableError as error:
                if attempt > self.retries or cancelled.wait(self.compute_delay(attempt, error.delay)):
                    attempts = f"{attempt} {'attempt' if attempt == 1 else 'attempts'}"
                    raise UserError(
                        f"reward.url: no scores from {self.url} in {attempts}; the last error: {error}"
                    ) from error
        raise AssertionError("unreachable: the last attempt returns or raises")

    def compute_delay(self, attempt: int, asked: float | None) -> float:
        """Return the seconds to wait after attempt number `attempt`, at least those that Retry-After asked for."""
        doublings = min(attempt - 1, 100)  # 2**1024 is no float
        return min(max(self.backoff * 2.0**doublings, asked or 0.0), self.longest_backoff)

    def post(self, body: bytes, headers: dict[str, str]) -> bytes:
        """Send one request and return the body of its answer.

        Raise RetryableError for no answer in time, no connection, or status 429 or 5xx; UserError for other failures.
        """
        request = Request(self.url, data=body, headers=headers, method="POST")
        try:
            return call_with_timeout(lambda: self.read_response(request), self.timeout)
        except HTTPError as error:
            raise make_status_error(error, self.url) from error
        except (TimeoutError, CallTimeout) as error:
            raise RetryableError(f"no answer within {self.timeout:g} s") from error
        except URLError as error:
            if isinstance(error.reason, SSLCertVerificationError):
                reason = error.reason.verify_message
                raise UserError(f"reward.url: the certificate of {self.url} is not trusted ({reason})") from error
            raise RetryableError(f"no connection ({error.reason})") from error
        except (OSError, HTTPException) as error:
            raise RetryableError(f"the connection broke ({type(error).__name__})") from error

    def read_response(self, request: Request) -> bytes:
        """Send `request` and return the body of its answer. Raise UserError if that is longer than `max_bytes`."""
        with build_opener(NoRedirectHandler).open(request, timeout=self.timeout) as response:
            content = response.read(self.max_bytes + 1)
        if len(content) > self.max_bytes:
            raise UserError(f"reward.max_bytes: the answer of {self.url} is longer than {self.max_bytes} bytes")
        return content


def read_token(variable: str) -> str:
    """Return the token in an environment variable. Raise UserError, without the value, if it cannot be sent."""
    token = os.environ.get(variable, "").strip()
    if not token or not (token.isascii() and token.isprintable()):
        raise UserError(f"reward.token_env: the environment variable {variable} holds no token; export it first")
    return token


def make_status_error(error: HTTPError, url: str) -> Exception:
    """Return the RetryableError or UserError for an answer whose status is not 2xx."""
    if error.code == 429 or error.code >= 500:
        return RetryableError(f"status {error.code}", parse_retry_after(error.headers))
    if 300 <= error.code < 400:
        target = " ".join(str(error.headers.get("Location", "")).split())[:200]
        return UserError(
            f"reward.url: {url} redirects to {target!r}, and redirects are not followed; give that address if you "
            "trust it"
        )
    return UserError(f"reward.url: {url} answers with status {error.code}, which is not retried")


def parse_retry_after(headers: Message) -> float | None:
    """Return the seconds to wait that a Retry-After header gives, as a number or a date; None if it gives none."""
    value = headers.get("Retry-After", "")
    try:
        seconds = float(value) if value[:1].isdigit() else parsedate_to_datetime(value).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None


def parse_scores(answer: bytes, count: int, url: str) -> list[float]:
    """Return the `count` scores in the body of an answer. Raise UserError if the body has another form."""
    start = answer[:60].decode("utf-8", "replace")
    try:
        content = json.loads(answer)
    except (ValueError, RecursionError) as error:
        raise UserError(f"reward.url: the answer of {url} is not JSON, it begins with {start!r}") from error
    scores = content.get("scores") if isinstance(content, dict) else None
    if not isinstance(scores, list) or any(isinstance(s, bool) or not isinstance(s, int | float) for s in scores):
        raise UserError(f"reward.url: the answer of {url} is not {{'scores': [numbers]}}, it begins with {start!r}")
    if len(scores) != count:
        raise UserError(f"reward.url: expected {count} scores from {url}, got {len(scores)}")
    return scores
