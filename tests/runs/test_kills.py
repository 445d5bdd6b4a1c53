"""kill -9 at any moment, then resume=auto: records and weights equal those of a run that was never killed.

Either the test's process kills the run, at a moment keyed by a seed; or the run kills itself in the middle of a save.
Only one test starts the real command; in the others the run is a fork of this process, which saves the start-up.
"""

import contextlib
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

from apa_cli.runs import checkpoint as checkpoints
from apa_cli.runs.checkpoint import load_checkpoint
from tests.forks import fork_silently, kill_at_call

KILLS = int(os.environ.get("APA_KILLS", "10"))
"""Kills of each slow test."""
ALGORITHMS = {
    "apa": ["algo=apa", "optimizer.lr_scheduler=cosine", "optimizer.warmup_ratio=0.0625"],
    "ppo-adaptive": ["algo=ppo", "algo.kl_controller=adaptive", "algo.kl_horizon=16"],
    "awr": ["algo=awr", "critic=head"],
    "apa-moving-reference": ["algo=apa", "reference.refresh_every=2"],
}
LONG = ["iterations=12", "evaluation.every=3", "checkpoint.every=2", "checkpoint.keep_last=2"]


@pytest.fixture(scope="module")
def uninterrupted(train, tmp_path_factory):
    """uninterrupted(name) → directory of that algorithm's run, and its duration in seconds."""
    runs: dict[str, tuple[Path, float]] = {}

    def make(name: str) -> tuple[Path, float]:
        if name not in runs:
            start_time = time.monotonic()
            directory = train(tmp_path_factory.mktemp("uninterrupted") / "run", *ALGORITHMS[name], *LONG)
            runs[name] = directory, time.monotonic() - start_time
        return runs[name]

    return make


@pytest.fixture
def fork_run(train):
    """fork_run(directory, *overrides, before=) → process id of a run in a fork of this process.

    `before()` is called in the fork, whose output is discarded.
    """
    children = []

    def start(directory: Path, *overrides: str, before=lambda: None) -> int:
        children.append(fork_silently(lambda: (before(), train(directory, *overrides, "resume=auto"))))
        return children[-1]

    yield start
    for child in children:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def wait_for_exit(child: int, seconds: float) -> int | None:
    """Return the exit status of a child that ends within `seconds`, else None."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        process, status = os.waitpid(child, os.WNOHANG)
        if process:
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
        assert names[0] == names[1]  # and there is no incomplete one
        last = names[0][-1]
        tensors, state = load_checkpoint(run / "checkpoints" / last)
        expected_tensors, expected_state = load_checkpoint(whole / "checkpoints" / last)
        assert state == expected_state and tensors.keys() == expected_tensors.keys()
        for group, actual in tensors.items():
            expected = expected_tensors[group]
            assert actual.keys() == expected.keys()
            differing = [name for name, tensor in actual.items() if not torch.equal(tensor, expected[name])]
            assert not differing
        models = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, whole)]
        assert models[0] == models[1]

    return check


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ppo-adaptive"])
def test_killed_run_resumes_to_the_same_result(name, uninterrupted, fork_run, assert_equal, tmp_path):
    whole, seconds = uninterrupted(name)
    run, overrides = tmp_path / "run", [*ALGORITHMS[name], *LONG]
    # Two checkpoints and more: then there are records after the one to resume from.
    child = fork_run(run, *overrides)
    while len(checkpoints.list_checkpoints(run / "checkpoints")) < 2:
        assert wait_for_exit(child, 0.005) is None
    status = wait_for_exit(child, random.Random(name).uniform(0, seconds / 4))
    assert status is None, "the run ended before it was killed"
    kill(child)
    assert not (run / "result.json").exists()
    assert wait_for_exit(fork_run(run, *overrides), 120) == 0
    assert_equal(run, whole)


@pytest.mark.slow
def test_killed_command_resumes_to_the_same_result(uninterrupted, small_overrides, fork_run, assert_equal, tmp_path):
    whole, _ = uninterrupted("apa")
    overrides = [*small_overrides, *ALGORITHMS["apa"], *LONG]
    last = {override.split("=")[0]: override for override in overrides}
    code = "from apa_cli.cli.train import main; main()"
    command = [sys.executable, "-c", code, *last.values(), "name=run", "resume=auto"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    run = tmp_path / "outputs" / "run"
    while len(checkpoints.list_checkpoints(run / "checkpoints")) < 2:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert not (run / "result.json").exists()
    assert wait_for_exit(fork_run(run, *ALGORITHMS["apa"], *LONG), 120) == 0
    assert_equal(run, whole)


@pytest.mark.parametrize(
    ("function", "times", "after"),
    [
        pytest.param("save_file", 1, True, id="first-file", marks=pytest.mark.slow),
        pytest.param("save_file", 7, True, id="incomplete", marks=pytest.mark.slow),
        pytest.param("write_files", 2, True, id="not-renamed", marks=pytest.mark.slow),
        pytest.param("prune_checkpoints", 2, False, id="before-pruning", marks=pytest.mark.slow),
        pytest.param("prune_checkpoints", 3, True, id="after-pruning", marks=pytest.mark.slow),
    ],
)
def test_run_killed_while_saving_resumes_to_the_same_result(
    function, times, after, uninterrupted, fork_run, assert_equal, tmp_path
):
    whole, _ = uninterrupted("apa")
    run, overrides = tmp_path / "run", [*ALGORITHMS["apa"], *LONG]
    child = fork_run(run, *overrides, before=lambda: kill_at_call(checkpoints, function, times, after))
    assert wait_for_exit(child, 120) == -signal.SIGKILL
    incomplete = list((run / "checkpoints").glob(".iteration_*"))
    assert bool(incomplete) == (function in ("save_file", "write_files"))
    assert wait_for_exit(fork_run(run, *overrides), 120) == 0
    assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS)
def test_many_kills_do_not_change_the_result(name, uninterrupted, fork_run, assert_equal, tmp_path):
    """Kill a run repeatedly, every third time while it saves, until it finishes; then the next run."""
    whole, seconds = uninterrupted(name)
    overrides, moment = [*ALGORITHMS[name], *LONG], random.Random(f"many {name}")
    kills, in_saving, runs = 0, 0, 0
    run = tmp_path / "run"
    while True:
        child = fork_run(run, *overrides)
        saving, wait = kills % 3 == 2, moment.uniform(0, 0.7 * seconds)
        status = wait_for_save(child, run, moment) if saving else wait_for_exit(child, wait)
        if status is None and kills < KILLS:
            kill(child)
            kills += 1
            in_saving += bool(list((run / "checkpoints").glob(".iteration_*")))
            continue
        assert (wait_for_exit(child, 120) if status is None else status) == 0
        assert_equal(run, whole)
        runs += 1
        shutil.rmtree(run)
        if kills >= KILLS:
            break
    print(f"{name}: {kills} kills survived, {in_saving} of them in the middle of a save, in {runs} runs")


def wait_for_save(child: int, run: Path, moment: random.Random) -> int | None:
    """Wait until the child saves, for the first to fourth time; return its exit status if it ends before, else None."""
    for _ in range(moment.randint(1, 4)):
        while not list((run / "checkpoints").glob(".iteration_*")):
            if (status := wait_for_exit(child, 0.0005)) is not None:
                return status
        while list((run / "checkpoints").glob(".iteration_*")) and moment.random() < 0.9:
            time.sleep(0.0005)
    return None
