"""The divergence guard: what is a sign, when it is said, and what a run does about it."""

import pytest

from apa_cli.errors import UserError
from apa_cli.settings import GuardAction, GuardSettings, NonFinite
from apa_cli.training.guard import Watch, signs, unreported

SETTINGS = GuardSettings(
    nonfinite=NonFinite.stop,
    action=GuardAction.warn,
    max_kl=50.0,
    min_entropy=0.05,
    critic_patience=3,
    min_explained_variance=0.0,
)


def metrics(kl=1.0, entropy=1.0, explained=0.5):
    found = {"kl/sequence": kl, "policy/entropy": entropy, "value/explained_variance": explained}
    return {name: value for name, value in found.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({}, set()),
        ({"kl": 50.0}, set()),
        ({"kl": 50.1}, {"max_kl"}),
        ({"entropy": 0.05}, set()),
        ({"entropy": 0.049}, {"min_entropy"}),
        ({"kl": 60.0, "entropy": 0.0}, {"max_kl", "min_entropy"}),
    ],
)
def test_a_bound_that_is_passed_is_a_sign(changes, sign):
    found, _ = signs(SETTINGS, metrics(**changes), Watch())
    assert set(found) == sign
    assert all(f"guard.{name}" in text or name == "critic_patience" for name, text in found.items())


def test_the_critics_iterations_are_counted_in_a_row():
    explained = [0.0, -1.0, 0.1, 0.0, -0.5, 0.0, 0.0, 0.2, None, 0.0]
    watch, found = Watch(), []
    for value in explained:
        new, watch = signs(SETTINGS, metrics(explained=value), watch)
        found.append("critic_patience" in new)
    #  in a row:        1      2     0      1      2      3     4     0      0      1
    assert found == [False, False, False, False, False, True, True, False, False, False]


def test_a_sign_is_said_once():
    first, watch = unreported({"max_kl": "far"}, Watch(blind=2))
    second, watch = unreported({"max_kl": "far", "min_entropy": "narrow"}, watch)
    third, watch = unreported({"min_entropy": "narrow"}, watch)
    assert (first, second, third) == ({"max_kl": "far"}, {"min_entropy": "narrow"}, {})
    assert watch == Watch(blind=2, reported=("max_kl", "min_entropy"))


BLIND = ["guard.min_explained_variance=1", "guard.critic_patience=3", "guard.max_kl=1e-9", "optimizer.lr=1e-2"]
"""No critic explains more than everything; every step away from the reference is too far."""


def warnings(run) -> list[str]:
    return [line for line in (run / "run.log").read_text().splitlines() if line.startswith("warning: ")]


def test_a_run_says_each_sign_once_and_a_resumed_one_goes_on_counting(run_train):
    whole = run_train(*BLIND, "iterations=4", name="whole")
    (far,) = [line for line in warnings(whole) if "guard.max_kl" in line]
    (blind,) = [line for line in warnings(whole) if "explained_variance" in line]
    assert "for 3 iterations in a row" in blind and "lambda" in far
    run_train(*BLIND, "iterations=2", name="run")
    resumed = run_train(*BLIND, "iterations=4", f"resume={whole.parent}/run", name="run")
    assert sorted(warnings(resumed)) == sorted([far, blind])  # iterations 1 and 2, then 3


def test_a_run_that_the_guard_stops_can_be_resumed(run_train, comparable):
    words = [*BLIND, "iterations=4", "checkpoint.every=0", "guard.max_kl=null"]
    with pytest.raises(UserError, match=r"explained_variance.*guard\.action=stop.*after iteration 3.*resume=") as error:
        run_train(*words, "guard.action=stop")
    assert "\n" not in str(error.value) and error.value.status == 1
    run = run_train(*words, name="whole").parent / "run"
    assert len(comparable(run / "metrics.jsonl")) == 4  # 0 to 3
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == ["iteration_000003"]
    run_train(*words, f"resume={run}")
    assert comparable(run / "metrics.jsonl") == comparable(run.parent / "whole" / "metrics.jsonl")


def test_a_healthy_run_says_nothing(run_train):
    assert warnings(run_train()) == []


def test_a_run_ends_at_its_kl_budget_like_any_other(run_train, records):
    words = ["optimizer.lr=1e-2", "iterations=30", "evaluation.every=0", "checkpoint.every=0"]
    run = run_train(*words, "stop_at_kl=1.5")
    rows = records(run / "metrics.jsonl")
    kls = [row["kl/sequence"] for row in rows[1:]]
    assert len(kls) < 30 and kls[-1] >= 1.5 and max(kls[:-1]) < 1.5
    assert "eval/kl_exact" in rows[-1] and (run / "model" / "config.json").is_file()
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"iteration_{len(kls):06d}"]
    assert f"the run ends with iteration {len(kls)}" in (run / "run.log").read_text()
    run_train(*words, "stop_at_kl=1.5", f"resume={run}")
    assert len(records(run / "metrics.jsonl")) == len(rows)  # it has ended
    run_train(*words, f"stop_at_kl={kls[-1] + 0.01}", f"resume={run}")
    assert len(records(run / "metrics.jsonl")) > len(rows)
