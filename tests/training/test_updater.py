"""The update: the same gradients however a minibatch is split or padded, and who moves when."""

import itertools
import math
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from apa_cli.algorithms.apa import APA, Normalizer
from apa_cli.algorithms.awr import AWR
from apa_cli.algorithms.base import Algorithm, Estimator, ScoreScaling, Whitening
from apa_cli.algorithms.ppo import PPO, Controller
from apa_cli.errors import UserError
from apa_cli.hardware.oom import Halving
from apa_cli.models.critic import Critic, value_head
from apa_cli.models.forward import TrainingModel, response_logprobs
from apa_cli.settings import DType, HeadKind, OptimizerSettings, RunSettings, Schedule, UpdateOrder
from apa_cli.training.updater import (
    StepMetrics,
    Updater,
    build_optimizer,
    microbatch_rows,
    minibatch_rows,
    schedule_factor,
)
from apa_cli.types import Batch, Loss, LossTerm, Metric

CPU = torch.device("cpu")

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3], [5, 8, 9], [7, 9], [3], [2, 3, 8, 4]]
RESPONSES = [
    [2, 7],
    [8, 2, 8, 1, 8, 2],
    [8],
    [4, 5, 9],
    [0, 4],
    [5, 2, 3, 5, 3],
    [6, 0, 2, 8],
    [7, 4, 7, 1, 3, 5],
]

COMMON = {
    "gamma": 1.0,
    "gae_lambda": 0.95,
    "score_scaling": ScoreScaling.none,
    "score_clip": None,
    "whitening": Whitening.minibatch,
    "advantage_estimator": Estimator.gae,
    "value_coef": 0.7,
    "value_clip_range": 0.2,
}
ALGORITHMS = {
    "apa": APA(**COMMON, lambda_=0.5, normalizer=Normalizer.batch),
    "awr": AWR(**COMMON, lambda_=0.5, weight_clip=20.0),
    "ppo": PPO(**COMMON, kl_coef=0.1, clip_range=0.2, kl_controller=Controller.fixed, kl_target=6.0, kl_horizon=10_000),
}

RUN = RunSettings(
    name="test",
    seed=0,
    iterations=10,
    rollout_batch_size=8,
    minibatch_size=8,
    microbatch_size=8,
    samples_per_prompt=1,
    update_epochs=1,
    update_order=UpdateOrder.epochs,
    stop_at_kl=None,
    resume=None,
    resume_changed=[],
    fork=None,
    stop_after=None,
    dry_run=False,
    run=None,
)
OPTIMIZER = OptimizerSettings(
    lr=1e-3,
    critic_lr=2e-3,
    betas=[0.9, 0.95],
    eps=1e-8,
    weight_decay=1e-6,
    max_grad_norm=1.0,
    lr_scheduler=Schedule.constant,
    warmup_ratio=0.0,
    critic_warmup_iterations=0,
)


def tiny_policy(seed: int) -> GPTNeoXForCausalLM:
    torch.manual_seed(seed)
    config = GPTNeoXConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    return GPTNeoXForCausalLM(config).eval()


def tiny_model(on_trunk: bool = False) -> TrainingModel:
    """A policy and a critic that does not say 0."""
    head = value_head(HeadKind.linear, 16)
    torch.manual_seed(5)
    torch.nn.init.normal_(head.weight, std=0.3)
    critic = Critic(None if on_trunk else tiny_policy(1).base_model, head)
    return TrainingModel(tiny_policy(0), {"value": critic}, temperature=1.0)


@torch.no_grad()
def make_batch(model: TrainingModel, left: int = 0, right: int = 0, junk: int = 0, drift: float = 0.0) -> Batch:
    """The eight responses, with `left` and `right` further columns of padding, which holds the token `junk`.

    `drift` is the deviation by which the sampler's, the reference's and the old log-probs and values are off.
    """
    before, after = max(map(len, PROMPTS)) + left, max(map(len, RESPONSES)) + right
    mask = torch.tensor([[True] * len(r) + [False] * (after - len(r)) for r in RESPONSES])
    torch.manual_seed(7)
    noise = {
        name: torch.nn.functional.pad(torch.randn(8, 6), (0, right)) * mask
        for name in ("sampler", "reference", "old", "values", "advantages", "returns")
    }
    zeros = torch.zeros(mask.shape)
    batch = Batch(
        prompt_ids=torch.tensor([[junk] * (before - len(p)) + p for p in PROMPTS]),
        prompt_mask=torch.tensor([[False] * (before - len(p)) + [True] * len(p) for p in PROMPTS]),
        response_ids=torch.tensor([r + [junk] * (after - len(r)) for r in RESPONSES]),
        mask=mask,
        masks={"tokens": mask},
        sampler_logprobs=zeros,
        advantages=noise["advantages"],
        returns={"value": noise["returns"]},
        values={"value": zeros},
    )
    own = response_logprobs(model.policy, batch, 1.0)
    return batch.with_(
        sampler_logprobs=own + drift * noise["sampler"],
        ref_logprobs=own + drift * noise["reference"],
        old_logprobs=own + drift * noise["old"],
        values={"value": model(batch, with_policy=False).values["value"] + drift * noise["values"]},
    )


def updater(algorithm: Algorithm, model: TrainingModel, optimizer=None, settings=OPTIMIZER, **run) -> Updater:
    optimizer, run = optimizer or build_optimizer(model, settings), replace(RUN, **run)
    microbatch = Halving("microbatch_size", run.microbatch_size, 1, print)
    return Updater(algorithm, model, optimizer, run, settings, DType.float32, CPU, microbatch)


def gradients(algorithm: Algorithm, batch: Batch, microbatch: int = 8) -> tuple[dict, dict[str, float]]:
    """The gradient of the whole batch as one minibatch, by parameter, and the metrics."""
    model = tiny_model()
    minibatch = algorithm.prepare_minibatch(batch)
    part = updater(algorithm, model, microbatch_size=microbatch).accumulate(minibatch, first=True)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, part.sums | part.maxima


def assert_same(one: tuple[dict, dict], other: tuple[dict, dict]) -> None:
    """Equal gradients and metrics: sums of float32 in another order, 1e-4 relative or 1e-6 absolute."""
    assert one[0].keys() == other[0].keys()
    for name, gradient in one[0].items():
        torch.testing.assert_close(other[0][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert one[1] == pytest.approx(other[1], rel=1e-4, abs=1e-6)


def flat(parameters) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in parameters]).clone()


def plain_descent(model: TrainingModel, rate: float = 1.0) -> torch.optim.SGD:
    """Steps that are the clipped gradients, times `rate`."""
    groups = [model.policy_parameters(), model.critic_parameters()]
    return torch.optim.SGD([{"params": group, "lr": rate, "base_lr": rate} for group in groups])


algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)


# What the result must not depend on


@algorithms
@pytest.mark.parametrize("microbatch", [1, 2, 3, 4])
def test_gradients_and_metrics_do_not_depend_on_the_microbatch(algorithm, microbatch):
    batch = make_batch(tiny_model(), drift=0.3)
    whole = gradients(algorithm, batch)
    assert float(flat(whole[0].values()).norm()) > 0.1
    assert_same(whole, gradients(algorithm, batch, microbatch))


@algorithms
@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (4, 5)])
@pytest.mark.parametrize("microbatch", [8, 2])
def test_gradients_and_metrics_do_not_depend_on_padding(algorithm, left, right, microbatch):
    plain = gradients(algorithm, make_batch(tiny_model(), drift=0.3))
    padded = make_batch(tiny_model(), left, right, junk=6, drift=0.3)
    assert_same(plain, gradients(algorithm, padded, microbatch))


@algorithms
def test_tokens_and_numbers_outside_the_mask_change_nothing(algorithm):
    batch = make_batch(tiny_model(), drift=0.3)

    def spoilt(x: torch.Tensor) -> torch.Tensor:
        return x.masked_fill(~batch.mask, math.nan)

    dirty = batch.with_(
        prompt_ids=batch.prompt_ids.masked_fill(~batch.prompt_mask, 9),
        response_ids=batch.response_ids.masked_fill(~batch.mask, 10),
        sampler_logprobs=spoilt(batch.sampler_logprobs),
        ref_logprobs=spoilt(batch.ref_logprobs),
        old_logprobs=spoilt(batch.old_logprobs),
        advantages=spoilt(batch.advantages),
        returns={"value": spoilt(batch.returns["value"])},
        values={"value": spoilt(batch.values["value"])},
    )
    assert_same(gradients(algorithm, batch), gradients(algorithm, dirty))


@algorithms
def test_whole_updates_do_not_depend_on_the_microbatch(algorithm):
    results = []
    for microbatch in (4, 1):
        model = tiny_model()
        batch = make_batch(model, drift=0.3)
        # plain descent: Adam makes a step of any gradient, the rounding of one that is 0 too
        descent = plain_descent(model, rate=0.1)
        run = updater(algorithm, model, descent, microbatch_size=microbatch, minibatch_size=4, update_epochs=2)
        metrics = run.update(batch, 1)
        results.append((metrics, flat(model.parameters())))
    (metrics, weights), (other_metrics, other_weights) = results
    assert metrics == pytest.approx(other_metrics, rel=1e-4, abs=1e-6)
    assert float((weights - flat(tiny_model().parameters())).abs().max()) > 0.01
    torch.testing.assert_close(other_weights, weights, rtol=1e-4, atol=1e-6)


# What is in it


@dataclass(frozen=True)
class Probe(Algorithm):
    """Two terms under masks of their own with weights, and one metric of each kind."""

    def prepare(self, rollout, state):
        raise NotImplementedError

    def loss(self, batch, output):
        return Loss(
            [
                LossTerm("first", output.logprobs, mask="first", weight=2.0),
                LossTerm("others", output.logprobs, mask="others", weight=-3.0),
            ],
            {
                "probe/mean": Metric(batch.advantages, "others"),
                "probe/max": Metric(batch.advantages, "first", reduce="max"),
            },
        )


@pytest.mark.parametrize("microbatch", [8, 3, 1])
def test_each_term_is_divided_by_its_own_masks_count_and_multiplied_by_its_weight(microbatch):
    model = tiny_model()
    batch = make_batch(model)
    first = torch.zeros_like(batch.mask)
    first[:, 0] = True
    others = batch.mask & ~first
    batch = batch.with_(masks={"first": first, "others": others})
    # 8 first tokens and 29 − 8 others
    assert (int(first.sum()), int(others.sum())) == (8, 21)
    logprobs = response_logprobs(model.policy, batch, 1.0)
    objective = 2 * logprobs[first].sum() / 8 - 3 * logprobs[others].sum() / 21
    expected = torch.autograd.grad(objective, list(model.policy.parameters()))
    found, metrics = gradients(Probe(), batch, microbatch)
    for parameter, gradient in zip(model.policy.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[f"policy.{parameter[0]}"], gradient, rtol=1e-4, atol=1e-6)
    assert metrics["loss/first"] == pytest.approx(float(logprobs[first].detach().mean()), rel=1e-5)
    assert metrics["loss/others"] == pytest.approx(float(logprobs[others].detach().mean()), rel=1e-5)
    assert metrics["probe/mean"] == pytest.approx(float(batch.advantages[others].mean()), rel=1e-5)
    assert metrics["probe/max"] == pytest.approx(float(batch.advantages[first].max()), rel=1e-6)


def test_an_empty_mask_adds_nothing():
    batch = make_batch(tiny_model())
    none = torch.zeros_like(batch.mask)
    found, metrics = gradients(Probe(), batch.with_(masks={"first": none, "others": batch.mask}))
    assert metrics["loss/first"] == 0
    assert metrics["probe/max"] == -math.inf
    expected = response_logprobs(tiny_model().policy, batch, 1.0).detach().sum() / 29
    assert metrics["loss/others"] == pytest.approx(float(expected), rel=1e-5)
    assert all(gradient.isfinite().all() for gradient in found.values())


def test_the_weight_of_the_critics_loss_is_in_its_gradient_and_not_in_its_metric():
    batch = make_batch(tiny_model(), drift=0.3)
    plain, doubled = (replace(ALGORITHMS["awr"], value_coef=coefficient) for coefficient in (1.0, 2.0))
    (one, one_metrics), (two, two_metrics) = gradients(plain, batch), gradients(doubled, batch)
    for name, gradient in one.items():
        factor = 2 if name.startswith("critics.") else 1
        torch.testing.assert_close(two[name], factor * gradient, rtol=1e-5, atol=1e-7)
    assert two_metrics == pytest.approx(one_metrics, rel=1e-6)


def test_microbatches_are_the_rows_by_length_shortest_first():
    # prompt and response together: 5, 7, 5, 5, 5, 7, 5, 10
    rows = [rows.tolist() for rows in microbatch_rows(make_batch(tiny_model()), 3)]
    assert rows == [[0, 2, 3], [4, 6, 1], [5, 7]]


# Diagnostics


def test_sampler_gap_is_rounding_when_the_sampler_is_the_policy():
    metrics = gradients(ALGORITHMS["apa"], make_batch(tiny_model()).with_(old_logprobs=None))[1]
    assert metrics["policy/sampler_gap"] < 1e-6
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("microbatch", [8, 1])
def test_sampler_gap_is_the_mean_difference_and_ratio_max_the_largest_ratio_of_all_tokens(microbatch):
    batch = make_batch(tiny_model()).with_(old_logprobs=None)
    # 29 true tokens: log π_θ − log π_sampler is 0.5 on one of them, −0.25 on another
    sampler = batch.sampler_logprobs.clone()
    sampler[1, 2] -= 0.5
    sampler[7, 5] += 0.25
    metrics = gradients(ALGORITHMS["apa"], batch.with_(sampler_logprobs=sampler), microbatch)[1]
    assert metrics["policy/sampler_gap"] == pytest.approx(0.75 / 29, rel=1e-4)
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(0.5), rel=1e-5)


def test_sampler_gap_is_measured_before_the_first_step_only():
    model = tiny_model()
    run = updater(ALGORITHMS["apa"], model, settings=replace(OPTIMIZER, lr=0.1), minibatch_size=4, update_epochs=2)
    metrics = run.update(make_batch(model).with_(old_logprobs=None), 1)
    assert metrics["policy/sampler_gap"] < 1e-6
    assert metrics["policy/ratio_max"] > 1.1


@pytest.mark.parametrize("microbatch", [8, 1])
def test_ratio_max_is_of_true_tokens_and_against_the_log_probs_that_the_loss_divides_by(microbatch):
    batch = make_batch(tiny_model())
    # every ratio is e^−0.7, below the 1 that padding would give; the sampler's own log-probs are not looked at
    batch = batch.with_(old_logprobs=batch.old_logprobs + 0.7, sampler_logprobs=batch.sampler_logprobs - 3)
    metrics = gradients(ALGORITHMS["ppo"], batch, microbatch)[1]
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(-0.7), rel=1e-5)
    assert "policy/sampler_gap" not in metrics  # the trainer has it of the whole rollout


@pytest.mark.parametrize("algorithm", ["apa", "ppo"])
@pytest.mark.parametrize("microbatch", [8, 1])
def test_ratio_max_is_the_largest_ratio_and_not_the_largest_difference(algorithm, microbatch):
    batch = make_batch(tiny_model())
    old = batch.old_logprobs.clone()
    # ratios e^0.3 and e^−0.9: in size the second difference is the larger
    old[1, 2] -= 0.3
    old[7, 5] += 0.9
    changed = {"ppo": {"old_logprobs": old}, "apa": {"old_logprobs": None, "sampler_logprobs": old}}[algorithm]
    metrics = gradients(ALGORITHMS[algorithm], batch.with_(**changed), microbatch)[1]
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(0.3), rel=1e-5)


def test_clip_fraction_is_over_all_true_tokens():
    batch = make_batch(tiny_model())
    old = batch.old_logprobs.clone()
    # ratio e^0.5 with Â > 0 on three tokens of 29
    for row, token in ((0, 0), (1, 4), (7, 2)):
        old[row, token] -= 0.5
    batch = batch.with_(old_logprobs=old, advantages=batch.mask.float())
    algorithm = replace(ALGORITHMS["ppo"], whitening=Whitening.none)
    for microbatch in (8, 3):
        metrics = gradients(algorithm, batch, microbatch)[1]
        assert metrics["policy/clip_fraction"] == pytest.approx(3 / 29, rel=1e-6)


# The order of updates


def run_settings(**changes) -> RunSettings:
    return replace(RUN, **{"rollout_batch_size": 12, "minibatch_size": 4, "update_epochs": 2, **changes})


def test_epochs_are_shuffled_passes_over_the_rollout_batch():
    rows = [part.tolist() for part in minibatch_rows(run_settings(update_epochs=3), iteration=1)]
    assert [len(part) for part in rows] == [4] * 9
    passes = [list(itertools.chain(*rows[i : i + 3])) for i in (0, 3, 6)]
    for order in passes:
        assert sorted(order) == list(range(12))
    assert len({tuple(order) for order in passes}) == 3


def test_consecutive_updates_repeat_each_minibatch_of_one_pass():
    epochs = [part.tolist() for part in minibatch_rows(run_settings(), iteration=1)]
    consecutive = [
        part.tolist() for part in minibatch_rows(run_settings(update_order=UpdateOrder.consecutive), iteration=1)
    ]
    a, b, c = epochs[:3]
    assert consecutive == [a, a, b, b, c, c]


def test_the_order_of_minibatches_is_keyed_by_seed_and_iteration():
    def order(seed: int, iteration: int) -> list[int]:
        return torch.cat(list(minibatch_rows(run_settings(seed=seed), iteration))).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*key)) for key in ((0, 1), (0, 2), (1, 1))}) == 3


def test_an_iteration_makes_epochs_times_minibatches_steps():
    model = tiny_model()
    run = updater(ALGORITHMS["awr"], model, minibatch_size=4, microbatch_size=2, update_epochs=3)
    assert run.steps_per_iteration == 6
    run.update(make_batch(model), 1)
    assert {int(state["step"]) for state in run.optimizer.state.values()} == {6}


# Learning rates


@pytest.mark.parametrize(
    ("schedule", "factors"),
    [
        # 2 steps of warm-up, then 4: done = 0, ¼, ½, ¾, and beyond the end 1 and 1.25
        (Schedule.constant, [0.5, 1, 1, 1, 1, 1, 1, 1]),
        (Schedule.linear, [0.5, 1, 1, 0.75, 0.5, 0.25, 0, 0]),
        (
            Schedule.cosine,
            [0.5, 1, 1, 0.5 + 0.5**0.5 / 2, 0.5, 0.5 - 0.5**0.5 / 2, 0, 0],
        ),
    ],
)
def test_schedule_by_hand(schedule, factors):
    settings = replace(OPTIMIZER, lr_scheduler=schedule, warmup_ratio=2 / 6)
    found = [schedule_factor(settings, step, total=6) for step in range(8)]
    assert found == pytest.approx(factors, rel=1e-12, abs=1e-12)


def test_without_warm_up_the_first_step_has_the_full_rate():
    assert schedule_factor(replace(OPTIMIZER, lr_scheduler=Schedule.linear), 0, total=10) == 1


def test_a_run_that_is_all_warm_up_never_divides_by_zero():
    settings = replace(OPTIMIZER, lr_scheduler=Schedule.linear, warmup_ratio=1.0)
    assert schedule_factor(settings, 3, total=4) == 1
    assert schedule_factor(settings, 4, total=4) == 1
    assert schedule_factor(settings, 5, total=4) == 0  # a step beyond the end: done = 1


def test_the_schedule_runs_over_all_steps_of_all_iterations_and_scales_both_rates():
    model = tiny_model()
    settings = replace(OPTIMIZER, lr_scheduler=Schedule.linear)
    run = updater(ALGORITHMS["awr"], model, settings=settings, minibatch_size=4, iterations=5)
    metrics = run.update(make_batch(model), 3)
    # 2 steps an iteration, 10 in all; the last of iteration 3 is number 5 from 0: 1 − 5/10
    assert metrics["optimizer/lr"] == pytest.approx(0.5 * 1e-3, rel=1e-12)
    assert [group["lr"] for group in run.optimizer.param_groups] == pytest.approx([0.5e-3, 1e-3], rel=1e-12)


def test_one_adamw_has_a_group_for_the_policy_and_one_for_the_critics():
    model = tiny_model()
    optimizer = build_optimizer(model, OPTIMIZER)
    assert type(optimizer) is torch.optim.AdamW
    policy, critic = optimizer.param_groups
    assert policy["params"] == model.policy_parameters()
    assert critic["params"] == model.critic_parameters()
    assert (policy["lr"], critic["lr"]) == (1e-3, 2e-3)
    for group in (policy, critic):
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.9, 0.95), 1e-8, 1e-6)
    without = build_optimizer(TrainingModel(tiny_policy(0), {}, 1.0), OPTIMIZER)
    assert len(without.param_groups) == 1


# Who moves


@pytest.mark.parametrize("on_trunk", [False, True])
def test_critic_warm_up_leaves_the_policy_bit_identical_while_the_critic_moves(on_trunk):
    model = tiny_model(on_trunk)
    settings = replace(OPTIMIZER, critic_warmup_iterations=2, weight_decay=0.1)
    run = updater(ALGORITHMS["ppo"], model, settings=settings, minibatch_size=4)
    batch = make_batch(model)
    policy, critic = flat(model.policy.parameters()), flat(model.critics.parameters())
    for iteration in (1, 2):
        run.update(batch, iteration)
        assert torch.equal(flat(model.policy.parameters()), policy)
        moved = flat(model.critics.parameters())
        assert not torch.equal(moved, critic)
        critic = moved
    run.update(batch, 3)
    assert not torch.equal(flat(model.policy.parameters()), policy)
    assert not torch.equal(flat(model.critics.parameters()), critic)


def distances(max_grad_norm: float) -> tuple[float, float, dict[str, float]]:
    """How far policy and critic move in a step at rate 1, and the metrics."""
    model = tiny_model()
    settings = replace(OPTIMIZER, max_grad_norm=max_grad_norm)
    run = updater(ALGORITHMS["awr"], model, plain_descent(model), settings)
    batch = make_batch(model, drift=0.3)
    before = [flat(part.parameters()) for part in (model.policy, model.critics)]
    metrics = run.update(batch, 1)
    after = [flat(part.parameters()) for part in (model.policy, model.critics)]
    policy, critic = (float((new - old).norm()) for new, old in zip(after, before, strict=True))
    return policy, critic, metrics


def test_gradients_of_policy_and_critic_are_clipped_each_by_its_own_norm():
    free_policy, free_critic, metrics = distances(1e9)
    # 1e-4: differences of weights that have moved little
    assert metrics["optimizer/grad_norm"] == pytest.approx(free_policy, rel=1e-4)
    assert metrics["optimizer/critic_grad_norm"] == pytest.approx(free_critic, rel=1e-4)
    both = sorted([free_policy, free_critic])
    between = (both[0] + both[1]) / 2
    policy, critic, metrics = distances(between)
    assert both[1] > 1.2 * both[0]
    assert sorted([policy, critic]) == pytest.approx([both[0], between], rel=1e-4)
    assert metrics["optimizer/grad_norm"] == pytest.approx(free_policy, rel=1e-4)  # as they were before
    assert metrics["optimizer/critic_grad_norm"] == pytest.approx(free_critic, rel=1e-4)


def test_a_step_clears_the_gradients():
    model = tiny_model()
    updater(ALGORITHMS["awr"], model).update(make_batch(model), 1)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_before_anything_changes():
    model = tiny_model()
    batch = make_batch(model)
    advantages = batch.advantages.clone()
    advantages[2, 0] = math.inf
    before = flat(model.parameters())
    algorithm = replace(ALGORITHMS["apa"], whitening=Whitening.none, normalizer=Normalizer.none)
    with pytest.raises(UserError, match="iteration 4, update 1: loss/policy is inf, optimizer/grad_norm is nan"):
        updater(algorithm, model).update(batch.with_(advantages=advantages), 4)
    assert torch.equal(flat(model.parameters()), before)


def test_metrics_of_an_iteration_are_means_over_its_steps_and_maxima_where_they_are_maxima():
    metrics = StepMetrics()
    for mean, largest in ((1.0, 5.0), (2.0, 7.0), (6.0, -1.0)):
        metrics.add("mean", mean)
        metrics.largest("max", largest)
    metrics.add("once", 4.0)
    assert metrics.result() == {"mean": 3.0, "once": 4.0, "max": 7.0}


def test_minibatch_diagnostics_are_averaged_into_the_iterations_metrics():
    model = tiny_model()
    algorithm, batch = ALGORITHMS["apa"], make_batch(model, drift=0.3)
    run = updater(algorithm, model, minibatch_size=4)
    parts = [algorithm.prepare_minibatch(batch.rows(rows)).metrics["apa/log_z"] for rows in minibatch_rows(run.run, 1)]
    assert run.update(batch, 1)["apa/log_z"] == pytest.approx(sum(parts) / 2, rel=1e-6)
    assert parts[0] != pytest.approx(parts[1], rel=1e-3)
