"""Hooks of a user's algorithm or plan that return something else than they must: one line that names class and hook."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.plans import Online
from apa_cli.errors import UserError
from apa_cli.training.hooks import check_batch, check_loss, check_pair, check_result
from apa_cli.types import Batch, Loss, LossTerm, Metric, PolicyOutput
from tests.builders import NEUTRAL_ALGORITHM, make_batch, make_sequences

TERM = LossTerm("policy", torch.zeros(1, 2), "policy", 1.0)
MEDIAN = Metric(torch.zeros(1, 2), "policy", "median")
SMALL = ["iterations=1", "rollout_batch_size=4", "minibatch_size=4", "evaluation.prompts=2", "algo=awr"]


@dataclass(frozen=True)
class Mine(AWR):
    """AWR with one hook replaced: `hook` is its name, and `change` maps what AWR returns to what this returns."""

    hook: str = ""
    change: object = None

    def apply(self, hook, result):
        return self.change(result) if hook == self.hook else result

    def initial_state(self):
        return self.apply("initial_state", super().initial_state())

    def instruct(self, example, step):
        return self.apply("instruct", example)

    def process_rollout(self, rollout, state, rng, encode):
        return self.apply("process_rollout", (rollout, state))

    def prepare(self, rollout, state):
        return self.apply("prepare", super().prepare(rollout, state))

    def prepare_minibatch(self, batch):
        return self.apply("prepare_minibatch", batch)

    def loss(self, batch, output):
        return self.apply("loss", super().loss(batch, output))


@dataclass(frozen=True)
class MyPlan(Online):
    """The online plan with one hook replaced."""

    hook: str
    result: object

    def rollout(self, step, rng, state):
        return self.result if self.hook == "rollout" else super().rollout(step, rng, state)

    def masks(self, rollout):
        return self.result(rollout) if self.hook == "masks" else super().masks(rollout)


def make_mine(hook, change) -> Mine:
    return Mine(**{**NEUTRAL_ALGORITHM, "lambda_": 1.0, "weight_clip": None}, hook=hook, change=change)


def run_iteration(make_trainer, **parts) -> str:
    """Run an iteration; return the message of its error."""
    with pytest.raises(UserError) as error:
        trainer = make_trainer(*SMALL, **parts)
        trainer.train()
    assert "\n" not in str(error.value)
    return str(error.value)


def add_metric(name, value):
    return lambda pair: (pair[0].replace(metrics={name: value}), pair[1])


def change_mask(change):
    return lambda pair: (pair[0].replace(masks={"policy": change(pair[0].mask)}), pair[1])


def give_metric(metric, name="mine"):
    return lambda loss: replace(loss, metrics={name: metric(loss.terms[0].values.detach())})


@pytest.mark.parametrize(
    ("hook", "change", "message"),
    [
        ("initial_state", lambda state: None, "must return a dict, got None"),
        ("instruct", lambda example: example.prompt, "must return a Example, got a str"),
        ("process_rollout", lambda pair: None, "must return two values (Rollout, dict), got None"),
        ("process_rollout", lambda pair: pair[0], "must return two values (Rollout, dict), got a Rollout"),
        ("process_rollout", lambda pair: (pair[0], None), "got 2 values (Rollout, NoneType)"),
        ("prepare", lambda pair: pair[0], "must return two values (Batch, dict), got a Batch"),
        ("prepare", change_mask(lambda mask: mask.float()), "the mask 'policy', a tensor of torch.float32; a bool"),
        ("prepare", change_mask(lambda mask: mask[:, :1].repeat(1, 99)), "the mask 'policy' of shape [4, 99]; [4]"),
        ("prepare", add_metric("mine", "much"), "gives the metric 'mine', a str; a number is needed"),
        ("prepare", add_metric("mine", torch.ones(())), "gives the metric 'mine', a Tensor; a number is needed"),
        ("prepare", add_metric("kl/sequence", 0.0), "gives the metric 'kl/sequence', a name of the trainer's"),
        ("prepare_minibatch", lambda batch: None, "must return a Batch, got None"),
        ("loss", lambda loss: loss.terms[0].values.mean(), "must return a Loss, got a Tensor"),
        ("loss", lambda loss: Loss([]), "returns a Loss without a term"),
        ("loss", lambda loss: Loss([loss.terms[0], loss.terms[0]]), "gives two terms of the name 'policy'"),
        ("loss", lambda loss: Loss([loss.terms[0].values]), "gives the term None as a Tensor, not a types.LossTerm"),
        ("loss", give_metric(lambda x: Metric(x, "policy", "median")), "the reduction 'median'; give mean or max"),
        ("loss", give_metric(lambda x: float(x.mean())), "gives the metric 'mine' as a float, not a types.Metric"),
        ("loss", give_metric(lambda x: Metric(x, "policy"), "loss/policy"), "a name of the trainer's"),
    ],
)  # fmt: skip
@pytest.mark.slow
def test_a_hook_that_returns_something_else_is_one_line(hook, change, message, make_trainer):
    assert f"algo: Mine.{hook} " in (error := run_iteration(make_trainer, algo=make_mine(hook, change)))
    assert message in error


@pytest.mark.parametrize(
    ("hook", "result", "message"),
    [
        ("rollout", None, "must return a tuple of RolloutPlan, got None"),
        ("rollout", (), "must return a tuple of RolloutPlan, got 0 values ()"),
        ("masks", lambda rollout: rollout.mask, "must give masks by name, got a Tensor"),
        ("masks", lambda rollout: {"policy": rollout.mask.long()}, "gives the mask 'policy', a tensor of torch.int64"),
    ],
)
@pytest.mark.slow
def test_a_hook_of_a_plan_that_returns_something_else_is_one_line(hook, result, message, make_trainer):
    error = run_iteration(make_trainer, plan=MyPlan(hook=hook, result=result))
    assert f"plan: MyPlan.{hook} {message}" in error


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda mine, b: check_pair(mine, "prepare", b, Batch), "prepare must return two values (Batch, dict), got a"),
        (lambda mine, b: check_pair(mine, "prepare", (b, None), Batch), "got 2 values (Batch, NoneType)"),
        (lambda mine, b: check_result(mine, "prepare_minibatch", None, Batch), "minibatch must return a Batch"),
        (
            lambda mine, b: check_batch(mine, "prepare", b.replace(masks={"m": b.mask.long()})),
            "a bool tensor is needed",
        ),
        (
            lambda mine, b: check_batch(mine, "prepare", b.replace(masks={"m": b.mask[0]})),
            "of shape [2]; [1] or [1, 2]",
        ),
        (lambda mine, b: check_batch(mine, "prepare", b.replace(metrics={"m": "x"})), "'m', a str; a number is needed"),
        (lambda mine, b: check_batch(mine, "prepare", b.replace(metrics={"samples": 1})), "a name of the trainer's"),
        (lambda mine, b: check_loss(mine, None, b.masks), "loss must return a Loss, got None"),
        (lambda mine, b: check_loss(mine, Loss([]), b.masks), "returns a Loss without a term"),
        (lambda mine, b: check_loss(mine, Loss([TERM] * 2), b.masks), "two terms of the name 'policy'"),
        (
            lambda mine, b: check_loss(mine, Loss([TERM], {"m": MEDIAN}), b.masks),
            "reduction 'median'; give mean or max",
        ),
        (lambda mine, b: check_loss(mine, Loss([TERM], {"loss/m": MEDIAN}), b.masks), "a name of the trainer's"),
    ],
)
def test_a_wrong_result_names_class_and_hook(check, message):
    with pytest.raises(UserError) as error:
        check(make_mine("", None), make_batch(make_sequences([[1]], [[2, 3]])))
    assert str(error.value).startswith("algo: Mine.") and message in str(error.value)


def test_numbers_of_other_types_become_floats_and_terms_may_be_left_out_where_nothing_counts():
    algorithm = make_mine("", None)
    batch = make_batch(make_sequences([[1]], [[2, 3]]), metrics={"mine": np.float32(0.5), "count": 3})
    metrics = check_batch(algorithm, "prepare", batch).metrics
    assert metrics == {"mine": 0.5, "count": 3.0} and all(type(value) is float for value in metrics.values())
    empty = {name: torch.zeros_like(mask) for name, mask in batch.masks.items()}
    assert check_loss(algorithm, Loss([]), empty).terms == []


def test_a_term_of_the_right_shape_passes():
    mask = torch.ones(1, 2, dtype=torch.bool)
    output = PolicyOutput(torch.zeros(1, 2), {})
    loss = Loss([LossTerm("policy", output.logprobs, "policy", 1.0)], {"mine": Metric(mask.float(), "policy", "max")})
    assert check_loss(make_mine("", None), loss, {"policy": mask}) is loss
