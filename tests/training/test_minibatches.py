"""Minibatches and microbatches of any number of rows: each row once, the same work on every rank, the learning rate."""

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from apa_cli.distributed.world import World
from apa_cli.settings import LRScheduler, UpdateOrder
from apa_cli.training.minibatches import count_steps, split_into_microbatches, split_into_minibatches
from apa_cli.training.objective import NO_MAXIMUM
from apa_cli.types import Batch, Loss, LossTerm, Needs, PolicyOutput, Sequences
from tests.training.builders import (
    ALGORITHMS,
    OPTIMIZER,
    RUN,
    Probe,
    assert_same,
    build_model,
    compute_gradients,
    flatten,
    make_objective,
    make_response_batch,
    make_updater,
)

# Minibatches


@pytest.mark.parametrize(
    ("rows", "sequences", "minibatch", "sizes"),
    [
        # rows · sequences / minibatch, rounded, is the number of steps: at least 1, at most the rows
        (12, 1, 4, [4, 4, 4]),
        (1, 1, 4, [1]),  # ¼
        (5, 1, 4, [5]),  # 1¼
        (7, 1, 4, [4, 3]),  # 1¾
        (25, 1, 4, [5, 4, 4, 4, 4, 4]),  # 6¼, more rows than the 12 of the rollout batch
        (6, 2, 4, [2, 2, 2]),  # six pairs are 12 responses
        (7, 2, 4, [2, 2, 2, 1]),  # 14 responses: 3½, to the even number
        (3, 2, 1, [1, 1, 1]),  # 6, but there are only three rows
        (4, 3, 12, [4]),
        (0, 1, 4, []),
    ],
)
@pytest.mark.parametrize("order", UpdateOrder)
def test_every_row_is_in_one_minibatch_of_each_pass(rows, sequences, minibatch, sizes, order):
    run = replace(RUN, rollout_batch_size=12, minibatch_size=minibatch, update_epochs=3, update_order=order)
    parts = split_into_minibatches(run, 2, rows, sequences)
    assert sorted(map(len, parts), reverse=True) == sorted(3 * sizes, reverse=True)
    assert Counter(torch.cat(parts).tolist() if parts else []) == {row: 3 for row in range(rows)}
    if order is UpdateOrder.epochs:
        passes = [torch.cat(parts[i : i + len(sizes)]).tolist() for i in range(0, len(parts), max(1, len(sizes)))]
        assert all(sorted(rows_of_pass) == list(range(rows)) for rows_of_pass in passes)


def test_without_rows_nothing_changes_and_metrics_are_returned():
    model = build_model()
    updater = make_updater(ALGORITHMS["ppo"], model, minibatch_size=4)
    batch = make_response_batch(model)
    updater.update(batch, 1)
    weights, steps = flatten(model.parameters()), updater.steps
    metrics = updater.update(batch.select_rows(torch.arange(0)), 2)
    assert metrics == {"optimizer/lr": 1e-3}
    assert torch.equal(flatten(model.parameters()), weights) and updater.steps == steps == 2


class RecordedDescent(torch.optim.SGD):
    """Plain descent that records the learning rate of each step."""

    def step(self, closure=None):
        self.__dict__.setdefault("rates", []).append(self.param_groups[0]["lr"])
        return super().step(closure)


def test_the_learning_rate_goes_by_the_share_of_the_run():
    """The rates do not depend on how many rows earlier iterations had."""
    model = build_model()
    batch = make_response_batch(model)
    optimizer = RecordedDescent([{"params": model.policy_parameters(), "lr": 1.0, "base_lr": 1.0}])
    settings = replace(OPTIMIZER, lr_scheduler=LRScheduler.linear)
    updater = make_updater(ALGORITHMS["awr"], model, optimizer, settings, minibatch_size=4, iterations=5)
    # The run has 5 iterations of 8 / 4 = 2 steps: 10. Iteration 3 begins after 4 of them.
    repeated = batch.select_rows(torch.arange(12) % 8)
    for rows in (batch, repeated, batch.select_rows(torch.arange(1))):
        updater.update(rows, 3)
    # 2 steps: after 4 and 5 of 10. 3 steps: after 4, 4⅔ and 5⅓. 1 step: after 4.
    shares = [4, 5, 4, 4 + 2 / 3, 4 + 4 / 3, 4]
    assert optimizer.rates == pytest.approx([1 - share / 10 for share in shares], rel=1e-12)


# Microbatches


def make_ranks(size: int) -> list[World]:
    """Return the worlds of ranks that do not communicate."""
    return [World(rank, size, rank, None, 0.0) for rank in range(size)]


def add_related(batch: Batch) -> Batch:
    """Return the batch with the responses in reverse order of rows as related sequences."""
    other = batch.select_rows(torch.arange(len(batch)).flip(0))
    names = ("prompt_ids", "prompt_mask", "response_ids", "mask", "on_policy", "logprobs")
    return batch.replace(related={"other": Sequences(**{name: getattr(other, name) for name in names})})


@pytest.mark.parametrize("has_related", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_ranks_have_equally_many_microbatches_and_every_row_once(has_related, rows, ranks, size):
    batch = make_response_batch(build_model()).select_rows(torch.arange(rows))
    batch = add_related(batch) if has_related else batch
    parts = [split_into_microbatches(batch, size, world) for world in make_ranks(ranks)]
    # A rank has up to ⌈rows / ranks⌉ rows, and a microbatch ⌊size / sequences per row⌋ of them, but at least one.
    per_microbatch = max(1, size // 2 if has_related else size)
    assert {len(part) for part in parts} == {math.ceil(math.ceil(rows / ranks) / per_microbatch)}
    assert sorted(torch.cat([torch.cat(part) for part in parts]).tolist()) == list(range(rows))
    assert max(len(microbatch) for part in parts for microbatch in part) <= per_microbatch


def test_microbatches_go_by_the_length_of_all_sequences_of_a_row():
    # Prompt and response together: 5, 7, 5, 5, 5, 7, 5, 10. With the reverse order added: 15, 12, 12, 10, and back.
    batch = add_related(make_response_batch(build_model()))
    assert [rows.tolist() for rows in split_into_microbatches(batch, 4)] == [[3, 4], [1, 2], [5, 6], [0, 7]]


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("microbatch", [8, 1])
@pytest.mark.parametrize("name", ["apa", "ppo"])
def test_two_ranks_give_the_gradient_and_the_metrics_of_one(rows, microbatch, name, run_on_ranks):
    """With one row the second rank has none; the average of both ranks' gradients is that of one process."""
    batch = make_response_batch(build_model(), drift=0.3).select_rows(torch.tensor([1, 4, 7])[:rows])
    algorithm = ALGORITHMS[name]
    expected = compute_gradients(algorithm, batch)

    def accumulate(world: World) -> tuple[dict, dict]:
        model = build_model()
        updater = make_updater(algorithm, model, world=world, microbatch_size=microbatch)
        share = updater.accumulate_gradients(algorithm.prepare_minibatch(batch), is_first=True)
        metrics = updater.gather_steps([share])[0]
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return gradients, metrics.sums | metrics.maxima

    (first, metrics), (second, other_metrics) = run_on_ranks(2, accumulate)
    assert metrics == other_metrics and metrics["policy/ratio_max"] > NO_MAXIMUM
    assert first.keys() == second.keys()  # a rank without rows has gradients of zero
    assert_same(expected, ({name: (gradient + second[name]) / 2 for name, gradient in first.items()}, metrics))
    if rows == 1:
        assert not any(bool(gradient.any()) for gradient in second.values())


def test_a_microbatch_without_rows_adds_nothing():
    batch, model = add_related(make_response_batch(build_model(), drift=0.3)), build_model()
    updater = make_updater(ALGORITHMS["ppo"], model)
    counts = {name: int(mask.sum()) for name, mask in batch.masks.items()}
    objective = make_objective(updater, counts, gap_count=29)
    value = objective.compute(batch, torch.arange(0))
    value.backward()
    assert float(value.detach()) == 0 and not any(bool(p.grad.any()) for p in model.parameters())
    assert set(objective.share.sums.values()) == {0.0} and objective.share.sums.keys() >= {"loss/policy", "loss/value"}
    assert set(objective.share.maxima.values()) == {NO_MAXIMUM}


def test_needs_of_the_update_reach_the_forward_pass():
    outputs = []

    def record(batch: Batch, output: PolicyOutput) -> Loss:
        outputs.append(output)
        return Loss([LossTerm("policy", output.logprobs, "policy", 1.0)])

    for needs in (Needs(), Needs(entropy=True), Needs(mean_logprob=True)):
        model = build_model()
        make_updater(Probe(record, needs), model).update(make_response_batch(model), 1)
    has_both = [(output.entropy is not None, output.mean_logprob is not None) for output in outputs]
    assert has_both == [(False, False), (True, False), (False, True)]


def test_critics_are_computed_for_related_sequences_that_need_them():
    outputs = []

    def record(batch: Batch, output: PolicyOutput) -> Loss:
        outputs.append(output)
        return Loss([LossTerm("policy", output.logprobs, "policy", 1.0)])

    for passes in ({}, {"other": ("value",)}):
        model = build_model()
        updater = make_updater(Probe(record, Needs(passes=passes)), model, microbatch_size=16)
        updater.update(add_related(make_response_batch(model)), 1)
    assert [set(output.related["other"].values) for output in outputs] == [set(), {"value"}]
    # The related sequences are the rows' own in another order.
    own, related = outputs[1].values["value"], outputs[1].related["other"].values["value"]
    torch.testing.assert_close(related.sum(-1).sort().values, own.sum(-1).sort().values)


def test_half_a_minibatch_is_a_minibatch_more():
    # 12 / 8 = 1.5 → 2, 20 / 8 = 2.5 → 3 (not 2, the nearest even number), 19 / 8 = 2.375 → 2; 10 pairs: 20 responses.
    assert [count_steps(rows, 1, 8) for rows in (12, 20, 19, 0, 3)] == [2, 3, 2, 0, 1]
    assert count_steps(10, 2, 8) == 3 and count_steps(2, 2, 1) == 2
