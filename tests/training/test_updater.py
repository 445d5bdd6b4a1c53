"""The update: gradients that do not depend on microbatches or padding, and the weights that each step changes."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from apa_cli.algorithms.apa import Normalizer
from apa_cli.algorithms.base import Whitening
from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel, compute_response_logprobs
from apa_cli.settings import LRScheduler, RunSettings, UpdateOrder
from apa_cli.training.minibatches import split_into_microbatches, split_into_minibatches
from apa_cli.training.objective import StepMetrics, average_over_steps, reduce_over_ranks
from apa_cli.training.updater import build_optimizer, compute_lr_factor
from apa_cli.types import Batch, Loss, LossTerm, Metric, PolicyOutput
from tests.builders import build_tiny_policy
from tests.training.builders import (
    ALGORITHMS,
    OPTIMIZER,
    RUN,
    Probe,
    assert_same,
    build_model,
    compute_gradients,
    flatten,
    make_response_batch,
    make_updater,
    plain_descent,
    set_logprobs,
)

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


# Invariances


@algorithms
@pytest.mark.parametrize("microbatch", [1, 2, 3, 4])
def test_gradients_and_metrics_do_not_depend_on_the_microbatch(algorithm, microbatch):
    batch = make_response_batch(build_model(), drift=0.3)
    whole = compute_gradients(algorithm, batch)
    assert float(flatten(whole[0].values()).norm()) > 0.1
    assert_same(whole, compute_gradients(algorithm, batch, microbatch))


@algorithms
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (4, 5)])
@pytest.mark.parametrize("microbatch", [8, 2])
def test_gradients_and_metrics_do_not_depend_on_padding(algorithm, left, right, microbatch):
    plain = compute_gradients(algorithm, make_response_batch(build_model(), drift=0.3))
    padded = make_response_batch(build_model(), left, right, junk=6, drift=0.3)
    assert_same(plain, compute_gradients(algorithm, padded, microbatch))


@algorithms
def test_tokens_and_numbers_outside_the_mask_change_nothing(algorithm):
    batch = make_response_batch(build_model(), drift=0.3)

    def set_nan(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(~batch.mask, math.nan)

    dirty = batch.replace(
        prompt_ids=batch.prompt_ids.masked_fill(~batch.prompt_mask, 9),
        response_ids=batch.response_ids.masked_fill(~batch.mask, 10),
        logprobs={name: set_nan(tensor) for name, tensor in batch.logprobs.items()},
        advantages=set_nan(batch.advantages),
        returns={"value": set_nan(batch.returns["value"])},
        values={"value": set_nan(batch.values["value"])},
    )
    assert_same(compute_gradients(algorithm, batch), compute_gradients(algorithm, dirty))


@algorithms
def test_whole_updates_do_not_depend_on_the_microbatch(algorithm):
    results = []
    for microbatch in (4, 1):
        model = build_model()
        batch = make_response_batch(model, drift=0.3)
        # Plain descent: Adam would turn the rounding of a zero gradient into a whole step.
        descent = plain_descent(model, rate=0.1)
        updater = make_updater(algorithm, model, descent, microbatch_size=microbatch, minibatch_size=4, update_epochs=2)
        metrics = updater.update(batch, 1)
        results.append((metrics, flatten(model.parameters())))
    (metrics, weights), (other_metrics, other_weights) = results
    assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-6)
    assert float((weights - flatten(build_model().parameters())).abs().max()) > 0.01
    torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-6)


# Loss terms, masks and weights


def make_two_terms(batch: Batch, output: PolicyOutput) -> Loss:
    """Return two weighted terms, each with a mask of its own, and a metric of each reduction."""
    return Loss(
        [
            LossTerm("first", output.logprobs, mask="first", weight=2.0),
            LossTerm("others", output.logprobs, mask="others", weight=-3.0),
        ],
        {
            "probe/mean": Metric(batch.advantages, "others"),
            "probe/max": Metric(batch.advantages, "first", reduction="max"),
        },
    )


TWO_TERMS = Probe(make_two_terms)


@pytest.mark.parametrize("microbatch", [8, 3, 1])
def test_each_term_is_divided_by_the_count_of_its_mask_and_multiplied_by_its_weight(microbatch):
    model = build_model()
    batch = make_response_batch(model)
    first = torch.zeros_like(batch.mask)
    first[:, 0] = True
    others = batch.mask & ~first
    batch = batch.replace(masks={"first": first, "others": others})
    # 8 first tokens and 29 − 8 others
    assert (int(first.sum()), int(others.sum())) == (8, 21)
    logprobs = compute_response_logprobs(model.policy, batch, 1.0)
    objective = 2 * logprobs[first].sum() / 8 - 3 * logprobs[others].sum() / 21
    expected = torch.autograd.grad(objective, list(model.policy.parameters()))
    gradients, metrics = compute_gradients(TWO_TERMS, batch, microbatch)
    for parameter, gradient in zip(model.policy.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[f"policy.{parameter[0]}"], gradient, rtol=1e-4, atol=1e-6)
    assert metrics["loss/first"] == pytest.approx(float(logprobs[first].detach().mean()), rel=1e-5)
    assert metrics["loss/others"] == pytest.approx(float(logprobs[others].detach().mean()), rel=1e-5)
    assert metrics["probe/mean"] == pytest.approx(float(batch.advantages[others].mean()), rel=1e-5)
    assert metrics["probe/max"] == pytest.approx(float(batch.advantages[first].max()), rel=1e-6)


def test_an_empty_mask_adds_nothing():
    batch = make_response_batch(build_model())
    none = torch.zeros_like(batch.mask)
    masked = batch.replace(masks={"first": none, "others": batch.mask})
    gradients, _ = compute_gradients(TWO_TERMS, masked)
    metrics = make_updater(TWO_TERMS, build_model()).update(masked, 1)
    assert "loss/first" not in metrics and "probe/max" not in metrics
    expected = compute_response_logprobs(build_model().policy, batch, 1.0).detach().sum() / 29
    assert metrics["loss/others"] == pytest.approx(float(expected), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_value_coef_scales_the_critics_gradient_and_not_its_metric():
    batch = make_response_batch(build_model(), drift=0.3)
    plain, doubled = (replace(ALGORITHMS["awr"], value_coef=coefficient) for coefficient in (1.0, 2.0))
    (one, one_metrics), (two, two_metrics) = compute_gradients(plain, batch), compute_gradients(doubled, batch)
    for name, gradient in one.items():
        factor = 2 if name.startswith("critics.") else 1
        torch.testing.assert_close(two[name], factor * gradient, rtol=1e-5, atol=1e-7)
    assert two_metrics == pytest.approx(one_metrics, rel=1e-6)


def test_microbatches_take_the_rows_by_length_shortest_first():
    # prompt and response together: 5, 7, 5, 5, 5, 7, 5, 10
    rows = [rows.tolist() for rows in split_into_microbatches(make_response_batch(build_model()), 3)]
    assert rows == [[0, 2, 3], [4, 6, 1], [5, 7]]


# Diagnostics


def test_sampler_gap_is_rounding_if_the_sampler_is_the_policy():
    metrics = compute_gradients(ALGORITHMS["apa"], set_logprobs(make_response_batch(build_model()), old=None))[1]
    assert metrics["policy/sampler_gap"] < 1e-6
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("microbatch", [8, 1])
def test_sampler_gap_is_the_mean_difference_and_ratio_max_the_largest_ratio(microbatch):
    batch = set_logprobs(make_response_batch(build_model()), old=None)
    # 29 tokens in the mask: log π_θ − log π_sampler is 0.5 on one of them, −0.25 on another
    sampler = batch.logprobs["sampler"].clone()
    sampler[1, 2] -= 0.5
    sampler[7, 5] += 0.25
    metrics = compute_gradients(ALGORITHMS["apa"], set_logprobs(batch, sampler=sampler), microbatch)[1]
    assert metrics["policy/sampler_gap"] == pytest.approx(0.75 / 29, rel=1e-4)
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(0.5), rel=1e-5)


def test_sampler_gap_is_measured_only_before_the_first_step():
    model = build_model()
    updater = make_updater(
        ALGORITHMS["apa"], model, settings=replace(OPTIMIZER, lr=0.1), minibatch_size=4, update_epochs=2
    )
    metrics = updater.update(set_logprobs(make_response_batch(model), old=None), 1)
    assert metrics["policy/sampler_gap"] < 1e-6
    assert metrics["policy/ratio_max"] > 1.1


@pytest.mark.parametrize("microbatch", [8, 1])
def test_ratio_max_ignores_padding_and_uses_the_old_logprobs_of_the_loss(microbatch):
    batch = make_response_batch(build_model())
    # Every ratio is e^−0.7, below the 1 that padding would give; the sampler's log-probs are not used.
    batch = set_logprobs(batch, old=batch.logprobs["old"] + 0.7, sampler=batch.logprobs["sampler"] - 3)
    metrics = compute_gradients(ALGORITHMS["ppo"], batch, microbatch)[1]
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(-0.7), rel=1e-5)
    assert "policy/sampler_gap" not in metrics  # the trainer computes it from the whole rollout


@pytest.mark.parametrize("algorithm", ["apa", "ppo"])
@pytest.mark.parametrize("microbatch", [8, 1])
def test_ratio_max_is_signed(algorithm, microbatch):
    batch = make_response_batch(build_model())
    old = batch.logprobs["old"].clone()
    # Ratios e^0.3 and e^−0.9: the second log-difference is larger in size, and its ratio smaller.
    old[1, 2] -= 0.3
    old[7, 5] += 0.9
    changed = {"ppo": {"old": old}, "apa": {"old": None, "sampler": old}}[algorithm]
    metrics = compute_gradients(ALGORITHMS[algorithm], set_logprobs(batch, **changed), microbatch)[1]
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(0.3), rel=1e-5)


def test_clip_fraction_counts_all_tokens_of_the_mask():
    batch = make_response_batch(build_model())
    old = batch.logprobs["old"].clone()
    # ratio e^0.5 with Â > 0 on three tokens of 29
    for row, token in ((0, 0), (1, 4), (7, 2)):
        old[row, token] -= 0.5
    batch = set_logprobs(batch, old=old).replace(advantages=batch.mask.float())
    algorithm = replace(ALGORITHMS["ppo"], whitening=Whitening.none)
    for microbatch in (8, 3):
        metrics = compute_gradients(algorithm, batch, microbatch)[1]
        assert metrics["policy/clip_fraction"] == pytest.approx(3 / 29, rel=1e-6)


# The order of updates


def make_run_settings(**changes) -> RunSettings:
    return replace(RUN, **{"rollout_batch_size": 12, "minibatch_size": 4, "update_epochs": 2, **changes})


def test_epochs_are_shuffled_passes_over_the_rollout_batch():
    rows = [part.tolist() for part in split_into_minibatches(make_run_settings(update_epochs=3), 1, rows=12)]
    assert [len(part) for part in rows] == [4] * 9
    passes = [list(itertools.chain(*rows[i : i + 3])) for i in (0, 3, 6)]
    for order in passes:
        assert sorted(order) == list(range(12))
    assert len({tuple(order) for order in passes}) == 3


def test_consecutive_updates_repeat_each_minibatch_of_one_pass():
    epochs = [part.tolist() for part in split_into_minibatches(make_run_settings(), 1, rows=12)]
    consecutive = [
        part.tolist()
        for part in split_into_minibatches(make_run_settings(update_order=UpdateOrder.consecutive), 1, rows=12)
    ]
    a, b, c = epochs[:3]
    assert consecutive == [a, a, b, b, c, c]


def test_minibatch_order_is_keyed_by_seed_and_iteration():
    def order(seed: int, iteration: int) -> list[int]:
        return torch.cat(split_into_minibatches(make_run_settings(seed=seed), iteration, rows=12)).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*key)) for key in ((0, 1), (0, 2), (1, 1))}) == 3


def test_an_iteration_has_epochs_times_minibatches_steps():
    model = build_model()
    updater = make_updater(ALGORITHMS["awr"], model, minibatch_size=4, microbatch_size=2, update_epochs=3)
    assert updater.steps_per_iteration == 6
    updater.update(make_response_batch(model), 1)
    assert {int(state["step"]) for state in updater.optimizer.state.values()} == {6}


# Learning rates


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # 2 steps of warm-up, then 4 with progress 0, ¼, ½, ¾, and beyond the end 1 and 1.25
        (LRScheduler.constant, [0.5, 1, 1, 1, 1, 1, 1, 1]),
        (LRScheduler.linear, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (
            LRScheduler.cosine,
            [0.5, 1, 1, 0.5 + 0.5**0.5 / 2, 0.5, 0.5 - 0.5**0.5 / 2, 0, 0],
        ),
    ],
)
def test_lr_factor_by_hand(schedule, factors):
    settings = replace(OPTIMIZER, lr_scheduler=schedule, warmup_ratio=2 / 6)
    actual = [compute_lr_factor(settings, step, total=6) for step in range(8)]
    assert actual == pytest.approx(factors, rel=1e-12, abs=1e-12)


def test_a_step_within_the_last_of_the_warmup_has_no_more_than_the_full_rate():
    """An iteration with more steps than planned has steps between those of the schedule: 1.5 of 2 would be 2.5 / 2."""
    settings = replace(OPTIMIZER, lr_scheduler=LRScheduler.linear, warmup_ratio=2 / 6)
    assert [compute_lr_factor(settings, step, total=6) for step in (0.5, 1, 1.5)] == [0.75, 1, 1]


def test_without_warmup_the_first_step_has_the_full_rate():
    assert compute_lr_factor(replace(OPTIMIZER, lr_scheduler=LRScheduler.linear), 0, total=10) == 1


def test_a_run_that_is_all_warmup_does_not_divide_by_zero():
    settings = replace(OPTIMIZER, lr_scheduler=LRScheduler.linear, warmup_ratio=1.0)
    assert compute_lr_factor(settings, 3, total=4) == 1
    assert compute_lr_factor(settings, 4, total=4) == 1
    assert compute_lr_factor(settings, 5, total=4) == 0  # a step beyond the end: progress 1


def test_the_schedule_spans_all_iterations_and_scales_both_rates():
    model = build_model()
    settings = replace(OPTIMIZER, lr_scheduler=LRScheduler.linear)
    updater = make_updater(ALGORITHMS["awr"], model, settings=settings, minibatch_size=4, iterations=5)
    metrics = updater.update(make_response_batch(model), 3)
    # 2 steps an iteration, 10 in all; the last of iteration 3 is number 5 from 0: 1 − 5/10
    assert metrics["optimizer/lr"] == pytest.approx(0.5 * 1e-3, rel=1e-12)
    assert [group["lr"] for group in updater.optimizer.param_groups] == pytest.approx([0.5e-3, 1e-3], rel=1e-12)


def test_the_optimizer_has_a_group_for_the_policy_and_one_for_the_critics():
    model = build_model()
    optimizer = build_optimizer(model, OPTIMIZER)
    assert type(optimizer) is torch.optim.AdamW
    policy, critic = optimizer.param_groups
    assert policy["params"] == model.policy_parameters()
    assert critic["params"] == model.critic_parameters()
    assert (policy["lr"], critic["lr"]) == (1e-3, 2e-3)
    for group in (policy, critic):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 1e-6)
    without = build_optimizer(TrainingModel(build_tiny_policy(seed=0), {}, 1.0), OPTIMIZER)
    assert len(without.param_groups) == 1


# Which weights move


@pytest.mark.parametrize("on_trunk", [False, True])
def test_critic_warmup_leaves_the_policy_bit_identical_while_the_critic_moves(on_trunk):
    model = build_model(on_trunk)
    settings = replace(OPTIMIZER, critic_warmup_iterations=2, weight_decay=0.1)
    updater = make_updater(ALGORITHMS["ppo"], model, settings=settings, minibatch_size=4)
    batch = make_response_batch(model)
    policy, critic = flatten(model.policy.parameters()), flatten(model.critics.parameters())
    for iteration in (1, 2):
        updater.update(batch, iteration)
        assert torch.equal(flatten(model.policy.parameters()), policy)
        moved = flatten(model.critics.parameters())
        assert not torch.equal(moved, critic)
        critic = moved
    updater.update(batch, 3)
    assert not torch.equal(flatten(model.policy.parameters()), policy)
    assert not torch.equal(flatten(model.critics.parameters()), critic)


def measure_step(max_grad_norm: float, **changes) -> tuple[float, float, dict[str, float]]:
    """Return how far policy and critic move in a step at rate 1, and the metrics."""
    model = build_model()
    settings = replace(OPTIMIZER, max_grad_norm=max_grad_norm, **changes)
    updater = make_updater(ALGORITHMS["awr"], model, plain_descent(model), settings)
    batch = make_response_batch(model, drift=0.3)
    start = [flatten(part.parameters()) for part in (model.policy, model.critics)]
    metrics = updater.update(batch, 1)
    end = [flatten(part.parameters()) for part in (model.policy, model.critics)]
    policy, critic = (float((new - old).norm()) for new, old in zip(end, start, strict=True))
    return policy, critic, metrics


def test_policy_and_critic_are_clipped_separately():
    free_policy, free_critic, metrics = measure_step(1e9)
    # 1e-4: the norms are of differences between nearly equal weights.
    assert metrics["optimizer/grad_norm"] == pytest.approx(free_policy, rel=1e-4)
    assert metrics["optimizer/critic_grad_norm"] == pytest.approx(free_critic, rel=1e-4)
    both = sorted([free_policy, free_critic])
    between = (both[0] + both[1]) / 2
    policy, critic, metrics = measure_step(between)
    assert both[1] > 1.2 * both[0]
    assert sorted([policy, critic]) == pytest.approx([both[0], between], rel=1e-4)
    assert metrics["optimizer/grad_norm"] == pytest.approx(free_policy, rel=1e-4)  # the norm before clipping
    assert metrics["optimizer/critic_grad_norm"] == pytest.approx(free_critic, rel=1e-4)


def test_joint_clipping_scales_policy_and_critic_by_one_factor():
    free_policy, free_critic, free_metrics = measure_step(1e9, joint_clip=True)
    joint = math.hypot(free_policy, free_critic)
    # Above both norms and below the joint one: clipped separately, neither would change.
    limit = (max(free_policy, free_critic) + joint) / 2
    assert limit > 1.001 * max(free_policy, free_critic)
    policy, critic, metrics = measure_step(limit, joint_clip=True)
    expected = [free_policy * limit / joint, free_critic * limit / joint]
    assert [policy, critic] == pytest.approx(expected, rel=1e-4)  # of differences between nearly equal weights
    assert metrics == pytest.approx(free_metrics, rel=1e-6)  # the norms before clipping


def test_the_joint_norm_is_that_of_3_and_4():
    """Gradients (3, 0) and (0, 4) have the joint norm 5; at most 2.5 halves both. In the warm-up only 4 is clipped."""

    def clip(iteration: int) -> tuple[list[float], dict[str, float]]:
        parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
        parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
        optimizer = torch.optim.AdamW([{"params": [parameter]} for parameter in parameters])
        settings = replace(OPTIMIZER, max_grad_norm=2.5, joint_clip=True, critic_warmup_iterations=1)
        norms = make_updater(ALGORITHMS["awr"], build_model(), optimizer, settings).clip_gradients(iteration)
        return [g for p in parameters if p.grad is not None for g in p.grad.tolist()], norms

    gradients, norms = clip(iteration=2)
    assert gradients == pytest.approx([1.5, 0, 0, 2], rel=1e-6)
    assert norms == {"optimizer/grad_norm": 3.0, "optimizer/critic_grad_norm": 4.0}
    # In the warm-up the policy's gradient is not used, so it does not shrink the critic's.
    assert clip(iteration=1)[0] == pytest.approx([2.5, 0, 0, 2.5], rel=1e-6)


def test_a_step_clears_the_gradients():
    model = build_model()
    make_updater(ALGORITHMS["awr"], model).update(make_response_batch(model), 1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_nonfinite_gradient_raises_before_any_weight_changes():
    model = build_model()
    batch = make_response_batch(model)
    advantages = batch.advantages.clone()
    advantages[2, 0] = math.inf
    before = flatten(model.parameters())
    algorithm = replace(ALGORITHMS["apa"], whitening=Whitening.none, normalizer=Normalizer.none)
    with pytest.raises(UserError, match="iteration 4, update 1: loss/policy is inf, optimizer/grad_norm is nan"):
        make_updater(algorithm, model).update(batch.replace(advantages=advantages), 4)
    assert torch.equal(flatten(model.parameters()), before)


def test_metrics_of_an_iteration_are_means_and_maxima_over_its_steps():
    steps = [StepMetrics({"mean": mean}, {"max": largest}) for mean, largest in ((1.0, 5.0), (2.0, 7.0), (6.0, -1.0))]
    steps[0].add("once", 4.0)
    assert average_over_steps(steps) == {"mean": 3.0, "once": 4.0, "max": 7.0}


def test_shares_of_the_ranks_are_summed_and_maxima_compared():
    ranks = [StepMetrics({"loss": 0.5}, {"max": -1.0}), StepMetrics({"loss": 0.25}, {"max": -3.0})]
    assert reduce_over_ranks(ranks) == StepMetrics({"loss": 0.75}, {"max": -1.0})


def test_a_rank_may_lack_a_metric():
    ranks = [StepMetrics({"loss": 0.5}), StepMetrics({"other": 0.25}, {"max": -3.0})]
    assert reduce_over_ranks(ranks) == StepMetrics({"loss": 0.5, "other": 0.25}, {"max": -3.0})


def test_microbatches_add_to_sums_and_raise_maxima():
    metrics = StepMetrics()
    for value in (0.5, 0.25):
        metrics.add("loss", value)
    for value in (-3.0, -1.0, -2.0):
        metrics.raise_maximum("max", value)
    assert (metrics.sums, metrics.maxima) == ({"loss": 0.75}, {"max": -1.0})


def test_metrics_of_minibatches_are_averaged():
    model = build_model()
    algorithm, batch = ALGORITHMS["apa"], make_response_batch(model, drift=0.3)
    updater = make_updater(algorithm, model, minibatch_size=4)
    values = [
        algorithm.prepare_minibatch(batch.select_rows(rows)).metrics["apa/log_z"]
        for rows in split_into_minibatches(updater.run, 1, rows=8)
    ]
    assert updater.update(batch, 1)["apa/log_z"] == pytest.approx(sum(values) / 2, rel=1e-6)
    assert values[0] != pytest.approx(values[1], rel=1e-3)
