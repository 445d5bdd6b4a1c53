"""Output of a run: one line per iteration, a live bar on a terminal, everything in run.log."""

import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest

from apa_cli.runs.console import Console
from apa_cli.runs.formatting import format_duration, format_table

TRAINING = {
    "reward/mean": 0.512,
    "kl/sequence": -1.25,
    "policy/entropy": 2.345,
    "response/length": 28.44,
    "throughput/samples_per_s": 123.4,
}
EVALUATION = {"eval/reward_mean": 0.75, "eval/reward_ci": 0.02, "eval/kl_exact": 4.5}


@pytest.fixture
def clock(monkeypatch):
    """Clock that stands still; clock.now is its time in seconds."""
    clock = types.SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("apa_cli.runs.console.time", clock)
    return clock


def test_each_iteration_is_one_line_on_screen_and_in_run_log(tmp_path, capsys, clock):
    with Console(tmp_path / "run.log", iterations=100) as console:
        clock.now += 500  # loading models does not count as pace
        console.show_iteration({"iteration": 0, "samples": 0} | EVALUATION)
        clock.now += 30
        console.show_iteration({"iteration": 5, "samples": 320} | TRAINING)
        clock.now += 30
        console.show_iteration({"iteration": 10, "samples": 640} | TRAINING | EVALUATION)
    training = "reward   0.512  KL  -1.250  entropy  2.345  length   28.4  samples/s   123.4"
    assert capsys.readouterr().out.splitlines() == [
        "iteration   0/100  samples       0  eval reward 0.750 ± 0.020 at KL 4.500",
        f"iteration   5/100  samples     320  {training}  left 9m 30s",  # 95 iterations of 6 s
        f"iteration  10/100  samples     640  {training}  eval reward 0.750 ± 0.020 at KL 4.500  left 9m 00s",
    ]
    assert len((tmp_path / "run.log").read_text().splitlines()) == 3


def test_missing_metrics_are_left_out(capsys):
    console = Console(None, iterations=10)
    console.show_iteration({"iteration": 1, "samples": 4, "reward/mean": 1.0, "kl/sequence": None})
    line = capsys.readouterr().out
    assert "reward   1.000" in line
    assert "KL" not in line
    assert "entropy" not in line
    assert "eval" not in line


def test_time_left_of_a_resumed_run_counts_only_new_iterations(capsys, clock):
    console = Console(None, iterations=60)
    clock.now += 10
    console.show_iteration({"iteration": 50, "samples": 0})
    clock.now += 20
    console.show_iteration({"iteration": 51, "samples": 0})
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("left 1m 40s")  # 10 s for one iteration, ten to go
    assert second.endswith("left 2m 15s")  # 30 s for two, nine to go


def test_messages_and_warnings_go_to_screen_and_run_log(tmp_path, capsys):
    log = tmp_path / "run.log"
    log.write_text("earlier\n")
    with Console(log, iterations=1) as console:
        console.say("λ is [bold]0.1[/bold]")
        console.warn("top-k is on")
    shown = capsys.readouterr()
    assert shown.out == "λ is [bold]0.1[/bold]\n"
    assert shown.err == "warning: top-k is on\n"
    assert log.read_text(encoding="utf-8") == "earlier\nλ is [bold]0.1[/bold]\nwarning: top-k is on\n"


def test_quiet_console_only_logs(tmp_path, capfd):
    with Console(tmp_path / "run.log", iterations=2, live=True, quiet=True) as console:
        console.say("message")
        console.warn("warning")
        console.show_iteration({"iteration": 1, "samples": 4} | TRAINING)
        console.show_table("table", ["a"], [[1]])
    assert capfd.readouterr() == ("", "")
    assert "reward   0.512" in (tmp_path / "run.log").read_text()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a file that is always full is needed")
def test_unwritable_run_log_is_reported_once_and_output_continues(capsys):
    with Console(Path("/dev/full"), iterations=1) as console:
        console.say("first")
        console.say("second")
    shown = capsys.readouterr()
    assert shown.out == "first\nsecond\n"
    assert shown.err == "warning: run.log: cannot be written (No space left on device)\n"


SCRIPT = """
import sys
from pathlib import Path
from apa_cli.runs.console import Console
with Console(Path(sys.argv[1]), iterations=20) as console:
    for number in range(1, 21):
        metrics = {"iteration": number, "samples": 64 * number, "reward/mean": number / 8, "kl/sequence": 7.0}
        console.show_iteration(metrics | ({"eval/reward_mean": 0.625} if number == 10 else {}))
    console.say("done [red]now[/red]")
"""


def test_terminal_shows_a_live_bar_instead_of_lines(tmp_path):
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "110", "LINES": "40"}
    log = tmp_path / "run.log"
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(log)], stdout=slave, stderr=slave, env=environment)
    os.close(slave)
    shown = b""
    try:
        while chunk := os.read(master, 65536):
            shown += chunk
    except OSError:  # the other end of the terminal has been closed
        pass
    os.close(master)
    assert process.wait() == 0
    shown = shown.decode()
    assert "20/20" in shown
    assert "reward   2.500" in shown  # 20 / 8
    assert "eval reward 0.625" in shown
    assert "done [red]now[/red]" in shown
    assert shown.count("samples    ") == 1  # of the plain lines only that of the evaluation stays above the bar
    logged = log.read_text().splitlines()
    assert len(logged) == 21
    assert logged[19].startswith("iteration 20/20  samples    1280  reward   2.500  KL   7.000")


def make_row(iteration: int, prompt: str, response: str, score: float) -> dict:
    """Return a row of samples.jsonl."""
    row = {"iteration": iteration, "samples": 64 * iteration, "prompt": prompt, "response": response}
    return row | {"score": score, "kl": 1.5, "ending": "eos"}


def test_responses_before_and_after_are_listed_under_their_prompt(tmp_path, capsys):
    rows = [
        make_row(0, "How?", "So.", 0.1), make_row(0, "Why?", "Because.", 0.2),
        make_row(9, "How?", "Like \x1b[2Jthis.\nAnd that.", 0.9), make_row(9, "Why?", "No reason.", 0.8),
    ]  # fmt: skip
    with Console(tmp_path / "run.log", iterations=9) as console:
        console.show_samples("Replies", rows)
    text = capsys.readouterr().out
    assert (tmp_path / "run.log").read_text() == text
    words = (
        "Replies",
        "How?",
        "So.",
        "score 0.100",
        "And that.",
        "score 0.900",
        "Why?",
        "Because.",
        "No reason.",
    )
    places = [text.index(word) for word in words]
    assert places == sorted(places)
    assert text.count("before") == text.count("after") == 2
    assert "iteration 9, score 0.900, KL 1.50 nats, ended by eos" in text
    assert "\x1b" not in text  # a response must not steer the terminal


def test_long_responses_are_wrapped_and_cut(capsys):
    Console(None, iterations=1).show_samples("Replies", [make_row(0, "x " * 2000, "word " * 2000, 0.1)])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) < 40


def test_format_table_aligns_columns():
    assert format_table(["name", "count"], [["rollout batch", 128], ["minibatch", 8]]) == [
        "name           count",
        "-------------  -----",
        "rollout batch    128",
        "minibatch          8",
    ]


def test_format_duration():
    assert [format_duration(s) for s in (0.4, 59.4, 59.6, 3599, 7260, 97200)] == [
        "0s", "59s", "1m 00s", "59m 59s", "2h 01m", "1d 03h",
    ]  # fmt: skip


def test_terminal_without_unicode_does_not_end_the_run():
    code = "from apa_cli.runs.console import Console; Console(None, 1).say('λ ± 1')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    assert subprocess.check_output([sys.executable, "-c", code], env=environment) == b"? ? 1\n"


def test_import_loads_no_heavy_library():
    code = "import sys, apa_cli.runs.console; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "wandb", "matplotlib", "numpy", "rich"}


def test_rounding_below_zero_has_no_minus(capsys):
    console = Console(None, iterations=10)
    console.show_iteration({"iteration": 1, "kl/sequence": -4e-9, "reward/mean": -1e-5, "eval/reward_mean": -1e-9})
    console.show_samples("", [{"prompt": "p", "response": "r", "label": "l", "score": -1e-9, "kl": -1e-9}])
    console.show_iteration({"iteration": 2, "kl/sequence": -0.0006})
    out = capsys.readouterr().out
    assert "KL   0.000" in out and "reward   0.000" in out and "eval reward 0.000" in out
    assert "[score 0.000, KL 0.00 nats]" in out and "KL  -0.001" in out and "-0.00 " not in out
