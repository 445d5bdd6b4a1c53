"""Ending a run early: what counts as a time, when time is up, what a first and a second signal do."""

import itertools
import os
import signal
import subprocess
import sys

import pytest

from apa_cli.runs.stopping import Interrupted, Stopping, seconds
from apa_cli.training.launch import stopping


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("45m", 2700), ("3h50m", 13800), ("1d", 86400), ("1d2h3m4s", 93784), ("3h 50m", 13800)],
)
def test_times(text, expected):
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "90", "h", "50m3h", "1.5h", "-1m", "3 hours"])
def test_what_is_no_time_is_named(text):
    with pytest.raises(ValueError, match="is not a time such as"):
        seconds(text)


@pytest.fixture
def clock(monkeypatch):
    """clock(now) sets the seconds since the command began."""
    monkeypatch.setattr(stopping, "STARTED", 1000.0)
    return lambda now: monkeypatch.setattr(stopping.time, "monotonic", lambda: 1000.0 + now)


def test_there_is_room_for_one_more_iteration_and_saving(clock):
    clock(0)
    listening = Stopping("100s")
    listening.longest_iteration, listening.longest_save = 10.0, 5.0
    clock(85)  # 85 + 10 + 5 = 100
    assert listening.reason() is None
    clock(85.1)
    assert listening.reason() == "stop_after=100s" and listening.status() == 75


def test_before_the_first_save_it_is_taken_to_last_as_long_as_an_iteration(clock):
    clock(0)
    listening = Stopping("100s")
    listening.longest_iteration = 10.0
    clock(80)
    assert listening.reason() is None
    clock(80.1)
    assert listening.reason() is not None


def test_without_a_limit_time_is_never_up(clock):
    clock(1e9)
    assert Stopping().reason() is None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_kept_for_the_loop_to_ask(number, status, capfd):
    before = signal.getsignal(number)
    with Stopping() as listening:
        listening.listen()
        os.kill(os.getpid(), number)
        assert listening.reason() == signal.Signals(number).name
        assert listening.status() == status
    assert signal.getsignal(number) is before
    assert "a second signal stops at once" in capfd.readouterr().err


def test_before_there_is_anything_to_save_a_signal_ends_the_program():
    with Stopping(), pytest.raises(Interrupted, match="SIGTERM") as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.status == 143


TWICE = """
import os, signal
from apa_cli.runs.stopping import Stopping
with Stopping() as listening:
    listening.listen()
    os.kill(os.getpid(), signal.{first})
    print(listening.requested, flush=True)
    os.kill(os.getpid(), signal.{second})
    print("never")
"""


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(["SIGTERM", "SIGINT"], repeat=2)), ids=lambda name: name
)
def test_a_second_signal_stops_at_once(first, second):
    code = TWICE.format(first=first, second=second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == -signal.Signals[second]
    assert done.stdout == f"{first}\n"
