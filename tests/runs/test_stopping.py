"""Early end of a run: durations, the time limit, a first and a second signal."""

import itertools
import os
import signal
import subprocess
import sys

import pytest

from apa_cli.runs import stopping
from apa_cli.runs.stopping import GracefulStop, RunInterrupted, parse_duration


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90s", 90), ("45m", 2700), ("3h50m", 13800), ("1d", 86400), ("1d2h3m4s", 93784), ("3h 50m", 13800)],
)
def test_parse_duration(text, expected):
    assert parse_duration(text) == expected


@pytest.mark.parametrize("text", ["", "90", "h", "50m3h", "1.5h", "-1m", "3 hours"])
def test_text_that_is_no_duration_is_refused(text):
    with pytest.raises(ValueError, match="is not a time such as"):
        parse_duration(text)


@pytest.fixture
def clock(monkeypatch):
    """clock(now) sets the seconds since the start of the command."""
    monkeypatch.setattr(stopping, "START_TIME", 1000.0)
    return lambda now: monkeypatch.setattr(stopping.time, "monotonic", lambda: 1000.0 + now)


def test_time_is_up_when_another_iteration_and_save_do_not_fit(clock):
    clock(0)
    stop = GracefulStop("100s")
    stop.longest_iteration, stop.longest_save = 10.0, 5.0
    clock(85)  # 85 + 10 + 5 = 100
    assert stop.reason is None
    clock(85.1)
    assert stop.reason == "stop_after=100s" and stop.exit_status == 75


def test_first_save_is_assumed_to_take_as_long_as_an_iteration(clock):
    clock(0)
    stop = GracefulStop("100s")
    stop.longest_iteration = 10.0
    clock(80)
    assert stop.reason is None
    clock(80.1)
    assert stop.reason is not None


def test_without_time_limit_there_is_no_reason_to_stop(clock):
    clock(1e9)
    assert GracefulStop().reason is None


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_is_recorded_as_reason(number, status, capfd):
    before = signal.getsignal(number)
    with GracefulStop() as stop:
        stop.listen()
        os.kill(os.getpid(), number)
        assert stop.reason == signal.Signals(number).name
        assert stop.exit_status == status
    assert signal.getsignal(number) is before
    assert "a second signal ends the run at once" in capfd.readouterr().err


def test_signal_before_listen_interrupts():
    with GracefulStop(), pytest.raises(RunInterrupted, match="SIGTERM") as error:
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.status == 143


TWICE = """
import os, signal
from apa_cli.runs.stopping import GracefulStop
with GracefulStop() as stop:
    stop.listen()
    os.kill(os.getpid(), signal.{first})
    print(stop.signal_name, flush=True)
    os.kill(os.getpid(), signal.{second})
    print("never")
"""


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.product(["SIGTERM", "SIGINT"], repeat=2)), ids=lambda name: name
)
def test_second_signal_kills(first, second):
    code = TWICE.format(first=first, second=second)
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == -signal.Signals[second]
    assert process.stdout == f"{first}\n"
