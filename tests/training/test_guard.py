"""The divergence guard: its bounds, when it warns, and how it ends a run; and the end at stop_at_kl."""

import pytest

from apa_cli.errors import UserError
from apa_cli.settings import GuardAction, GuardSettings, NonFiniteAction
from apa_cli.training.guard import GuardState, check_metrics, select_new_warnings

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
