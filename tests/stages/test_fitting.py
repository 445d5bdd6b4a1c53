"""The loop of the supervised stages: its learning rate, the weights it keeps, where it goes on."""

import json
import math
import os
import signal
from dataclasses import replace

import pytest
import torch
from torch import device as torch_device
from torch import nn
from transformers import AutoModelForSequenceClassification

from apa_cli.config.build import build
from apa_cli.config.compose import compose
from apa_cli.datasets.embedded import EmbeddedDataset
from apa_cli.errors import UserError
from apa_cli.runs.checkpoint import load
from apa_cli.runs.stopping import Stopped
from apa_cli.settings import Schedule
from apa_cli.stages import fitting
from apa_cli.stages.fitting import Workplace, factor, fit
from apa_cli.stages.reward_model import pair_loss, run_reward, subset_accuracies
from apa_cli.training.launch import start_reward, start_sft
from apa_cli.types import Example

CPU = torch_device("cpu")
SETTINGS = build(compose([])).sft


def settings(**changes):
    return replace(SETTINGS, **{"epochs": 1, "batch_size": 1, "weight_decay": 0.0, "warmup_ratio": 0.0, **changes})


def silent(*_) -> None:
    """Says nothing."""


def place(**more) -> Workplace:
    return Workplace(CPU, None, silent, silent, **more)


# --- the learning rate --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # Ten steps, two of warm-up: 1/2, 2/2, then from the third on (step − 2) / 8 is done.
        (Schedule.constant, [0.5, 1, 1, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule.linear, [0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        (Schedule.cosine, [0.5, 1, 1, *(0.5 * (1 + math.cos(math.pi * done / 8)) for done in range(1, 8))]),
    ],
)
def test_the_learning_rate_rises_and_then_follows_its_schedule(schedule, expected):
    given = settings(lr_scheduler=schedule, warmup_ratio=0.2)
    assert [factor(given, step, 10) for step in range(10)] == pytest.approx(expected)


# --- which weights are kept ---------------------------------------------------------------------------------


class Number(nn.Module):
    """One weight, w = 0 at first."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))


def fitted(eval_every, epochs=6):
    """Steps of about 0.1 along the gradient −1: w goes up by 0.1 a step, while held out 0.3 would be best."""
    model, rows = Number(), []
    given = settings(epochs=epochs, lr=0.1, lr_scheduler=Schedule.constant, eval_every=eval_every)

    def measure():
        return {"eval/loss": abs(float(model.weight.detach()) - 0.3)}

    best = fit(model, lambda _: -model.weight.sum(), measure, [1], given, 0, place(record=rows.append))
    return model, best, rows


def test_the_weights_that_measured_best_are_kept():
    model, best, rows = fitted(eval_every=1)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["eval/loss"] for row in rows] == pytest.approx([0.2, 0.1, 0, 0.1, 0.2, 0.3], abs=1e-5)
    assert best == rows[2] and float(model.weight) == pytest.approx(0.3, abs=1e-5)


def test_without_evaluations_the_last_weights_are_kept():
    model, best, rows = fitted(eval_every=0)
    assert rows == [best] and best["iteration"] == 6 and float(model.weight) == pytest.approx(0.6, abs=1e-5)


def test_evaluations_come_every_so_many_steps_and_at_the_end():
    assert [row["iteration"] for row in fitted(eval_every=4)[2]] == [4, 6]


def test_a_gradient_that_is_not_finite_is_one_line():
    model = Number()
    with pytest.raises(UserError, match=r"^step 1: the gradient norm is nan"):
        fit(model, lambda _: (model.weight * math.nan).sum(), dict, [1], settings(), 0, place())


def test_frozen_weights_stay_and_are_not_kept(tmp_path):
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    model[0].requires_grad_(False)
    before = [parameter.clone() for parameter in model.parameters()]
    given = settings(epochs=3, lr=0.1, checkpoint_every=2)
    fit(
        model,
        lambda _: model(torch.ones(1)).sum(),
        lambda: {"eval/loss": 0.0},
        [1],
        given,
        0,
        place(checkpoints=tmp_path),
    )
    same = [torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)]
    assert same == [True, True, False, False]
    assert set(load(tmp_path / "iteration_000002")[0]["model"]) == {"1.weight", "1.bias"}


# --- commands -----------------------------------------------------------------------------------------------

WORDS = [
    "model=local", "dataset.train_prompts=40", "dataset.test_prompts=20", "launch.device=cpu", "launch.threads=1",
    *(f"{stage}.{word}" for stage in ("sft", "reward_model") for word in
      ("epochs=3", "batch_size=8", "lr=5e-3", "held_out=20", "eval_every=4", "checkpoint_every=3", "max_tokens=100")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("start", "more"),
    [
        pytest.param(start_sft, [], id="sft"),
        pytest.param(start_reward, ["lora=default", "lora.rank=3"], id="reward-lora"),
        pytest.param(start_sft, ["lora=default", "lora.rank=3"], id="sft-lora", marks=pytest.mark.slow),
        pytest.param(start_reward, [], id="reward", marks=pytest.mark.slow),
    ],
)
def test_a_stage_that_was_stopped_goes_on_as_if_it_had_not_been(start, more, tiny, tmp_path, monkeypatch):
    def configured(*words):
        return build(compose([*WORDS, f"model.path={tiny}", *more, *words]))

    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    start(configured(), whole)
    stage = "sft" if start is start_sft else "reward_model"

    class Stop(Exception):
        pass

    def stopping(*arguments, **keywords):
        path = saving(*arguments, **keywords)
        if path.name == "iteration_000009":
            raise Stop
        return path

    saving = fitting.checkpoints.save
    monkeypatch.setattr(fitting.checkpoints, "save", stopping)
    with pytest.raises(Stop):
        start(configured(), stopped)
    monkeypatch.undo()
    assert not (stopped / "model").exists()
    start(configured(f"resume={stopped}"), tmp_path / "elsewhere")
    assert (stopped / "metrics.jsonl").read_text() == (whole / "metrics.jsonl").read_text()
    assert (stopped / "result.json").read_text() == (whole / "result.json").read_text()
    files = ["model.safetensors", "adapter/adapter_model.safetensors"] if more else ["model.safetensors"]
    for file in files:
        assert (stopped / "model" / file).read_bytes() == (whole / "model" / file).read_bytes()
    steps = [json.loads(line)["iteration"] for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 15]  # 40 rows in batches of 8, three times
    with pytest.raises(UserError, match=rf"^resume: the configuration differs from the run's: {stage}.lr"):
        start(configured(f"resume={stopped}", f"{stage}.lr=1e-3"), tmp_path / "other")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_ends_a_stage_after_its_step_and_it_goes_on(number, tiny, tmp_path, monkeypatch):
    def configured(*words):
        return build(compose([*WORDS, f"model.path={tiny}", "sft.checkpoint_every=0", *words]))

    computed = fitting.factor

    def interrupted(settings, step, total):
        if step == 6:
            os.kill(os.getpid(), number)
        return computed(settings, step, total)

    start_sft(configured(), tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(fitting, "factor", interrupted)
        with pytest.raises(Stopped, match=r"after step 7 of 15, saved; go on with: apa-sft resume=") as caught:
            start_sft(configured(), tmp_path / "stopped")
    assert caught.value.status == 128 + number
    assert [path.name for path in (tmp_path / "stopped" / "checkpoints").iterdir()] == ["iteration_000007"]
    start_sft(configured(f"resume={tmp_path}/stopped"), tmp_path / "elsewhere")
    for file in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()


# --- the reward model ---------------------------------------------------------------------------------------


def test_pair_loss_by_hand():
    chosen, rejected = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    # −log σ(1) = log(1 + e⁻¹) = 0.3133; −log σ(−2) = log(1 + e²) = 2.1269. Centring: 0.1 · 3² = 0.9; 0.1 · 0² = 0.
    assert pair_loss(chosen, rejected, 0.0).tolist() == pytest.approx([0.313262, 2.126928], abs=1e-5)
    assert pair_loss(chosen, rejected, 0.1).tolist() == pytest.approx([1.213262, 2.126928], abs=1e-5)


def test_accuracy_by_subset():
    rows = [Example("p", "a", "b", {"subset": name}) for name in ("kind", "wise", "kind", "kind")]
    report = subset_accuracies(rows, [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0])
    assert report["accuracy/kind"] == pytest.approx(2 / 3) and report["accuracy/wise"] == 0.0
    assert report["accuracy_ci/kind"] == pytest.approx(1.96 * math.sqrt(2 / 3 * 1 / 3 / 3))
    assert subset_accuracies([Example("p", "a", "b", {})], [1.0], [0.0]) == {}


def test_centring_holds_the_scores_around_zero_and_the_report_has_the_subsets(tiny, tmp_path):
    rows = EmbeddedDataset(80, 20, 0, []).load("train")
    rows = [replace(row, columns={"subset": "even" if i % 2 == 0 else "odd"}) for i, row in enumerate(rows)]
    sums = {}
    for coefficient in ("0", "1"):
        words = [*WORDS, f"model.path={tiny}", f"reward_model.center_coef={coefficient}"]
        folder = tmp_path / coefficient
        work = Workplace(CPU, folder, silent, silent)
        report = run_reward(build(compose(words)), rows[:60], rows[60:], 0, work)
        assert {"accuracy/even", "accuracy/odd"} <= report.keys()
        sums[coefficient] = abs(report["score_mean"])
    assert sums["1"] < 0.2 * sums["0"]


def test_a_lora_reward_model_is_left_as_a_whole_and_as_an_adapter_with_its_head(tiny, tmp_path):
    from peft import PeftModel

    rows = EmbeddedDataset(80, 20, 0, []).load("train")
    words = [*WORDS, f"model.path={tiny}", "lora=default", "lora.rank=3"]
    run_reward(build(compose(words)), rows[:60], rows[60:], 0, Workplace(CPU, tmp_path / "model", silent, silent))
    ids = torch.tensor([[7, 99, 31, 4]])
    whole = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()(ids).logits
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1)
    adapted = PeftModel.from_pretrained(base, tmp_path / "model" / "adapter").eval()
    torch.testing.assert_close(adapted(ids).logits, whole, rtol=1e-4, atol=1e-5)
    stored = json.loads((tmp_path / "model" / "adapter" / "adapter_config.json").read_text())
    assert stored["task_type"] == "SEQ_CLS" and stored["modules_to_save"] == ["score"]
    assert float(whole.abs().sum()) > 0
