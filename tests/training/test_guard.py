"""The divergence guard: its bounds, when it warns, and how it ends a run; and the end at stop_at_kl."""

import math
from contextlib import nullcontext

import pytest

from apa_cli.errors import UserError
from apa_cli.settings import DType, GuardAction, GuardSettings, NonFiniteAction
from apa_cli.training.guard import (
    GuardState,
    check_metrics,
    check_sampler_gap,
    drop_nonfinite,
    find_remarks,
    select_new_warnings,
)

SETTINGS = GuardSettings(
    nonfinite=NonFiniteAction.stop,
    action=GuardAction.warn,
    max_kl=50.0,
    min_entropy=0.05,
    critic_patience=3,
    min_explained_variance=0.0,
)


def make_metrics(kl=1.0, entropy=1.0, explained=0.5):
    metrics = {"kl/sequence": kl, "policy/entropy": entropy, "value/explained_variance": explained}
    return {name: value for name, value in metrics.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "keys"),
    [
        ({}, set()),
        ({"kl": 50.0}, set()),
        ({"kl": 50.1}, {"max_kl"}),
        ({"entropy": 0.05}, set()),
        ({"entropy": 0.049}, {"min_entropy"}),
        ({"kl": 60.0, "entropy": 0.0}, {"max_kl", "min_entropy"}),
    ],
)
def test_a_bound_that_is_passed_gives_a_warning(changes, keys):
    warnings, _ = check_metrics(SETTINGS, make_metrics(**changes), GuardState())
    assert set(warnings) == keys
    assert all(f"guard.{name}" in text or name == "critic_patience" for name, text in warnings.items())


def test_iterations_of_a_blind_critic_are_counted_in_a_row():
    explained = [0.0, -1.0, 0.1, 0.0, -0.5, 0.0, 0.0, 0.2, None, 0.0]
    state, warned = GuardState(), []
    for value in explained:
        warnings, state = check_metrics(SETTINGS, make_metrics(explained=value), state)
        warned.append("critic_patience" in warnings)
    #   in a row:        1      2     0      1      2      3     4     0      0      1
    assert warned == [False, False, False, False, False, True, True, False, False, False]


def test_a_warning_is_new_once():
    first, state = select_new_warnings({"max_kl": "far"}, GuardState(blind=2))
    second, state = select_new_warnings({"max_kl": "far", "min_entropy": "narrow"}, state)
    third, state = select_new_warnings({"min_entropy": "narrow"}, state)
    assert (first, second, third) == ({"max_kl": "far"}, {"min_entropy": "narrow"}, {})
    assert state == GuardState(blind=2, reported=("max_kl", "min_entropy"))


def test_the_worst_critic_counts_whatever_its_name():
    state = GuardState(blind=2)
    metrics = {"learner/explained_variance": 0.9, "guide/explained_variance": -0.1}
    warnings, state = check_metrics(SETTINGS, metrics, state)
    assert warnings["critic_patience"].startswith("guide/explained_variance was at most 0 for 3 iterations")
    assert check_metrics(SETTINGS, {**metrics, "guide/explained_variance": 0.1}, state)[1].blind == 0


def list_remarks(iterations: list[dict], compares_groups: bool = True) -> list[set[str]]:
    """Return the names of the remarks of each iteration."""
    state, names = GuardState(), []
    for metrics in iterations:
        remarks, state = find_remarks(metrics, state, compares_groups)
        names.append(set(remarks))
    return names


def make_scores(mean: float, std: float, groups: float | None = None) -> dict[str, float]:
    metrics = {"reward/mean": mean, "reward/std": std}
    return metrics if groups is None else {**metrics, "reward/equal_groups": groups}


def test_equal_scores_are_remarked_at_once_and_later_after_five_iterations():
    equal, other = make_scores(-1.0, 0.0), make_scores(0.2, 0.4)
    assert list_remarks([equal, equal]) == [{"equal_scores"}] * 2
    assert list_remarks([other, *[equal] * 4, other, *[equal] * 5]) == [set()] * 10 + [{"equal_scores"}]
    # 2⁻¹⁸ of the score, at least of 1: 3.8e-6 near 0, 3.8 near 1e6
    near = [make_scores(0.0, 3.8e-6), make_scores(0.0, 3.9e-6), make_scores(1e6, 3.8), make_scores(1e6, 3.9)]
    assert [list_remarks([each]) for each in near] == [[{"equal_scores"}], [set()]] * 2
    assert list_remarks([{**equal, "reward/penalty": 0.3}]) == [set()]  # penalties tell the responses apart


def test_equal_groups_are_remarked_if_the_algorithm_compares_within_groups():
    equal, other = make_scores(0.2, 0.4, groups=1.0), make_scores(0.2, 0.4, groups=0.9)
    assert list_remarks([equal, other, *[equal] * 5]) == [{"equal_groups"}, *[set()] * 5, {"equal_groups"}]
    assert list_remarks([equal], compares_groups=False) == [set()]
    assert list_remarks([make_scores(0.5, 0.0, groups=1.0)]) == [{"equal_scores"}]  # one cause, one remark


def test_a_metric_that_is_not_finite_is_named_and_left_out():
    metrics = {"mine/share": math.nan, "mine/ratio": math.inf, "mine/mean": 1.0}
    remarks, _ = find_remarks(metrics, GuardState(), False)
    assert set(remarks) == {"nonfinite mine/share", "nonfinite mine/ratio"}
    assert remarks["nonfinite mine/share"].startswith("mine/share is nan")
    assert drop_nonfinite(metrics) == {"mine/mean": 1.0}


@pytest.mark.slow
def test_a_rule_that_nothing_passes_is_said_once_and_trains_with_small_numbers(run_train, records, tmp_path):
    (tmp_path / "rule.py").write_text("def score(prompts, responses):\n    return [-1.0] * len(responses)\n")
    run = run_train("reward=function", f"reward.target={tmp_path}/rule.py:score", "iterations=3")
    (warning,) = [line for line in read_warnings(run) if "reward/std" in line]
    assert "all scores were equal (-1) in the first iteration" in warning
    rows = records(run / "metrics.jsonl")[1:]
    assert [row["score/scale"] for row in rows] == [1, 1, 1]
    # |A| is at most about 1, so (A/λ)² at most about 100 at λ = 0.1
    assert all(row["loss/policy"] < 200 and "value/explained_variance" not in row for row in rows)


BLIND = ["guard.min_explained_variance=1", "guard.critic_patience=3", "guard.max_kl=1e-9", "optimizer.lr=1e-2"]
"""Bounds that every iteration passes: explained variance is at most 1, and every step costs KL."""


def read_warnings(run) -> list[str]:
    """Return the warnings in run.log."""
    return [line for line in (run / "run.log").read_text().splitlines() if line.startswith("warning: ")]


def test_a_run_warns_once_of_each_bound_and_a_resumed_run_continues_the_count(run_train):
    whole = run_train(*BLIND, "iterations=4", name="whole")
    (far,) = [line for line in read_warnings(whole) if "guard.max_kl" in line]
    (blind,) = [line for line in read_warnings(whole) if "explained_variance" in line]
    assert "for 3 iterations in a row" in blind and "lambda" in far
    run_train(*BLIND, "iterations=2", name="run")
    resumed = run_train(*BLIND, "iterations=4", f"resume={whole.parent}/run", name="run")
    assert sorted(read_warnings(resumed)) == sorted([far, blind])  # iterations 1 and 2, then 3


@pytest.mark.slow
def test_a_run_that_the_guard_ended_can_be_resumed(run_train, comparable):
    overrides = [*BLIND, "iterations=4", "checkpoint.every=0", "guard.max_kl=null"]
    with pytest.raises(UserError, match=r"explained_variance.*guard\.action=stop.*after iteration 3.*resume=") as error:
        run_train(*overrides, "guard.action=stop")
    assert "\n" not in str(error.value) and error.value.status == 1
    run = run_train(*overrides, name="whole").parent / "run"
    assert len(comparable(run / "metrics.jsonl")) == 4  # 0 to 3
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["iteration_000003"]
    run_train(*overrides, f"resume={run}")
    assert comparable(run / "metrics.jsonl") == comparable(run.parent / "whole" / "metrics.jsonl")


def test_a_healthy_run_has_no_warnings(run_train):
    assert read_warnings(run_train()) == []


def test_a_run_ends_at_stop_at_kl_with_its_results(run_train, records):
    overrides = ["optimizer.lr=1e-2", "iterations=30", "evaluation.every=0", "checkpoint.every=0"]
    run = run_train(*overrides, "stop_at_kl=1.5")
    rows = records(run / "metrics.jsonl")
    kls = [row["kl/sequence"] for row in rows[1:]]
    assert len(kls) < 30 and kls[-1] >= 1.5 and max(kls[:-1]) < 1.5
    assert "eval/kl_exact" in rows[-1] and (run / "model" / "config.json").is_file()
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"iteration_{len(kls):06d}"]
    assert f"the run ends after iteration {len(kls)}" in (run / "run.log").read_text()
    run_train(*overrides, "stop_at_kl=1.5", f"resume={run}")
    assert len(records(run / "metrics.jsonl")) == len(rows)  # it has ended already
    run_train(*overrides, f"stop_at_kl={kls[-1] + 0.01}", f"resume={run}")
    assert len(records(run / "metrics.jsonl")) > len(rows)


@pytest.mark.parametrize(("dtype", "gap", "is_refused"), [
    ("float32", 0.049, False), ("float32", 0.051, True), ("bfloat16", 0.49, False), ("bfloat16", 0.51, True),
    ("float32", math.nan, True),
])  # fmt: skip
def test_a_sampler_gap_beyond_rounding_ends_the_run_and_names_the_sampler(dtype, gap, is_refused):
    with pytest.raises(UserError, match=r"^policy/sampler_gap is .*not lambda") if is_refused else nullcontext():
        check_sampler_gap({"policy/sampler_gap": gap}, DType(dtype))
    check_sampler_gap({}, DType(dtype))
