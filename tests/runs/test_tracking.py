"""Trackers: what they record is read back from their files; no network but loopback is touched."""

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
from apa_cli.training.launch import tracking

KEY = "0123456789" * 4


def refuse(text: str) -> None:
    raise AssertionError(f"nothing was to be said, but: {text}")


def closed_port() -> int:
    """A port of this machine on which nothing listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def bare(monkeypatch, tmp_path):
    """An environment without keys, proxies and modes, in which wandb's server is a closed port."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name == "NETRC" or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    return tmp_path


def sample(iteration: int, response: str) -> dict:
    row = {"iteration": iteration, "samples": 64 * iteration, "prompt": "p", "response": response}
    return row | {"score": 0.5, "kl": 1.0, "ending": "eos"}


OFFLINE_RUN = """
import json, sys
from pathlib import Path
from apa_cli.runs.tracking import make_tracker

run_dir, run_id, begin = Path(sys.argv[1]), sys.argv[2] or None, int(sys.argv[3])
config = {"lambda": 0.1, "algo": {"gamma": 1.0}}
tracker = make_tracker("wandb", "project", "auto", run_dir, "name", "group", config, run_id, print)
for number in range(begin, begin + 2):
    tracker.log({"samples": 64 * number, "iteration": number, "reward/mean": 0.5 * number})
    row = {"iteration": number, "samples": 64 * number, "prompt": "p", "response": f"r{number}", "score": 0.5}
    tracker.log_samples([row | {"kl": 1.0, "ending": "eos"}])
tracker.summarize({"evaluate/gain": 0.25})
tracker.finish(failed=True)
tracker.finish()
(run_dir / "id").write_text(tracker.wandb_id)
"""


def offline_run(run_dir, run_id: str, begin: int) -> tuple[str, list]:
    """What one offline run says, and the records of its .wandb file."""
    before = set(run_dir.glob("wandb/offline-run-*/*.wandb"))
    command = [sys.executable, "-c", OFFLINE_RUN, str(run_dir), run_id, str(begin)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # wandb keeps off the console
    (path,) = set(run_dir.glob("wandb/offline-run-*/*.wandb")) - before
    return done.stdout, list(wandb_records(path))


def wandb_records(path):
    """The records of a .wandb file: seven bytes of header, then LevelDB's log format in blocks of 32 KiB."""
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
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(body)
            body = b""
            yield record


def history(records) -> list[dict]:
    rows = [record.history.item for record in records if record.WhichOneof("record_type") == "history"]
    return [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in row} for row in rows]


def last_table(run_dir, rows: list[dict]) -> list[list]:
    """The rows of the sample table that was logged last."""
    path = [row["evaluation/replies/path"] for row in rows if "evaluation/replies/path" in row][-1]
    (file,) = run_dir.glob(f"wandb/offline-run-*/files/{path}")
    content = json.loads(file.read_text())
    assert content["columns"] == list(SAMPLE_KEYS)
    return content["data"]


def test_without_a_key_wandb_records_offline_and_a_resumed_run_continues(bare):
    said, records = offline_run(bare, "", begin=1)
    assert said.count("\n") == 1
    assert "offline: no API key" in said
    assert "wandb sync" in said

    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["lambda"] == 0.1
    assert config["algo"] == {"gamma": 1.0}
    assert (run.project, run.display_name, run.run_group) == ("project", "name", "group")
    assert run.run_id == (bare / "id").read_text()

    axes = [record.metric for record in records if record.WhichOneof("record_type") == "metric"]
    assert [(axis.glob_name, axis.step_metric) for axis in axes if axis.glob_name] == [("*", "samples")]
    rows = history(records)
    figures = [(row["samples"], row["iteration"], row["reward/mean"]) for row in rows if "reward/mean" in row]
    assert figures == [(64, 1, 0.5), (128, 2, 1.0)]
    assert [row["_step"] for row in rows] == [1, 2]  # by which wandb knows what a resumed run repeats
    assert [row[3] for row in last_table(bare, rows)] == ["r1", "r2"]
    summaries = [record.summary.update for record in records if record.WhichOneof("record_type") == "summary"]
    assert [(item.key, item.value_json) for update in summaries for item in update if "gain" in item.key] == [
        ("evaluate/gain", "0.25")
    ]
    assert not any("evaluate/gain" in row for row in rows)  # it is no point of a curve
    assert [record.exit.exit_code for record in records if record.WhichOneof("record_type") == "exit"] == [1]

    earlier = [sample(number, f"old r{number}") for number in (1, 2)]  # iteration 2 will be repeated
    (bare / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in earlier))
    _, resumed = offline_run(bare, run.run_id, begin=2)
    assert (bare / "id").read_text() == run.run_id
    assert [record.run.run_id for record in resumed if record.WhichOneof("record_type") == "run"] == [run.run_id]
    assert [row[3] for row in last_table(bare, history(resumed))] == ["old r1", "r2", "r3"]
    assert [row["_step"] for row in history(resumed)] == [2, 3]


def why_offline(mode: str, url: str) -> str | None:
    return tracking._why_offline(mode, types.SimpleNamespace(base_url=url, api_key=None))


@pytest.fixture
def server():
    """The address of a server on this machine that answers every request with 404."""

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


def test_online_takes_a_key_and_a_server_that_answers(bare, server, monkeypatch):
    closed = os.environ["WANDB_BASE_URL"]
    assert "no API key" in why_offline("auto", server)
    assert "no API key" in why_offline("online", server)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert why_offline("auto", server) is None
    assert why_offline("auto", closed) == f"no answer from {closed}"
    assert why_offline("online", closed) is None  # left to wandb and its time-out
    assert why_offline("offline", server) == "as configured"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE" in why_offline("online", server)


def test_a_key_in_netrc_is_found_for_its_own_server_only(bare, server):
    (bare / ".netrc").write_text(f"machine {server.removeprefix('http://')}\n  login user\n  password {KEY}\n")
    (bare / ".netrc").chmod(0o600)
    assert why_offline("auto", server) is None
    assert "no API key" in why_offline("auto", "http://127.0.0.1:1")


def test_a_server_that_never_answers_holds_nothing_up(bare):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        assert network.asked(f"http://127.0.0.1:{silent.getsockname()[1]}", seconds=0.3) is None
        assert time.monotonic() - begin < 2


def test_a_name_that_takes_long_to_look_up_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(network, "asked", lambda url, seconds: time.sleep(3) or 200)
    begin = time.monotonic()
    assert not network.answers("http://name", seconds=0.2)
    assert time.monotonic() - begin < 2


def test_a_run_that_does_not_start_online_is_offline(bare, monkeypatch):
    import wandb

    started = []

    def init(mode, **options):
        started.append(mode)
        if mode == "online":
            raise wandb.errors.CommError("no route\nand more lines")
        folder = bare / "wandb" / "offline-run-1"
        return types.SimpleNamespace(
            id="abc",
            settings=types.SimpleNamespace(sync_dir=str(folder)),
            define_metric=lambda *_, **__: None,
        )

    settings = types.SimpleNamespace(base_url=os.environ["WANDB_BASE_URL"], api_key=None)
    monkeypatch.setattr(wandb, "setup", lambda settings_=None, **_: types.SimpleNamespace(settings=settings))
    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    said = []
    tracker = make_tracker("wandb", "project", "online", bare, "name", None, {}, None, said.append)
    assert started == ["online", "offline"]
    assert tracker.wandb_id == "abc"
    assert len(said) == 1
    assert "no route" in said[0]
    assert "\n" not in said[0]


def test_wandb_disabled_by_the_environment_records_nothing(bare, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    said = []
    tracker = make_tracker("wandb", "project", "online", bare, "name", None, {}, None, said.append)
    assert type(tracker) is Tracker
    assert len(said) == 1
    assert not list(bare.iterdir())


class BreakingRun:
    """A wandb run whose connection breaks at the second call of log."""

    id = "abc"

    def __init__(self):
        self.logged = []

    def define_metric(self, *_, **__):
        pass

    def log(self, metrics, step):
        if self.logged:
            raise BrokenPipeError("the service is gone\nwith details")
        self.logged.append(metrics)


def test_a_failure_while_logging_is_said_once_and_the_run_goes_on():
    said, run = [], BreakingRun()
    tracker = WandbTracker(run, said.append)
    for number in range(4):
        tracker.log({"samples": number, "iteration": number})
    tracker.log_samples([sample(4, "r")])
    tracker.finish()
    assert run.logged == [{"samples": 0, "iteration": 0}]
    assert len(said) == 1
    assert "the service is gone" in said[0]
    assert "\n" not in said[0]


def events(directory):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(directory))
    accumulator.Reload()
    return accumulator


def test_tensorboard_has_the_values_at_their_samples(tmp_path):
    tracker = make_tracker("tensorboard", "project", "auto", tmp_path, "name", None, {"lambda": 0.1}, None, refuse)
    for number in (1, 2, 3):
        tracker.log({"samples": 64 * number, "iteration": number, "reward/mean": 0.5 * number})
    tracker.log_samples([sample(3, "the reply")])
    tracker.finish(failed=True)
    resumed = TensorBoardTracker(tmp_path / "tensorboard", {"lambda": 0.1}, refuse)
    resumed.log({"samples": 192, "iteration": 3, "reward/mean": 9.0})
    resumed.finish()

    recorded = events(tmp_path / "tensorboard")
    rewards = [(event.step, event.value) for event in recorded.Scalars("reward/mean")]
    assert rewards == [(64, 0.5), (128, 1.0), (192, 9.0)]  # what a resumed run repeats is there once
    assert [event.value for event in recorded.Scalars("iteration")] == [1.0, 2.0, 3.0]


def test_tensorboard_has_replies_config_and_end(tmp_path):
    tracker = TensorBoardTracker(tmp_path, {"lambda": 0.1}, refuse)
    tracker.log_samples([sample(2, "the reply")])
    tracker.finish(failed=True)
    recorded = events(tmp_path)

    def text(tag: str) -> tuple[int, str]:
        (event,) = recorded.Tensors(f"{tag}/text_summary")
        return event.step, event.tensor_proto.string_val[0].decode()

    step, replies = text("evaluation/replies")
    assert step == 128
    assert "    the reply" in replies
    assert '"lambda": 0.1' in text("config")[1]
    assert text("ended")[1] == "failed"


def test_none_does_nothing_and_unknown_words_are_refused(tmp_path):
    def make(kind: str, mode: str = "auto") -> Tracker:
        return make_tracker(kind, "project", mode, tmp_path, "name", None, {}, None, refuse)

    tracker = make("none")
    tracker.log({"samples": 1, "iteration": 1})
    tracker.log_samples([sample(1, "r")])
    tracker.finish(failed=True)
    assert tracker.wandb_id is None
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="none, wandb and tensorboard"):
        make("tensorbord")
    with pytest.raises(UserError, match="auto, online and offline"):
        make("wandb", mode="on")


def test_importing_loads_no_heavy_library():
    code = "import sys, apa_cli.runs.tracking; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "wandb", "matplotlib", "tensorboard", "numpy", "rich"}
