"""reward=http against servers on the loopback address, each with one kind of fault."""

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
from apa_cli.rewards.base import Placement
from apa_cli.rewards.http import HTTPReward

PROMPTS = [f"prompt {number}" for number in range(5)]
RESPONSES = ["a", "bb", "", "dddd", "é" * 7]
COLUMNS = [{"topic": "tea", "secret": number} for number in range(5)]
LENGTHS = [1.0, 2.0, 0.0, 4.0, 7.0]


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")


class Server:
    """`answers(number, request)` → (status, headers, body) of request number 0, 1, …, None: the connection is closed.

    `seen` are the requests: their JSON, and the headers under "headers".
    """

    def __init__(self, answers, context=None):
        self.seen, self.times, lock = [], [], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                text = handler.rfile.read(int(handler.headers["Content-Length"]))
                request = json.loads(text) | {"headers": dict(handler.headers)}
                with lock:
                    number = len(self.seen)
                    self.seen.append(request)
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
                with_pieces = [body] if isinstance(body, bytes) else body
                try:
                    for piece in with_pieces:
                        handler.wfile.write(piece)
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
def serving(answers, context=None):
    server = Server(answers, context)
    try:
        yield server
    finally:
        server.server.shutdown()
        server.server.server_close()


def lengths(number, request):
    return 200, {}, json.dumps({"scores": [len(text) for text in request["responses"]]}).encode()


def reward(url, **changes):
    settings = {
        "columns": [], "batch_size": 2, "concurrency": 2, "timeout": 5.0, "retries": 2, "backoff": 0.01,
        "longest_backoff": 0.1, "max_bytes": 1000, "token_env": None,
    }  # fmt: skip
    return HTTPReward(url, **{**settings, **changes})


def score(url, **changes):
    return reward(url, **changes).load(Placement("cpu", "float32"))(PROMPTS, RESPONSES, COLUMNS)


def failure(answers, context=None, **changes) -> tuple[str, Server, float]:
    """What is said, the server, and the seconds that it took."""
    begun = time.monotonic()
    with serving(answers, context) as server:
        with pytest.raises(UserError) as caught:
            score(server.url, **changes)
        assert "\n" not in str(caught.value) and server.url in str(caught.value)
        return str(caught.value), server, time.monotonic() - begun


def test_scores_come_back_in_order_whatever_the_batches_and_only_the_texts_are_sent():
    def slow_at_first(number, request):
        time.sleep(0.1 if request["responses"][0] == "a" else 0)  # the first batch is answered last
        return lengths(number, request)

    with serving(slow_at_first) as server:
        assert score(server.url) == LENGTHS
    requests = sorted(server.seen, key=lambda request: request["prompts"])
    assert [request["responses"] for request in requests] == [["a", "bb"], ["", "dddd"], ["é" * 7]]
    assert [request["prompts"] for request in requests] == [PROMPTS[:2], PROMPTS[2:4], PROMPTS[4:]]
    for request in requests:
        assert request.keys() == {"prompts", "responses", "headers"}
        assert "Authorization" not in request["headers"] and request["headers"]["Content-Type"] == "application/json"


def test_columns_are_sent_where_they_are_listed_and_no_others():
    with serving(lengths) as server:
        score(server.url, columns=["topic"], batch_size=5)
    assert server.seen[0]["columns"] == {"topic": ["tea"] * 5}
    with pytest.raises(UserError, match=r"reward\.columns: the data set has no column colour"):
        score(server.url, columns=["colour"])


def test_as_many_requests_as_asked_for_are_under_way_at_once():
    both = threading.Barrier(2, timeout=5)

    def together(number, request):
        if len(request["responses"]) == 2:  # both full batches wait here for each other
            both.wait()
        return lengths(number, request)

    with serving(together) as server:
        assert score(server.url) == LENGTHS


@pytest.mark.parametrize("fault", [(503, {}, b"busy"), (429, {}, b""), None], ids=["503", "429", "closed"])
def test_what_may_pass_is_tried_again(fault):
    with serving(lambda number, request: fault if number < 2 else lengths(number, request)) as server:
        assert score(server.url, batch_size=5) == LENGTHS
    assert len(server.seen) == 3
    assert server.seen[0]["responses"] == server.seen[2]["responses"] == RESPONSES


def test_the_waits_double_up_to_the_longest():
    said, server, _ = failure(
        lambda *_: (500, {}, b""), batch_size=5, retries=4, backoff=0.1, longest_backoff=0.25, concurrency=1
    )
    waits = [after - before for before, after in zip(server.times, server.times[1:], strict=False)]
    assert len(waits) == 4
    for wait, least in zip(waits, [0.1, 0.2, 0.25, 0.25], strict=True):
        assert least <= wait < least + 0.15
    assert "in 5 tries; the last: status 500" in said


@pytest.mark.parametrize("said", ["0.3", "date"])
def test_retry_after_is_kept_to(said):
    def later(number, request):
        value = formatdate(time.time() + 2, usegmt=True) if said == "date" else said  # of whole seconds: 1 to 2 s off
        return (429, {"Retry-After": value}, b"") if number == 0 else lengths(number, request)

    with serving(later) as server:
        assert score(server.url, batch_size=5, longest_backoff=5.0) == LENGTHS
    first, second = server.times
    assert second - first > (0.9 if said == "date" else 0.29)


def test_retry_after_is_bounded():
    _, server, seconds = failure(lambda *_: (429, {"Retry-After": "3600"}, b""), batch_size=5)
    assert len(server.seen) == 3 and seconds < 3


@pytest.mark.parametrize("value", ["nan", "9" * 400, "soon", "Mon, 99 Foo", "-5"])
def test_a_retry_after_that_makes_no_sense_is_none(value):
    _, server, _ = failure(lambda *_: (503, {"Retry-After": value}, b""), batch_size=5, retries=1)
    assert len(server.seen) == 2


def test_an_endpoint_that_is_not_there():
    with serving(lengths) as server:
        url = server.url
    with pytest.raises(UserError, match="in 3 tries; the last: no connection"):
        score(url)


@pytest.mark.parametrize("status", [400, 401, 404, 422])
def test_what_another_try_does_not_change_stops_at_once(status):
    said, server, _ = failure(lambda *_: (status, {}, b"no"), batch_size=5)
    assert f"status {status}" in said and len(server.seen) == 1


def test_one_batch_that_is_refused_ends_the_waiting_of_the_others():
    def answers(number, request):
        return (404, {}, b"") if "" in request["responses"] else (503, {}, b"")

    said, _, seconds = failure(answers, backoff=20.0, longest_backoff=20.0)
    assert "404" in said and seconds < 5


def test_redirects_are_not_followed():
    with serving(lengths) as other:
        for status in (301, 302, 307, 308):
            said, _, _ = failure(lambda *_, status=status: (status, {"Location": other.url}, b""))
            assert other.url in said and "not followed" in said
    assert other.seen == []


def drip(*_):
    def body():
        for _ in range(60):
            time.sleep(0.05)
            yield b" "

    return 200, {}, body()


@pytest.mark.parametrize("answers", [drip, lambda *_: time.sleep(3)], ids=["drip", "silence"])
def test_an_answer_that_takes_too_long(answers):
    said, server, seconds = failure(answers, batch_size=5, timeout=0.3, retries=1)
    assert "no answer within 0.3 s" in said and len(server.seen) == 2 and seconds < 2.5


def test_an_answer_that_is_too_long_is_not_read_to_its_end():
    sent = []

    def endless():
        for number in range(10000):
            sent.append(number)
            yield b" " * 10000

    said, server, _ = failure(lambda *_: (200, {}, endless()), batch_size=5)
    assert "longer than reward.max_bytes 1000" in said and len(server.seen) == 1
    assert len(sent) < 5000
    exact = json.dumps({"scores": [1, 2, 3, 4, 5]}).encode().ljust(1000)
    with serving(lambda *_: (200, {}, exact)) as server:
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
        (b'{"scores": [1, 2, 3, 4]}', "was sent 5 responses and answered with 4 scores"),
    ],
)
def test_an_answer_that_is_none(answer, message):
    said, server, _ = failure(lambda *_: (200, {}, answer), batch_size=5)
    assert message in said and len(server.seen) == 1


@pytest.mark.parametrize(("number", "shown"), [("NaN", "nan"), ("1e999", "inf"), ("1" + "0" * 400, "too large")])
def test_a_score_that_is_not_finite_is_named(number, shown):
    from apa_cli.rewards.base import checked

    answer = f'{{"scores": [1, {number}, 2, 3, 4]}}'.encode()
    with serving(lambda *_: (200, {}, answer)) as server, pytest.raises(UserError, match=shown):
        checked(reward(server.url, batch_size=5).load(Placement("cpu", "float32")))(PROMPTS, RESPONSES, COLUMNS)


def test_a_certificate_that_nobody_vouches_for_is_refused(tmp_path):
    files = ["-keyout", f"{tmp_path}/key", "-out", f"{tmp_path}/certificate"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=127.0.0.1", *files]
    try:
        subprocess.run([*made, "-addext", "subjectAltName=IP:127.0.0.1"], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl to make a certificate with")
    context = SSLContext(PROTOCOL_TLS_SERVER)
    context.load_cert_chain(f"{tmp_path}/certificate", f"{tmp_path}/key")
    said, server, _ = failure(lengths, context)
    assert "certificate" in said and "self" in said and server.seen == []


def test_the_token_goes_into_the_header_and_into_no_message(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", " hush-hush-1 \n")
    with serving(lengths) as server:
        assert score(server.url, token_env="MY_TOKEN") == LENGTHS
    assert {request["headers"]["Authorization"] for request in server.seen} == {"Bearer hush-hush-1"}
    said, _, _ = failure(lambda *_: (401, {}, b""), token_env="MY_TOKEN")
    assert "hush" not in said
    monkeypatch.setenv("MY_TOKEN", "hush\nhush")
    for variable in ("MY_TOKEN", "NO_SUCH_VARIABLE"):
        with pytest.raises(UserError, match=rf"reward\.token_env: the environment has no {variable}") as caught:
            reward("https://127.0.0.1/", token_env=variable).load(Placement("cpu", "float32"))
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000/score", "is no address"),
        ("ftp://127.0.0.1/score", "is no address"),
        ("file:///etc/passwd", "is no address"),
        ("http:///score", "is no address"),
        ("http://[::1/score", "is no address"),
        ("http://127.0.0.1:port/score", "is no address"),
        ("http://127.0.0.1/a b", "is no address"),
        ("http://127.0.0.1/a\nb", "is no address"),
        ("https://me:word@127.0.0.1/", "name or password"),
    ],
)
def test_an_address_that_is_none(url, message):
    with pytest.raises(ConfigError, match=r"^reward\.url: ") as caught:
        reward(url)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert "word@" not in str(caught.value)


def test_a_token_is_not_sent_in_the_open():
    with pytest.raises(ConfigError, match=r"^reward\.url: a token is sent over https only"):
        reward("http://example.org/score", token_env="MY_TOKEN")
    reward("https://example.org/score", token_env="MY_TOKEN")
    reward("http://example.org/score")
