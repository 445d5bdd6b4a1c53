"""kill -9 at any moment, then resume=auto: the records and the weights are those of a run that was never killed.

A run is killed by the test's process from outside, at a moment keyed by seed; or it kills itself in the middle of a
save. Only one of the quick tests starts the real command; in the others the run is a fork of this process, which
spares the start-up.
"""

import contextlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from apa_cli.runs.checkpoint import load
from apa_cli.training.launch import checkpoint as checkpoints

KILLS = int(os.environ.get("APA_KILLS", "10"))
"""Kills of each slow test."""
ALGORITHMS = {
    "apa": ["algo=apa", "optimizer.lr_scheduler=cosine", "optimizer.warmup_ratio=3"],
    "ppo-adaptive": ["algo=ppo", "algo.kl_controller=adaptive", "algo.kl_horizon=16"],
    "awr": ["algo=awr", "critic=head"],
    "apa-moving-reference": ["algo=apa", "reference.refresh_every=2"],
}
LONG = ["iterations=12", "evaluation.every=3", "checkpoint.every=2", "checkpoint.keep_last=2"]


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """uninterrupted(name) → the directory of that algorithm's run, and how many seconds it took."""
    made: dict[str, tuple[Path, float]] = {}

    def make(name: str) -> tuple[Path, float]:
        if name not in made:
            begun = time.monotonic()
            directory = train(tmp_path_factory.mktemp("uninterrupted") / "run", *ALGORITHMS[name], *LONG)
            made[name] = directory, time.monotonic() - begun
        return made[name]

    return make


@pytest.fixture
def forked(train):
    """forked(directory, *words, before=) → the process id of a run in a fork of this process.

    `before()` is called in the fork. What it prints goes nowhere.
    """
    children = []

    def begin(directory: Path, *words: str, before=lambda: None) -> int:
        sys.stdout.flush()
        child = os.fork()
        if child:
            children.append(child)
            return child
        status = 1
        with contextlib.suppress(BaseException):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, 1)
            os.dup2(nowhere, 2)
            before()
            train(directory, *words, "resume=auto")
            status = 0
        os._exit(status)

    yield begin
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def ended(child: int, seconds: float) -> int | None:
    """The exit status of a child that ends within that time, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture
def assert_equal(comparable, records):
    """assert_equal(run, whole): the same lines, bits and files."""

    def check(run: Path, whole: Path) -> None:
        assert comparable(run / "metrics.jsonl") == comparable(whole / "metrics.jsonl")
        assert records(run / "samples.jsonl") == records(whole / "samples.jsonl")
        names = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (run, whole)]
        assert names[0] == names[1]  # no half-written one either
        (tensors, state), (expected, other) = (load(folder / "checkpoints" / names[0][-1]) for folder in (run, whole))
        assert state == other and tensors.keys() == expected.keys()
        for group, own in tensors.items():
            assert own.keys() == expected[group].keys()
            differing = [name for name, tensor in own.items() if not torch.equal(tensor, expected[group][name])]
            assert not differing
        models = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
        assert models[0] == models[1]

    return check


@pytest.mark.parametrize("name", ["ppo-adaptive"])
def test_a_killed_run_goes_on_as_if_nothing_had_been(name, uninterrupted, forked, assert_equal, tmp_path):
    whole, seconds = uninterrupted(name)
    run, words = tmp_path / "run", [*ALGORITHMS[name], *LONG]
    # Half a run has a checkpoint to go on from, and lines behind it.
    child = forked(run, *words)
    while len(checkpoints.all_in(run / "checkpoints")) < 2:
        assert ended(child, 0.005) is None
    status = ended(child, random.Random(name).uniform(0, seconds / 4))
    assert status is None, "the run ended before it was killed"
    kill(child)
    assert not (run / "result.json").exists()
    assert ended(forked(run, *words), 120) == 0
    assert_equal(run, whole)


@pytest.mark.slow
def test_the_command_itself_killed(uninterrupted, small_words, forked, assert_equal, tmp_path):
    whole, _ = uninterrupted("apa")
    words = [*small_words, *ALGORITHMS["apa"], *LONG]
    last = {word.split("=")[0]: word for word in words}
    code = "from apa_cli.cli.train import main; main()"
    command = [sys.executable, "-c", code, *last.values(), "name=run", "resume=auto"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "outputs" / "run"
    while len(checkpoints.all_in(run / "checkpoints")) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (run / "result.json").exists()
    assert ended(forked(run, *ALGORITHMS["apa"], *LONG), 120) == 0
    assert_equal(run, whole)


def killing_itself(monkeypatch, name: str, times: int, after: bool) -> None:
    """The process kills itself at the given call of a function of checkpoint.py, before or after it has run."""
    original, calls = getattr(checkpoints, name), itertools.count(1)

    def dying(*arguments, **keywords):
        last = next(calls) == times
        if last and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*arguments, **keywords)
        if last:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    monkeypatch.setattr(checkpoints, name, dying)


@pytest.mark.parametrize(
    ("function", "times", "after"),
    [
        pytest.param("save_file", 1, True, id="the-first", marks=pytest.mark.slow),
        pytest.param("save_file", 7, True, id="half-written"),
        pytest.param("write", 2, True, id="without-its-name", marks=pytest.mark.slow),
        pytest.param("prune", 2, False, id="before-pruning", marks=pytest.mark.slow),
        pytest.param("prune", 3, True, id="after-pruning", marks=pytest.mark.slow),
    ],
)
def test_killed_while_saving(function, times, after, uninterrupted, forked, assert_equal, tmp_path, monkeypatch):
    whole, _ = uninterrupted("apa")
    run, words = tmp_path / "run", [*ALGORITHMS["apa"], *LONG]
    child = forked(run, *words, before=lambda: killing_itself(monkeypatch, function, times, after))
    assert ended(child, 120) == -signal.SIGKILL
    half = list((run / "checkpoints").glob(".iteration_*"))
    assert bool(half) == (function in ("save_file", "write"))
    assert ended(forked(run, *words), 120) == 0
    assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_many_kills(name, uninterrupted, forked, assert_equal, tmp_path):
    """A run is killed again and again, every third time while it saves, until it gets to its end; then the next one."""
    whole, seconds = uninterrupted(name)
    words, moment = [*ALGORITHMS[name], *LONG], random.Random(f"many {name}")
    kills, in_saving, runs = 0, 0, 0
    run = tmp_path / "run"
    while True:
        child = forked(run, *words)
        saving, wait = kills % 3 == 2, moment.uniform(0, 0.7 * seconds)
        status = in_a_save(child, run, moment) if saving else ended(child, wait)
        if status is None and kills < KILLS:
            kill(child)
            kills += 1
            in_saving += bool(list((run / "checkpoints").glob(".iteration_*")))
            continue
        assert (ended(child, 120) if status is None else status) == 0
        assert_equal(run, whole)
        runs += 1
        shutil.rmtree(run)
        if kills >= KILLS:
            break
    print(f"{name}: {kills} kills survived, {in_saving} of them in the middle of a save, in {runs} runs")


def in_a_save(child: int, run: Path, moment: random.Random) -> int | None:
    """Waits until the child is saving, for the first to fourth time; its exit status if it ends before."""
    for _ in range(moment.randint(1, 4)):
        while not list((run / "checkpoints").glob(".iteration_*")):
            if (status := ended(child, 0.0005)) is not None:
                return status
        while list((run / "checkpoints").glob(".iteration_*")) and moment.random() < 0.9:
            time.sleep(0.0005)
    return None
