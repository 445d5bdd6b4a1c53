"""Jobs of a sweep share one process; each gives the numbers of a separate run."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
import yaml

from apa_cli.config.run_names import make_job_name


def to_experiment(overrides: list[str]) -> str:
    """Return the overrides as a yaml of the group `experiment`, so that a command line stays short."""
    groups = {"model", "dataset", "reward"}
    values = dict(override.split("=", 1) for override in overrides)
    tree: dict = {"defaults": [{f"override /{key}": values[key]} for key in sorted(groups & values.keys())]}
    for key, value in values.items():
        if key not in groups:
            *sections, last = key.split(".")
            node = tree
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = yaml.safe_load(value)
    return "# @package _global_\n" + yaml.safe_dump(tree)


@pytest.fixture(scope="module")
def sweep(small_overrides, tmp_path_factory):
    """Folder in which `apa-train -m experiment=small seed=0,1 name=pair` has run."""
    folder = tmp_path_factory.mktemp("sweep")
    (folder / "mine" / "experiment").mkdir(parents=True)
    (folder / "mine" / "experiment" / "small.yaml").write_text(to_experiment([*small_overrides, "iterations=2"]))
    process = subprocess.run(
        [
            sys.executable, "-c", "from apa_cli.cli.train import main; main()",
            "--config-dir", "mine", "-m", "experiment=small", "seed=0,1", "name=pair",
        ],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert [line for line in lines if line.startswith("job ")] == ["job 1 of 2: seed=0", "job 2 of 2: seed=1"]
    return folder


@pytest.mark.slow
def test_each_job_equals_a_separate_run(sweep, run_train, comparable, records):
    jobs = sorted(job for job in (sweep / "outputs" / "sweeps" / "pair").iterdir() if job.is_dir())
    assert [yaml.safe_load((job / "config.yaml").read_text())["seed"] for job in jobs] == [0, 1]
    # In reverse order: state that a run leaves in its process would reach another run here than in the sweep.
    for seed, job in reversed(list(enumerate(jobs))):
        alone = run_train("iterations=2", f"seed={seed}", name=f"alone_{seed}")
        assert comparable(job / "metrics.jsonl") == comparable(alone / "metrics.jsonl")
        assert records(job / "samples.jsonl") == records(alone / "samples.jsonl")
    first, second = (comparable(job / "metrics.jsonl") for job in jobs)
    assert first[1]["reward/mean"] != second[1]["reward/mean"]


@pytest.mark.slow
def test_job_directories_are_named_by_the_overrides(sweep):
    (outputs,) = (sweep / "outputs").iterdir()
    assert outputs.name == "sweeps"
    names = sorted(job.name for job in (outputs / "pair").iterdir() if job.is_dir())
    assert len(names) == 2
    assert all(f"seed={seed}" in name for seed, name in enumerate(names))
    assert not any("name=" in name for name in names)


@pytest.mark.slow
def test_stopped_sweep_resumes_with_the_remaining_jobs(small_overrides, run_train, comparable, tmp_path):
    (tmp_path / "mine" / "experiment").mkdir(parents=True)
    overrides = [*small_overrides, "iterations=30", "evaluation.every=0", "checkpoint.every=2"]
    (tmp_path / "mine" / "experiment" / "small.yaml").write_text(to_experiment(overrides))
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
    _, errors = process.communicate()
    assert process.returncode == 143
    assert "stopped by SIGTERM after iteration" in errors
    words = shlex.split(errors.partition("continue with: ")[2])
    assert words[0] == "apa-train" and words[1:] == command[3:]  # which has a name and resume=auto
    jobs = sorted(sweep.glob("*seed=*"))
    assert [(job / "result.json").exists() for job in jobs] == [True, False]  # and the third has not started
    written = (jobs[0] / "model" / "model.safetensors").stat().st_mtime_ns
    process = subprocess.run(command, capture_output=True, check=False, **options)
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("finished (30 iterations); nothing is left to do") == 1
    assert (jobs[0] / "model" / "model.safetensors").stat().st_mtime_ns == written
    for seed, job in enumerate(sorted(sweep.glob("*seed=*"))):
        alone = run_train(*overrides[-3:], f"seed={seed}", name=f"alone_{seed}")
        assert comparable(job / "metrics.jsonl") == comparable(alone / "metrics.jsonl")


def test_jobs_that_differ_after_many_overrides_get_separate_directories():
    long = ",".join(f"section.key_{number:02d}=value" for number in range(20))
    names = {make_job_name(f"{long},seed={seed}") for seed in range(3)}
    assert len(names) == 3
    assert max(map(len, names)) <= 255  # the longest name that a file system allows


def test_path_among_the_overrides_makes_no_nested_folders():
    assert "/" not in make_job_name("model.path=some/where,seed=0")


@pytest.mark.slow
def test_parallel_jobs_give_the_same_runs_and_a_failure_is_one_line(sweep, comparable):
    arguments = ["-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "experiment=small", "seed=0,1"]
    command = [sys.executable, "-c", "from apa_cli.cli.train import main; main()", "--config-dir", "mine", *arguments]
    options = {"cwd": sweep, "env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True, "text": True}
    process = subprocess.run([*command, "name=beside"], check=False, **options)
    assert process.returncode == 0, process.stderr
    jobs = [sorted((sweep / "outputs" / "sweeps" / name).glob("*/metrics.jsonl")) for name in ("pair", "beside")]
    assert len(jobs[0]) == len(jobs[1]) == 2
    for first, second in zip(*jobs, strict=True):
        assert comparable(first) == comparable(second)
    process = subprocess.run([*command, "name=wrong", "reward.target=nowhere.py:f"], check=False, **options)
    assert process.returncode == 1
    assert "apa-train: " in process.stderr.splitlines()[-1] and "no file nowhere.py" in process.stderr.splitlines()[-1]
