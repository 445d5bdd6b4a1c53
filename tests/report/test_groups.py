"""Grouping runs over their seeds, and the settings in which groups differ."""

import subprocess
import sys

from apa_cli.report.groups import group_runs
from apa_cli.runs.records import RecordedRun


def read_groups(*directories):
    return group_runs([RecordedRun.read(directory) for directory in directories])


def test_runs_that_differ_in_nothing_but_their_seed_are_one_group(write_run, history):
    metrics = history(0.8, 10.0)
    groups = read_groups(
        write_run("a", metrics, seed=1, microbatch_size=8, launch={"device": "cpu"}),
        write_run("b", metrics, seed=0, microbatch_size=4, launch={"device": "cuda"}),  # does not change results
        write_run("c", metrics, seed=0, update_epochs=4),
    )
    assert sorted(group.seeds for group in groups) == [[0], [0, 1]]


def test_an_integer_and_the_equal_float_are_the_same_setting(write_run, history):
    metrics = history(0.8, 10.0)
    groups = read_groups(write_run("a", metrics, lambda_=1), write_run("b", metrics, lambda_=1.0, seed=1))
    assert [group.seeds for group in groups] == [[0, 1]]


def test_a_run_with_former_key_names_joins_its_group(write_run, history):
    metrics = history(0.8, 10.0)
    old = {"rollout_batch": 64, "minibatch": 32, "microbatch": 8, "epochs": 2, "eval_every": 5, "eval_seed": 1234}
    new = {
        "rollout_batch_size": 64, "minibatch_size": 32, "microbatch_size": 4, "update_epochs": 2,
        "evaluation": {"every": 10, "seed": 1234},
    }  # fmt: skip
    lr = {"lr": 3e-4}
    groups = read_groups(
        write_run("old", metrics, optimizer=lr | {"schedule": "cosine", "warmup_steps": 0}, **old),
        write_run("new", metrics, seed=1, optimizer=lr | {"lr_scheduler": "cosine", "warmup_ratio": 0.0}, **new),
    )
    assert [group.seeds for group in groups] == [[0, 1]]


def test_varying_settings_are_those_beyond_algorithm_and_lambda(write_run, history):
    metrics = history(0.8, 10.0)
    groups = read_groups(
        write_run("a", metrics, lambda_=0.3, optimizer={"lr": 1e-4, "eps": 1e-8}),
        write_run("b", metrics, lambda_=0.1, optimizer={"lr": 3e-4, "eps": 1e-8}),
        write_run("c", metrics, algorithm="ppo", lambda_=0.05, optimizer={"lr": 3e-4, "eps": 1e-8}),
    )
    assert [(group.algorithm, group.lambda_) for group in groups] == [
        ("APA", 0.1),
        ("APA", 0.3),
        ("PPO", 0.05),
    ]
    assert [group.varying for group in groups] == [
        {"optimizer.lr": 3e-4}, {"optimizer.lr": 1e-4}, {"optimizer.lr": 3e-4},
    ]  # fmt: skip
    assert groups[1].label == "APA  λ = 0.3 (temperature and pull)  lr = 0.0001"
    assert groups[2].label == "PPO  λ = 0.05 (price of KL)  lr = 0.0003"


def test_settings_of_a_section_that_change_together_are_named_once(write_run, history):
    metrics = history(0.8, 10.0)
    groups = read_groups(
        write_run("a", metrics, model={"path": "small", "architecture": {"hidden_size": 64}}),
        write_run("b", metrics, model={"path": "large", "architecture": {"hidden_size": 128}}),
    )
    assert sorted(group.varying["model.path"] for group in groups) == ["large", "small"]
    assert all(list(group.varying) == ["model.path"] for group in groups)


def test_an_algorithms_own_settings_vary_only_within_it(write_run, history):
    metrics = history(0.8, 10.0)
    apa = {"_target_": "apa_cli.algorithms.apa.APA", "lambda_": 0.1, "normalizer": "none"}
    groups = read_groups(
        write_run("a", metrics, algo=apa),
        write_run("b", metrics, algo=apa | {"normalizer": "batch"}),
        write_run("c", metrics, algorithm="ppo", lambda_=0.05),  # has no normalizer, has gamma and kl_coef
    )
    assert [list(group.varying.items()) for group in groups] == [
        [("algo.normalizer", "batch")], [("algo.normalizer", "none")], [("algo.normalizer", None)],
    ]  # fmt: skip


def test_the_meaning_of_lambda_is_that_of_the_run_that_records_it(write_run, history):
    metrics = history(0.8, 10.0)
    (group,) = read_groups(write_run("old", metrics, environment=None), write_run("new", metrics, seed=1))
    assert group.label == "APA  λ = 0.1 (temperature and pull)"


def test_report_modules_load_no_heavy_library():
    code = "import sys, apa_cli.report.groups, apa_cli.report.curves, apa_cli.report.compare; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "wandb", "matplotlib", "tensorboard", "rich", "numpy"}
