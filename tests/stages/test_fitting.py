"""The training loop of the supervised stages: learning rate, best weights, resuming."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import nn

from apa_cli.config.build import build_config
from apa_cli.config.compose import compose
from apa_cli.errors import UserError
from apa_cli.runs.checkpoint import load_checkpoint
from apa_cli.runs.stopping import RunStopped
from apa_cli.settings import LRScheduler
from apa_cli.stages import fitting
from apa_cli.stages.fitting import compute_stage_lr_factor, fit
from apa_cli.training.launch import start_reward, start_sft
from tests.builders import make_stage_context

SETTINGS = build_config(compose([])).sft


def make_stage_settings(**changes):
    return replace(SETTINGS, **{"epochs": 1, "batch_size": 1, "weight_decay": 0.0, "warmup_ratio": 0.0, **changes})


# --- the learning rate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Ten steps, two of warm-up: 1/2, 2/2, then from the third on the progress is (step − 2) / 8.
        (LRScheduler.constant, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (LRScheduler.linear, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (LRScheduler.cosine, [0.5, 1, 1, *(0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(1, 8))]),
    ],
)
def test_the_learning_rate_warms_up_and_then_follows_its_schedule(schedule, expected):
    stage = make_stage_settings(lr_scheduler=schedule, warmup_ratio=0.2)
    assert [compute_stage_lr_factor(stage, step, 10) for step in range(10)] == pytest.approx(expected)


# --- the best weights ---------------------------------------------------------------------------------------


class OneWeight(nn.Module):
    """A module of one weight, which starts at 0."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def fit_one_weight(eval_every, epochs=6):
    """Fit with loss −w, so that w rises by 0.1 a step, and eval/loss |w − 0.3|, which is lowest after 3 steps."""
    model, rows = OneWeight(), []
    stage = make_stage_settings(epochs=epochs, lr=0.1, lr_scheduler=LRScheduler.constant, eval_every=eval_every)

    def measure():
        return {"eval/loss": abs(float(model.weight.detach()) - 0.3)}

    best = fit(model, lambda _: -model.weight.sum(), measure, [1], stage, 0, make_stage_context(record=rows.append))
    return model, best, rows


def test_the_weights_of_the_best_evaluation_are_kept():
    model, best, rows = fit_one_weight(eval_every=1)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["eval/loss"] for row in rows] == pytest.approx([0.2, 0.1, 0, 0.1, 0.2, 0.3], abs=1e-5)
    assert best == rows[2] and float(model.weight.detach()) == pytest.approx(0.3, abs=1e-5)


def test_without_evaluations_the_last_weights_are_kept():
    model, best, rows = fit_one_weight(eval_every=0)
    assert rows == [best] and best["iteration"] == 6 and float(model.weight.detach()) == pytest.approx(0.6, abs=1e-5)


def test_evaluations_follow_eval_every_and_the_last_step():
    assert [row["iteration"] for row in fit_one_weight(eval_every=4)[2]] == [4, 6]


def test_a_non_finite_gradient_is_a_one_line_error():
    model = OneWeight()
    with pytest.raises(UserError, match=r"^step 1: the gradient norm is nan"):
        fit(model, lambda _: (model.weight * math.nan).sum(), dict, [1], make_stage_settings(), 0, make_stage_context())


def test_frozen_weights_are_neither_trained_nor_saved(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    stage = make_stage_settings(epochs=3, lr=0.1, checkpoint_every=2)
    fit(
        model,
        lambda _: model(torch.ones(1)).sum(),
        lambda: {"eval/loss": 0.0},
        [1],
        stage,
        0,
        make_stage_context(checkpoint_folder=tmp_path),
    )
    unchanged = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert unchanged == [True, True, False, False]
    assert set(load_checkpoint(tmp_path / "iteration_000002")[0]["model"]) == {"1.weight", "1.bias"}


# --- commands -----------------------------------------------------------------------------------------------

OVERRIDES = [
    "model=local", "dataset.train_prompts=40", "dataset.test_prompts=20", "launch.device=cpu", "launch.threads=1",
    *(f"{stage}.{override}" for stage in ("sft", "reward_model") for override in
      ("epochs=3", "batch_size=8", "lr=5e-3", "held_out=20", "eval_every=4", "checkpoint_every=3", "max_tokens=100")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "options"),
    [
        pytest.param(start_sft, [], id="sft"),
        pytest.param(start_reward, ["lora=default", "lora.rank=3"], id="reward-lora", marks=pytest.mark.slow),
        pytest.param(start_sft, ["lora=default", "lora.rank=3"], id="sft-lora", marks=pytest.mark.slow),
        pytest.param(start_reward, [], id="reward", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_stage_equals_an_uninterrupted_one(start, options, tiny, tmp_path, monkeypatch):
    def compose_config(*overrides):
        return build_config(compose([*OVERRIDES, f"model.path={tiny}", *options, *overrides]))

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start(compose_config(), whole)
    stage = "sft" if start is start_sft else "reward_model"

    class Crash(Exception):
        pass

    def save_and_crash(*arguments, **keywords):
        path = save_checkpoint(*arguments, **keywords)
        if path.name == "iteration_000009":
            raise Crash
        return path

    save_checkpoint = fitting.checkpoints.save_checkpoint
    monkeypatch.setattr(fitting.checkpoints, "save_checkpoint", save_and_crash)
    with pytest.raises(Crash):
        start(compose_config(), stopped)
    monkeypatch.undo()
    assert not (stopped / "model").exists()
    start(compose_config(f"resume={stopped}"), tmp_path / "elsewhere")
    assert (stopped / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (stopped / "result.json").read_text() == (whole / "result.json").read_text()
    files = ["model.safetensors", "adapter/adapter_model.safetensors"] if options else ["model.safetensors"]
    for file in files:
        assert (stopped / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
    steps = [json.loads(line)["iteration"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 15]  # 40 rows in batches of 8, three times
    with pytest.raises(UserError, match=rf"^resume: the configuration differs from the run's: {stage}.lr"):
        start(compose_config(f"resume={stopped}", f"{stage}.lr=1e-3"), tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_stops_a_stage_after_its_step_and_it_resumes(number, tiny, tmp_path, monkeypatch):
    def compose_config(*overrides):
        return build_config(compose([*OVERRIDES, f"model.path={tiny}", "sft.checkpoint_every=0", *overrides]))

    def signal_at_step_6(settings, step, total):
        if step == 6:
            os.kill(os.getpid(), number)
        return compute_stage_lr_factor(settings, step, total)

    start_sft(compose_config(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "compute_stage_lr_factor", signal_at_step_6)
        with pytest.raises(RunStopped, match=r"after step 7 of 15, saved; continue with: apa-sft resume=") as error:
            start_sft(compose_config(), tmp_path / "stopped")
    assert error.value.status == 128 + number
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["iteration_000007"]
    start_sft(compose_config(f"resume={tmp_path}/stopped"), tmp_path / "elsewhere")
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
