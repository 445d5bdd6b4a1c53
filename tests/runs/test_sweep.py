"""A sweep's jobs share one process, and yet each gives the numbers of a run of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from apa_cli.config.compose import directory_name


def as_yaml(words: list[str]) -> str:
    """The words of a small run as one file of the group `experiment`, so that a command line stays short."""
    groups = {"model", "dataset", "reward"}
    chosen = dict(word.split("=", 1) for word in words)
    tree: dict = {"defaults": [{f"override /{key}": chosen[key]} for key in sorted(groups & chosen.keys())]}
    for key, value in chosen.items():
        if key not in groups:
            *sections, last = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = yaml.safe_load(value)
    return "# @package _global_\n" + yaml.safe_dump(tree)


@pytest.fixture(scope="module")
def sweep(small_words, tmp_path_factory):
    """The folder in which `apa-train -m experiment=small seed=0,1 name=pair` was run, and what it printed."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine" / "experiment").mkdir(parents=True)
    (folder / "mine" / "experiment" / "small.yaml").write_text(as_yaml([*small_words, "iterations=2"]))
    done = subprocess.run(
        [
            sys.executable, "-c", "from apa_cli.cli.train import main; main()",
            "--config-dir", "mine", "-m", "experiment=small", "seed=0,1", "name=pair",
        ],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("job ")] == ["job 1 of 2: seed=0", "job 2 of 2: seed=1"]
    return folder


@pytest.mark.slow
def test_each_job_equals_a_run_of_its_own(sweep, run_train, comparable, records):
    jobs = sorted(job for job in (sweep / "outputs" / "sweeps" / "pair").iterdir() if job.is_dir())
    assert [yaml.safe_load((job / "config.yaml").read_text())["seed"] for job in jobs] == [0, 1]
    # The other way round: what a run leaves behind in its process would not reach the same run in both.
    for seed, job in reversed(list(enumerate(jobs))):
        alone = run_train("iterations=2", f"seed={seed}", name=f"alone_{seed}")
        assert comparable(job / "metrics.jsonl") == comparable(alone / "metrics.jsonl")
        assert records(job / "samples.jsonl") == records(alone / "samples.jsonl")
    first, second = (comparable(job / "metrics.jsonl") for job in jobs)
    assert first[1]["reward/mean"] != second[1]["reward/mean"]


@pytest.mark.slow
def test_directories_are_named_by_the_overrides(sweep):
    (outputs,) = (sweep / "outputs").iterdir()
    assert outputs.name == "sweeps"
    names = sorted(job.name for job in (outputs / "pair").iterdir() if job.is_dir())
    assert len(names) == 2
    assert all(f"seed={seed}" in name for seed, name in enumerate(names))
    assert not any("name=" in name for name in names)


@pytest.mark.slow
def test_a_sweep_that_was_stopped_does_what_is_left(small_words, run_train, comparable, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    words = [*small_words, "iterations=30", "evaluation.every=0", "checkpoint.every=2"]
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text(as_yaml(words))
    command = [
        sys.executable, "-c", "from apa_cli.cli.train import main; main()", "--config-dir", "mine", "-m",
        "experiment=small", "seed=0,1,2", "name=three", "resume=auto",
    ]  # fmt: skip
    options = {"cwd": tmp_path, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "text": True}
    sweep = tmp_path / "outputs" / "sweeps" / "three"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
    while not list(sweep.glob("*seed=1*/checkpoints/iteration_000002")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 143
    assert "stopped by SIGTERM after iteration" in said and "go on with: the same words and resume=auto" in said
    jobs = sorted(sweep.glob("*seed=*"))
    assert [(job / "result.json").exists() for job in jobs] == [True, False]  # and the third was not begun
    written = (jobs[0] / "model" / "model.safetensors").stat().st_mtime_ns
    done = subprocess.run(command, capture_output=True, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished (30 iterations), nothing is left to do") == 1
    assert (jobs[0] / "model" / "model.safetensors").stat().st_mtime_ns == written
    for seed, job in enumerate(sorted(sweep.glob("*seed=*"))):
        alone = run_train(*words[-3:], f"seed={seed}", name=f"alone_{seed}")
        assert comparable(job / "metrics.jsonl") == comparable(alone / "metrics.jsonl")


def test_jobs_that_differ_behind_many_words_get_directories_of_their_own():
    words = ",".join(f"section.key_{number:02d}=value" for number in range(20))
    names = {directory_name(f"{words},seed={seed}") for seed in range(3)}
    assert len(names) == 3
    assert max(map(len, names)) <= 255  # the longest name a file system takes


def test_a_path_among_the_overrides_makes_no_nested_folders():
    assert "/" not in directory_name("model.path=some/where,seed=0")


@pytest.mark.slow
def test_jobs_side_by_side_are_the_same_runs_and_a_failure_is_one_line(sweep, comparable):
    words = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "experiment=small", "seed=0,1"]
    command = [sys.executable, "-c", "from apa_cli.cli.train import main; main()", "--config-dir", "mine", *words]
    options = {"cwd": sweep, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    done = subprocess.run([*command, "name=beside"], check=False, **options)
    assert done.returncode == 0, done.stderr
    jobs = [sorted((sweep / "outputs" / "sweeps" / name).glob("*/metrics.jsonl")) for name in ("pair", "beside")]
    assert len(jobs[0]) == len(jobs[1]) == 2
    for one, other in zip(*jobs, strict=True):
        assert comparable(one) == comparable(other)
    done = subprocess.run([*command, "name=wrong", "reward.target=nowhere.py:f"], check=False, **options)
    assert done.returncode == 1
    assert "apa-train: " in done.stderr.splitlines()[-1] and "no file nowhere.py" in done.stderr.splitlines()[-1]
