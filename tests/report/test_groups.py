"""Reading run directories and grouping them over their seeds."""

import json
import subprocess
import sys

import pytest

from apa_cli.errors import UserError
from apa_cli.report.groups import group_runs, lambda_text, short_names
from apa_cli.runs.records import find_runs, read_run


def test_a_run_is_read_back(write_run, history):
    run = read_run(write_run("first", history(0.8, 10.0), algorithm="ppo", lambda_=0.05, seed=3))
    assert (run.name, run.algorithm, run.lambda_, run.seed) == ("first", "PPO", 0.05, 3)
    assert run.sft["eval/reward_mean"] == 0.2
    assert run.final["eval/kl_exact"] == 10.0
    assert run.samples == 128
    assert run.minutes == 2.0  # two iterations of 30 + 10 + 20 s
    assert run.series("kl/sequence") == {64: 5.0, 128: 10.0}
    assert run.last("response/eos_rate") == 0.75
    assert run.last("apa/log_z") is None


def test_an_evaluation_after_training_is_not_the_sft_model(write_run, history):
    run = read_run(write_run("late", history(0.8, 10.0)[1:]))
    assert run.sft is None
    assert run.final["eval/reward_mean"] == 0.8


def test_a_line_being_written_is_left_out_and_a_repeated_iteration_counts_once(write_run, history):
    path = write_run("resumed", history(0.8, 10.0)) / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"iteration": 1, "samples": 64, "reward/mean": 0.33}) + "\n" + '{"iteration": 2, "sam')
    run = read_run(path.parent)
    assert [line["iteration"] for line in run.metrics] == [0, 1, 2]
    assert run.series("reward/mean") == {64: 0.33, 128: 0.8}


def test_a_last_line_without_samples_is_left_out(write_run, history):
    path = write_run("cut", history(0.8, 10.0)) / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"iteration": 3}')
    assert read_run(path.parent).samples == 128


def one_line_error(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_run_is_named_in_one_line(tmp_path, write_run, history):
    missing = tmp_path / "missing"
    assert str(missing) in one_line_error(find_runs, missing)
    empty = tmp_path / "empty"
    empty.mkdir()
    assert str(empty) in one_line_error(find_runs, empty)
    assert "config.yaml" in one_line_error(read_run, empty)
    run = write_run("run", history(0.8, 10.0))
    (run / "metrics.jsonl").write_text('{"iteration": 0}\n{"iteration": 1, "samples": 4}\n')
    assert "line 1" in one_line_error(read_run, run)
    (run / "metrics.jsonl").write_text("")
    assert "nothing recorded" in one_line_error(read_run, run)
    (run / "config.yaml").write_text("a: [1\nb: 2")
    assert str(run / "config.yaml") in one_line_error(read_run, run)


def test_runs_are_found_in_a_sweep(tmp_path, write_run, history):
    paths = [write_run(f"sweep/job{number}", history(0.8, 10.0)) for number in (1, 0)]
    (tmp_path / "sweep/job0/wandb").mkdir()
    (tmp_path / "sweep/job0/wandb/config.yaml").write_text("wandb_version: 1\n")
    assert find_runs(tmp_path) == sorted(paths)
    assert find_runs(paths[0]) == [paths[0]]


def groups_of(*directories):
    return group_runs([read_run(directory) for directory in directories])


def test_runs_that_differ_in_nothing_but_their_seed_are_one_group(write_run, history):
    metrics = history(0.8, 10.0)
    groups = groups_of(
        write_run("a", metrics, seed=1, microbatch_size=8, launch={"device": "cpu"}),
        write_run("b", metrics, seed=0, microbatch_size=4, launch={"device": "cuda"}),  # does not change results
        write_run("c", metrics, seed=0, update_epochs=4),
    )
    assert sorted(group.seeds for group in groups) == [[0], [0, 1]]


def test_one_written_as_a_whole_number_is_the_same_setting(write_run, history):
    metrics = history(0.8, 10.0)
    groups = groups_of(write_run("a", metrics, lambda_=1), write_run("b", metrics, lambda_=1.0, seed=1))
    assert [group.seeds for group in groups] == [[0, 1]]


def test_varying_settings_are_those_beyond_algorithm_and_lambda(write_run, history):
    metrics = history(0.8, 10.0)
    groups = groups_of(
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
    groups = groups_of(
        write_run("a", metrics, model={"path": "small", "architecture": {"hidden_size": 64}}),
        write_run("b", metrics, model={"path": "large", "architecture": {"hidden_size": 128}}),
    )
    assert sorted(group.varying["model.path"] for group in groups) == ["large", "small"]
    assert all(list(group.varying) == ["model.path"] for group in groups)


def test_an_algorithms_own_settings_vary_only_within_it(write_run, history):
    metrics = history(0.8, 10.0)
    apa = {"_target_": "apa_cli.algorithms.apa.APA", "lambda_": 0.1, "normalizer": "none"}
    groups = groups_of(
        write_run("a", metrics, algo=apa),
        write_run("b", metrics, algo=apa | {"normalizer": "batch"}),
        write_run("c", metrics, algorithm="ppo", lambda_=0.05),  # has no normalizer, has gamma and kl_coef
    )
    assert [list(group.varying.items()) for group in groups] == [
        [("algo.normalizer", "batch")], [("algo.normalizer", "none")], [("algo.normalizer", None)],
    ]  # fmt: skip


def test_names():
    assert short_names(["optimizer.lr", "epochs"]) == {"optimizer.lr": "lr", "epochs": "epochs"}
    assert short_names(["sft.lr", "optimizer.lr"]) == {"sft.lr": "sft.lr", "optimizer.lr": "optimizer.lr"}
    assert lambda_text("AWR", 2.0) == "2 (step size)"
    assert lambda_text("Mine", 2.0) == "2"


def test_reading_runs_loads_no_heavy_library():
    code = "import sys, apa_cli.report.groups, apa_cli.report.curves, apa_cli.report.compare; print(*sys.modules)"
    loaded = set(subprocess.check_output([sys.executable, "-c", code], text=True).split())
    assert not loaded & {"torch", "wandb", "matplotlib", "tensorboard", "rich", "numpy"}
