"""Trackers: their files are read back; the only network is loopback."""

import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import types
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from apa_cli import network
from apa_cli.errors import UserError
from apa_cli.runs.tracking import SAMPLE_KEYS, TensorBoardTracker, Tracker, WandbTracker, make_tracker
from apa_cli.runs.wandb_access import find_offline_reason

KEY = "0123456789" * 4


def expect_silence(text: str) -> None:
    raise AssertionError(f"no message was expected, but: {text}")


def find_closed_port() -> int:
    """Return a port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """Environment without keys, proxies and modes, in which wandb's server is a closed port."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC" or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{find_closed_port()}")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return tmp_path


def make_row(iteration: int, response: str) -> dict:
    """Return a row of samples.jsonl."""
    row = {"iteration": iteration, "samples": 64 * iteration, "prompt": "p", "response": response}
    return row | {"score": 0.5, "kl": 1.0, "ending": "eos"}


OFFLINE_RUN = """
import json, sys
from pathlib import Path
from apa_cli.runs.tracking import make_tracker

run_dir, run_id, start = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3])
config = {"lambda": 0.1, "algo": {"gamma": 1.0}}
tracker = make_tracker("wandb", "project", "auto", run_dir, "name", "group", config, run_id, print)
for number in range(start, start + 2):
    tracker.log({"samples": 64 * number, "iteration": number, "reward/mean": 0.5 * number})
    row = {"iteration": number, "samples": 64 * number, "prompt": "p", "response": f"r{number}", "score": 0.5}
    tracker.log_samples([row | {"kl": 1.0, "ending": "eos"}])
tracker.summarize({"evaluate/gain": 0.25})
tracker.finish(failed=True)
tracker.finish()
(run_dir / "id").write_text(tracker.wandb_id)
"""


def run_offline(run_dir, run_id: str, start: int) -> tuple[str, list]:
    """Return the output of one offline run, and the records of its .wandb file."""
    before = set(run_dir.glob("wandb/offline-run-*/*.wandb"))
    command = [sys.executable, "-c", OFFLINE_RUN, str(run_dir), run_id, str(start)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""  # wandb writes nothing to the console
    (path,) = set(run_dir.glob("wandb/offline-run-*/*.wandb")) - before
    return process.stdout, list(read_wandb_records(path))


def read_wandb_records(path):
    """Yield the records of a .wandb file: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
    from wandb.proto import wandb_internal_pb2

    data, place, body = path.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        body += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a complete record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            body = b""
            yield record


def read_history(records) -> list[dict]:
    """Return the logged rows among the records of a .wandb file."""
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def read_last_table(run_dir, rows: list[dict]) -> list[list]:
    """Return the rows of the sample table that was logged last."""
    path = [row["evaluation/replies/path"] for row in rows if "evaluation/replies/path" in row][-1]
    (file,) = run_dir.glob(f"wandb/offline-run-*/files/{path}")
    content = json.loads(file.read_text())
    assert content["columns"] == list(SAMPLE_KEYS)
    return content["data"]


@pytest.mark.slow
def test_without_key_wandb_records_offline_and_a_resumed_run_continues(clean_environment):
    output, records = run_offline(clean_environment, "", start=1)
    assert output.count("\n") == 1
    assert "offline, no API key" in output
    assert "wandb sync" in output

    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lambda"] == 0.1
    assert config["algo"] == {"gamma": 1.0}
    assert (run.project, run.display_name, run.run_group) == ("project", "name", "group")
    assert run.run_id == (clean_environment / "id").read_text()

    axes = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert [(axis.glob_name, axis.step_metric) for axis in axes if axis.glob_name] == [("*", "samples")]
    rows = read_history(records)
    figures = [(row["samples"], row["iteration"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert figures == [(64, 1, 0.5), (128, 2, 1.0)]
    assert [row["_step"] for row in rows] == [1, 2]  # by which wandb recognizes iterations that a resumed run repeats
    assert [row[3] for row in read_last_table(clean_environment, rows)] == ["r1", "r2"]
    summaries = [record.summary.update for record in records if record.WhichOneof("record_type") == "summary"]
    assert [(item.key, item.value_json) for update in summaries for item in update if "gain" in item.key] == [
        ("evaluate/gain", "0.25")
    ]
    assert not any("evaluate/gain" in row for row in rows)  # it is not part of a curve
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]

    earlier = [make_row(number, f"old r{number}") for number in (1, 2)]  # iteration 2 will be repeated
    (clean_environment / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in earlier))
    _, resumed = run_offline(clean_environment, run.run_id, start=2)
    assert (clean_environment / "id").read_text() == run.run_id
    assert [record.run.run_id for record in resumed if record.WhichOneof("record_type") == "run"] == [run.run_id]
    assert [row[3] for row in read_last_table(clean_environment, read_history(resumed))] == ["old r1", "r2", "r3"]
    assert [row["_step"] for row in read_history(resumed)] == [2, 3]


@pytest.fixture
def server():
    """Address of a server on this machine that answers every request with 404."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_online_needs_a_key_and_a_reachable_server(clean_environment, server, monkeypatch):
    closed = os.environ["WANDB_BASE_URL"]
    assert "no API key" in find_offline_reason("auto", server, None)
    assert "no API key" in find_offline_reason("online", server, None)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert find_offline_reason("auto", server, None) is None
    assert find_offline_reason("auto", closed, None) == f"no response from {closed}"
    assert find_offline_reason("online", closed, None) is None  # wandb tries, and has its own timeout
    assert find_offline_reason("offline", server, None) == "as configured"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE" in find_offline_reason("online", server, None)


def test_key_in_netrc_counts_for_its_own_server_only(clean_environment, server):
    (clean_environment / ".netrc").write_text(
        f"machine {server.removeprefix('http://')}\n  login user\n  password {KEY}\n"
    )
    (clean_environment / ".netrc").chmod(0o600)
    assert find_offline_reason("auto", server, None) is None
    assert "no API key" in find_offline_reason("auto", "http://127.0.0.1:1", None)


def test_silent_server_does_not_delay_the_check(clean_environment):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        assert network.request_status(f"http://127.0.0.1:{silent.getsockname()[1]}", timeout=0.3) is None
        assert time.monotonic() - start < 2


def test_slow_dns_lookup_does_not_delay_the_check(monkeypatch):
    monkeypatch.setattr(network, "request_status", lambda url, timeout: time.sleep(3) or 200)
    start = time.monotonic()
    assert not network.is_reachable("http://name", timeout=0.2)
    assert time.monotonic() - start < 2


def test_run_that_fails_to_start_online_goes_offline(clean_environment, monkeypatch):
    import wandb

    started = []

    def init(mode, **options):
        started.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route\nand more lines")
        folder = clean_environment / "wandb" / "offline-run-1"
        return types.SimpleNamespace(
            id="abc",
            settings=types.SimpleNamespace(sync_dir=str(folder)),
            define_metric=lambda *_, **__: None,
        )

    settings = types.SimpleNamespace(base_url=os.environ["WANDB_BASE_URL"], api_key=None)
    monkeypatch.setattr(wandb, "setup", lambda settings_=None, **_: types.SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    messages = []
    tracker = make_tracker("wandb", "project", "online", clean_environment, "name", None, {}, None, messages.append)
    assert started == ["online", "offline"]
    assert tracker.wandb_id == "abc"
    assert len(messages) == 1
    assert "no route" in messages[0]
    assert "\n" not in messages[0]


def test_wandb_disabled_by_the_environment_records_nothing(clean_environment, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    messages = []
    tracker = make_tracker("wandb", "project", "online", clean_environment, "name", None, {}, None, messages.append)
    assert type(tracker) is Tracker
    assert len(messages) == 1
    assert not list(clean_environment.iterdir())


class BreakingRun:
    """A wandb run whose connection breaks at the second call of `log`."""

    id = "abc"

    def __init__(self):
        self.logged = []

    def define_metric(self, *_, **__):
        pass

    def log(self, metrics, step):
        if self.logged:
            raise BrokenPipeError("the service is gone\nwith details")
        self.logged.append(metrics)


def test_failure_while_logging_is_reported_once_and_the_run_continues():
    messages, run = [], BreakingRun()
    tracker = WandbTracker(run, messages.append)
    for number in range(4):
        tracker.log({"samples": number, "iteration": number})
    tracker.log_samples([make_row(4, "r")])
    tracker.finish()
    assert run.logged == [{"samples": 0, "iteration": 0}]
    assert len(messages) == 1
    assert "the service is gone" in messages[0]
    assert "\n" not in messages[0]


def read_events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def test_tensorboard_values_are_logged_by_samples(tmp_path):
    config = {"lambda": 0.1}
    tracker = make_tracker("tensorboard", "project", "auto", tmp_path, "name", None, config, None, expect_silence)
    for number in (1, 2, 3):
        tracker.log({"samples": 64 * number, "iteration": number, "reward/mean": 0.5 * number})
    tracker.log_samples([make_row(3, "the response")])
    tracker.finish(failed=True)
    resumed = TensorBoardTracker(tmp_path / "tensorboard", config, expect_silence)
    resumed.log({"samples": 192, "iteration": 3, "reward/mean": 9.0})
    resumed.finish()

    recorded = read_events(tmp_path / "tensorboard")
    rewards = [(event.step, event.value) for event in recorded.Scalars("reward/mean")]
    assert rewards == [(64, 0.5), (128, 1.0), (192, 9.0)]  # repeated iterations are there once
    assert [event.value for event in recorded.Scalars("iteration")] == [1.0, 2.0, 3.0]


def test_tensorboard_has_responses_config_and_end(tmp_path):
    tracker = TensorBoardTracker(tmp_path, {"lambda": 0.1}, expect_silence)
    tracker.log_samples([make_row(2, "the response")])
    tracker.finish(failed=True)
    recorded = read_events(tmp_path)

    def text(tag: str) -> tuple[int, str]:
        (event,) = recorded.Tensors(f"{tag}/text_summary")
        return event.step, event.tensor_proto.string_val[0].decode()

    step, responses = text("evaluation/replies")
    assert step == 128
    assert "    the response" in responses
    assert '"lambda": 0.1' in text("config")[1]
    assert text("ended")[1] == "failed"


def test_none_does_nothing_and_unknown_values_are_refused(tmp_path):
    def make(kind: str, mode: str = "auto") -> Tracker:
        return make_tracker(kind, "project", mode, tmp_path, "name", None, {}, None, expect_silence)

    tracker = make("none")
    tracker.log({"samples": 1, "iteration": 1})
    tracker.log_samples([make_row(1, "r")])
    tracker.finish(failed=True)
    assert tracker.wandb_id is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="none, wandb, tensorboard"):
        make("tensorbord")
    with pytest.raises(UserError, match="auto, online, offline"):
        make("wandb", mode="on")


def test_import_loads_no_heavy_library():
    code = "import sys, apa_cli.runs.tracking; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "wandb", "matplotlib", "tensorboard", "numpy", "rich"}
