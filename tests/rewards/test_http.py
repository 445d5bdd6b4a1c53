"""reward=http against servers on the loopback address, each with one fault."""

import json
import subprocess
import threading
import time
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ssl import PROTOCOL_TLS_SERVER, SSLContext

import pytest

from apa_cli.errors import ConfigError, UserError
from apa_cli.rewards.base import Placement, add_score_check
from apa_cli.rewards.http import HTTPReward

PROMPTS = [f"prompt {number}" for number in range(5)]
RESPONSES = ["a", "bb", "", "dddd", "é" * 7]
COLUMNS = [{"topic": "tea", "secret": number} for number in range(5)]
LENGTHS = [1.0, 2.0, 0.0, 4.0, 7.0]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


class Server:
    """A scoring server on a free port.

    `answers(number, request)` gives (status, headers, body) for request number 0, 1, …; None closes the connection.
    `requests` holds the JSON of each request, with its headers under "headers"; `times` their times of arrival in s.
    """

    def __init__(self, answers, context=None):
        self.requests, self.times, lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                text = handler.rfile.read(int(handler.headers["Content-Length"]))
                request = json.loads(text) | {"headers": dict(handler.headers)}
                with lock:
                    number = len(self.requests)
                    self.requests.append(request)
                    self.times.append(time.monotonic())
                answer = answers(number, request)
                if answer is None:
                    handler.close_connection = True
                    return
                status, headers, body = answer
                handler.send_response(status)
                for name, value in headers.items():
                    handler.send_header(name, value)
                handler.end_headers()
                chunks = [body] if isinstance(body, bytes) else body
                try:
                    for chunk in chunks:
                        handler.wfile.write(chunk)
                except OSError:
                    pass

            def log_message(handler, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        if context is not None:
            self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'http' if context is None else 'https'}://127.0.0.1:{self.server.server_port}/score"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()


@contextmanager
def run_server(answers, context=None):
    server = Server(answers, context)
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()


def answer_lengths(number, request):
    return 200, {}, json.dumps({"scores": [len(text) for text in request["responses"]]}).encode()


def make_reward(url, **changes):
    settings = {
        "columns": [], "batch_size": 2, "concurrency": 2, "timeout": 5.0, "retries": 2, "backoff": 0.01,
        "longest_backoff": 0.1, "max_bytes": 1000, "token_env": None,
    }  # fmt: skip
    return HTTPReward(url, **{**settings, **changes})


def score(url, **changes):
    return make_reward(url, **changes).load(Placement("cpu", "float32"))(PROMPTS, RESPONSES, COLUMNS)


def score_and_fail(answers, context=None, **changes) -> tuple[str, Server, float]:
    """Score once, expecting a UserError; return its message, the server, and the seconds that it took."""
    start = time.monotonic()
    with run_server(answers, context) as server:
        with pytest.raises(UserError) as error:
            score(server.url, **changes)
        assert "\n" not in str(error.value) and server.url in str(error.value)
        return str(error.value), server, time.monotonic() - start


def test_scores_keep_their_order_and_only_the_texts_are_sent():
    def answer_first_batch_last(number, request):
        time.sleep(0.1 if request["responses"][0] == "a" else 0)
        return answer_lengths(number, request)

    with run_server(answer_first_batch_last) as server:
        assert score(server.url) == LENGTHS
    requests = sorted(server.requests, key=lambda request: request["prompts"])
    assert [request["responses"] for request in requests] == [["a", "bb"], ["", "dddd"], ["é" * 7]]
    assert [request["prompts"] for request in requests] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    for request in requests:
        assert request.keys() == {"prompts", "responses", "headers"}
        assert "Authorization" not in request["headers"] and request["headers"]["Content-Type"] == "application/json"


def test_only_the_listed_columns_are_sent():
    with run_server(answer_lengths) as server:
        score(server.url, columns=["topic"], batch_size=5)
    assert server.requests[0]["columns"] == {"topic": ["tea"] * 5}
    with pytest.raises(UserError, match=r"reward\.columns: the data set has no column colour"):
        score(server.url, columns=["colour"])


def test_requests_are_concurrent():
    barrier = threading.Barrier(2, timeout=5)

    def answer_together(number, request):
        if len(request["responses"]) == 2:  # the two full batches wait here for each other
            barrier.wait()
        return answer_lengths(number, request)

    with run_server(answer_together) as server:
        assert score(server.url) == LENGTHS


@pytest.mark.parametrize("fault", [(503, {}, b"busy"), (429, {}, b""), None], ids=["503", "429", "closed"])
def test_temporary_failures_are_retried(fault):
    with run_server(lambda number, request: fault if number < 2 else answer_lengths(number, request)) as server:
        assert score(server.url, batch_size=5) == LENGTHS
    assert len(server.requests) == 3
    assert server.requests[0]["responses"] == server.requests[2]["responses"] == RESPONSES


def test_the_delay_doubles_up_to_the_longest():
    message, server, _ = score_and_fail(
        lambda *_: (500, {}, b""), batch_size=5, retries=4, backoff=0.1, longest_backoff=0.25, concurrency=1
    )
    delays = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert len(delays) == 4
    for delay, least in zip(delays, [0.1, 0.2, 0.25, 0.25], strict=True):
        assert least <= delay < least + 0.15
    assert "in 5 attempts; the last error: status 500" in message


def test_the_delay_after_many_attempts_is_the_longest():
    reward = make_reward("http://127.0.0.1:9/", retries=5000, backoff=0.5, longest_backoff=60.0)
    # 0.5 · 2⁰, 0.5 · 2³; 0.5 · 2⁴⁹⁹⁹ exceeds the range of floats.
    assert [reward.compute_delay(attempt, None) for attempt in (1, 4, 5000)] == [0.5, 4.0, 60.0]
    assert (reward.compute_delay(1, 7.0), reward.compute_delay(1, 700.0)) == (7.0, 60.0)


@pytest.mark.parametrize("value", ["0.3", "date"])
def test_retry_after_is_respected(value):
    def answer_later(number, request):
        # A date has whole seconds, so it is 1 to 2 s ahead.
        header = formatdate(time.time() + 2, usegmt=True) if value == "date" else value
        return (429, {"Retry-After": header}, b"") if number == 0 else answer_lengths(number, request)

    with run_server(answer_later) as server:
        assert score(server.url, batch_size=5, longest_backoff=5.0) == LENGTHS
    first, second = server.times
    assert second - first > (0.9 if value == "date" else 0.29)


def test_retry_after_is_limited_by_longest_backoff():
    _, server, seconds = score_and_fail(lambda *_: (429, {"Retry-After": "3600"}, b""), batch_size=5)
    assert len(server.requests) == 3 and seconds < 3


@pytest.mark.parametrize("value", ["nan", "9" * 400, "soon", "Mon, 99 Foo", "-5"])
def test_an_invalid_retry_after_is_ignored(value):
    _, server, _ = score_and_fail(lambda *_: (503, {"Retry-After": value}, b""), batch_size=5, retries=1)
    assert len(server.requests) == 2


def test_a_missing_endpoint_is_reported():
    with run_server(answer_lengths) as server:
        url = server.url
    with pytest.raises(UserError, match="in 3 attempts; the last error: no connection"):
        score(url)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_permanent_failures_are_not_retried(status):
    message, server, _ = score_and_fail(lambda *_: (status, {}, b"no"), batch_size=5)
    assert f"status {status}" in message and len(server.requests) == 1


def test_a_permanent_failure_cancels_the_retries_of_other_batches():
    def answers(number, request):
        return (404, {}, b"") if "" in request["responses"] else (503, {}, b"")

    message, _, seconds = score_and_fail(answers, backoff=20.0, longest_backoff=20.0)
    assert "404" in message and seconds < 5


def test_redirects_are_not_followed():
    with run_server(answer_lengths) as other:
        for status in (301, 302, 307, 308):
            message, _, _ = score_and_fail(lambda *_, status=status: (status, {"Location": other.url}, b""))
            assert other.url in message and "not followed" in message
    assert other.requests == []


def answer_in_drips(*_):
    def body():
        for _ in range(60):
            time.sleep(0.05)
            yield b" "

    return 200, {}, body()


@pytest.mark.parametrize("answers", [answer_in_drips, lambda *_: time.sleep(3)], ids=["drip", "silence"])
def test_a_slow_answer_times_out(answers):
    message, server, seconds = score_and_fail(answers, batch_size=5, timeout=0.3, retries=1)
    assert "no answer within 0.3 s" in message and len(server.requests) == 2 and seconds < 2.5


def test_a_long_answer_is_not_read_to_its_end():
    chunks = []

    def endless():
        for number in range(10000):
            chunks.append(number)
            yield b" " * 10000

    message, server, _ = score_and_fail(lambda *_: (200, {}, endless()), batch_size=5)
    assert "is longer than 1000 bytes" in message and len(server.requests) == 1
    assert len(chunks) < 5000
    exact = json.dumps({"scores": [1, 2, 3, 4, 5]}).encode().ljust(1000)
    with run_server(lambda *_: (200, {}, exact)) as server:
        assert score(server.url, batch_size=5) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>hello", "is not JSON, it begins with '<html>hello'"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"", "is not JSON"),
        (b"[" * 900, "is not JSON"),
        (b"[1, 2, 3, 4, 5]", "is not {'scores': [numbers]}"),
        (b'{"score": [1, 2, 3, 4, 5]}', "is not {'scores': [numbers]}"),
        (b'{"scores": [1, 2, 3, 4, "5"]}', "is not {'scores': [numbers]}"),
        (b'{"scores": [1, 2, 3, 4, true]}', "is not {'scores': [numbers]}"),
        (b'{"scores": [1, 2, 3, 4, null]}', "is not {'scores': [numbers]}"),
        (b'{"scores": [1, 2, 3, 4]}', "expected 5 scores"),
    ],
)
def test_an_invalid_answer_is_refused(answer, message):
    message, server, _ = score_and_fail(lambda *_: (200, {}, answer), batch_size=5)
    assert message in message and len(server.requests) == 1


@pytest.mark.parametrize(("number", "text"), [("NaN", "nan"), ("1e999", "inf"), ("1" + "0" * 400, "too large")])
def test_a_non_finite_score_is_named(number, text):
    answer = f'{{"scores": [1, {number}, 2, 3, 4]}}'.encode()
    with run_server(lambda *_: (200, {}, answer)) as server, pytest.raises(UserError, match=text):
        add_score_check(make_reward(server.url, batch_size=5).load(Placement("cpu", "float32")))(
            PROMPTS, RESPONSES, COLUMNS
        )


def test_a_self_signed_certificate_is_refused(tmp_path):
    files = ["-keyout", f"{tmp_path}/key", "-out", f"{tmp_path}/certificate"]
    command = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "1",
        "-subj",
        "/CN=127.0.0.1",
        *files,
    ]
    try:
        subprocess.run([*command, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is missing, which makes the certificate")
    context = SSLContext(PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{tmp_path}/certificate", f"{tmp_path}/key")
    message, server, _ = score_and_fail(answer_lengths, context)
    assert "certificate" in message and "self" in message and server.requests == []


def test_the_token_is_in_the_header_and_in_no_message(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", " hush-hush-1 \n")
    with run_server(answer_lengths) as server:
        assert score(server.url, token_env="MY_TOKEN") == LENGTHS
    assert {request["headers"]["Authorization"] for request in server.requests} == {"Bearer hush-hush-1"}
    message, _, _ = score_and_fail(lambda *_: (401, {}, b""), token_env="MY_TOKEN")
    assert "hush" not in message
    monkeypatch.setenv("MY_TOKEN", "hush\nhush")
    for variable in ("MY_TOKEN", "NO_SUCH_VARIABLE"):
        with pytest.raises(
            UserError, match=rf"reward\.token_env: the environment variable {variable} holds no token"
        ) as error:
            make_reward("https://127.0.0.1/", token_env=variable).load(Placement("cpu", "float32"))
        assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/score", "is not a URL"),
        ("ftp://127.0.0.1/score", "is not a URL"),
        ("file:///etc/passwd", "is not a URL"),
        ("http:///score", "is not a URL"),
        ("http://[::1/score", "is not a URL"),
        ("http://127.0.0.1:port/score", "is not a URL"),
        ("http://127.0.0.1/a b", "is not a URL"),
        ("http://127.0.0.1/a\nb", "is not a URL"),
        ("https://me:word@127.0.0.1/", "name or password"),
    ],
)
def test_an_invalid_address_is_refused(url, message):
    with pytest.raises(ConfigError, match=r"^reward\.url: ") as error:
        make_reward(url)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert "word@" not in str(error.value)


def test_a_token_needs_https():
    with pytest.raises(ConfigError, match=r"^reward\.url: .* is not https, and a token is sent over https"):
        make_reward("http://example.org/score", token_env="MY_TOKEN")
    make_reward("https://example.org/score", token_env="MY_TOKEN")
    make_reward("http://example.org/score")
