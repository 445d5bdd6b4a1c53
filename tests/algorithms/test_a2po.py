"""A*-PO: V* from the responses of π_init, its bias, and the loss of the policy's responses, computed by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from apa_cli.algorithms.a2po import A2PO, estimate_optimal_values
from apa_cli.algorithms.online_init import OnlineInit
from apa_cli.types import Batch, Needs, PolicyOutput, Rollout, RolloutPlan
from tests.builders import make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)

LN2, LN3 = math.log(2), math.log(3)


def make_samples(order: list[int] | None = None, junk: float = 0.0) -> Rollout:
    """Return one response of the policy to each of two prompts, and two and three of π_init, in this order.

    At β₁ = 0.5 V*(0) = ½ log((1 + 3)/2) = ½ ln 2 and V*(1) = ½ log((2 + 2 + 8)/3) = ln 2.
    """
    groups = torch.tensor([0, 1, 0, 0, 1, 1, 1])
    sampled = torch.tensor([True, True, False, False, False, False, False])
    scores = torch.tensor([1.0, -1.0, 0.0, LN3 / 2, LN2 / 2, LN2 / 2, 3 * LN2 / 2])
    mask = make_mask([2, 1, 3, 1, 2, 3, 1])
    init = torch.full(mask.shape, -1.0).where(mask, torch.tensor(junk))
    rollout = make_rollout(
        mask, scores=scores, groups=groups, on_policy=mask & sampled.unsqueeze(1), plan_index=(~sampled).long(),
        plans=OnlineInit(3).rollout(1, np.random.default_rng(0), {}), logprobs={"init": init},
        responses=[f"response {i}" for i in range(7)],
    )  # fmt: skip
    return rollout.select_rows(torch.tensor(order or list(range(7))))


def prepare(rollout: Rollout, beta1: float = 0.5, beta2: float = 0.25) -> Batch:
    """Return the batch of the policy's rows."""
    algorithm = A2PO(beta1, beta2)
    rows, state = algorithm.process_rollout(rollout, {}, np.random.default_rng(0), None)
    return algorithm.prepare(rows, state)[0]


def loss(batch: Batch, logprobs: torch.Tensor, beta2: float = 0.25) -> torch.Tensor:
    """Return the values of the only term."""
    (term,) = A2PO(0.5, beta2).loss(batch, PolicyOutput(logprobs, {})).terms
    assert (term.name, term.mask, term.weight) == ("policy", "row", 1.0)
    return term.values


def test_needs_are_log_probs_of_init_and_the_plan_that_samples_it():
    needs = A2PO(0.5, 0.25).needs()
    assert needs == Needs(passes={"response": ("init",)})
    assert A2PO.plans == ("online_init",) == (OnlineInit.name,)
    assert OnlineInit(8).needs(needs).samplers == ("init",)


def test_plan_samples_init_once_per_prompt_and_trains_on_the_policy_only():
    own, init = OnlineInit(5).rollout(1, np.random.default_rng(0), {})
    assert own == RolloutPlan()
    assert init == RolloutPlan(roll_in="init", samples=5, once_per_prompt=True)
    rollout = make_samples()
    assert OnlineInit(5).masks(rollout)["policy"].sum(-1).tolist() == [2, 1, 0, 0, 0, 0, 0]


def test_optimal_values_by_hand():
    batch = prepare(make_samples())
    assert_close(batch.extra["optimal_value"], torch.tensor([LN2 / 2, LN2]))
    assert_close(batch.extra["optimal_advantage"], torch.tensor([1 - LN2 / 2, -1 - LN2]))
    assert batch.metrics == pytest.approx({"a2po/optimal_value": 0.75 * LN2}, rel=1e-6)
    assert batch.mask.sum(-1).tolist() == [2, 1]  # the rows of π_init are gone
    assert batch.masks["row"].tolist() == [True, True]


def test_rows_may_stand_in_any_order():
    rows, _ = A2PO(0.5, 0.25).process_rollout(make_samples([5, 1, 3, 6, 2, 0, 4]), {}, np.random.default_rng(0), None)
    assert rows.responses == ["response 1", "response 0"]
    assert rows.scores.tolist() == [-1.0, 1.0]
    assert_close(rows.extra["optimal_value"], torch.tensor([LN2, LN2 / 2]))


def test_several_responses_of_the_policy_share_their_prompts_value():
    values = estimate_optimal_values(
        torch.tensor([0.0, LN3 / 2, 4.0]), torch.tensor([7, 7, 2]), torch.tensor([7, 2, 7]), beta=0.5
    )
    assert_close(values, torch.tensor([LN2 / 2, 4.0, LN2 / 2]))


def test_optimal_value_goes_from_the_mean_to_the_maximum():
    scores, prompt = torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0])
    groups = torch.zeros(3, dtype=torch.int64)
    # β → ∞: mean 3 + variance 14/3 / 2β; β → 0: maximum 6 − β log 3
    assert estimate_optimal_values(scores, groups, prompt, 1e5).item() == pytest.approx(3 + 14 / 6 / 1e5, rel=1e-6)
    assert estimate_optimal_values(scores, groups, prompt, 1e-3).item() == pytest.approx(6 - 1e-3 * LN3, rel=1e-6)


def test_equal_scores_are_their_own_optimal_value():
    # exactly, since sums are in float64; and exp(1000/0.01) must not overflow
    scores = torch.cat([torch.rand(200, generator=torch.Generator().manual_seed(0)), torch.tensor([1000.0, -1000.0])])
    prompts = torch.arange(len(scores))
    values = estimate_optimal_values(scores.repeat(8), prompts.repeat(8), prompts, beta=0.01)
    assert values.dtype == torch.float32
    assert values.tolist() == scores.tolist()


def test_optimal_value_of_eight_scores_is_biased_low():
    # N(0, 1) scores at β = ½: V* = β · 1/(2β²) = 1; of K = 8 its mean is 0.70. 4,000 prompts have a standard error of
    # about 0.005; of K = 1000 the estimate is nearly unbiased
    generator = torch.Generator().manual_seed(0)
    found = {}
    for k, prompts, repeats in ((8, 400, 10), (1000, 20, 10)):
        groups = torch.arange(prompts).repeat_interleave(k)
        samples = [
            estimate_optimal_values(torch.randn(len(groups), generator=generator), groups, torch.arange(prompts), 0.5)
            for _ in range(repeats)
        ]
        found[k] = torch.cat(samples).mean().item()
    assert found[8] == pytest.approx(0.70, abs=0.02)
    assert found[1000] == pytest.approx(1.0, abs=0.02)


def test_loss_by_hand():
    # Σ(ℓ − ℓ_init) = 0.5 + 1 and −2: (0.25 · 1.5 − (1 − ½ ln 2))² and (−0.5 + 1 + ln 2)²
    batch = prepare(make_samples())
    values = loss(batch, torch.tensor([[-0.5, 0.0, 0.0], [-3.0, 0.0, 0.0]]))
    assert_close(values, torch.tensor([(0.375 - 1 + LN2 / 2) ** 2, (0.5 + LN2) ** 2]))


def test_loss_and_gradient_vanish_at_the_target():
    # π = π_init exp((r − V*)/β₂) over sequences, here all on the first token
    batch = prepare(make_samples())
    advantages = batch.extra["optimal_advantage"]
    logprobs = batch.logprobs["init"].clone()
    logprobs[:, 0] += advantages / 0.25
    values = loss(batch, logprobs.requires_grad_())
    assert_close(values, torch.zeros(2), atol=1e-12)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert_close(gradient, torch.zeros(2, 3), atol=1e-6)


def test_gradient_is_the_same_on_all_tokens_and_none_on_padding():
    # at π_init: −2 β₂ (r − V*)
    batch = prepare(make_samples(junk=math.nan))
    logprobs = batch.logprobs["init"].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(batch, logprobs).sum(), logprobs)
    first, second = -0.5 * (1 - LN2 / 2), 0.5 * (1 + LN2)
    assert_close(gradient, torch.tensor([[first, first, 0.0], [second, 0.0, 0.0]]))


def test_loss_is_measured_from_init_and_not_from_a_refreshed_reference():
    rollout = make_samples()
    refreshed = rollout.replace(logprobs={**rollout.logprobs, "reference": torch.full(rollout.mask.shape, 9.0)})
    logprobs = torch.full((2, 3), -0.5)
    assert loss(prepare(refreshed), logprobs).tolist() == loss(prepare(rollout), logprobs).tolist()


@pytest.mark.parametrize("junk", [55.0, -math.inf, math.nan])
def test_junk_in_the_padding_changes_nothing(junk):
    logprobs = torch.tensor([[-0.5, 0.0, 1.0], [-3.0, 2.0, 0.0]])
    dirty = logprobs.where(make_mask([2, 1], width=3), torch.tensor(junk))
    assert loss(prepare(make_samples(junk=junk)), dirty).tolist() == loss(prepare(make_samples()), logprobs).tolist()


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_plain_loops_in_float64(seed):
    generator = torch.Generator().manual_seed(seed)
    n, t, beta1, beta2 = 15, 5, 0.4, 0.3
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    mask = make_mask(lengths.tolist(), width=t)
    groups = torch.tensor([0, 1, 2] * 5)
    sampled = torch.arange(n) % 5 < 2  # 2 responses of the policy to each prompt and 3 of π_init
    scores = torch.randn(n, generator=generator)
    init, policy = torch.randn(2, n, t, generator=generator)
    rollout = make_rollout(
        mask, scores=scores, groups=groups, on_policy=mask & sampled.unsqueeze(1), logprobs={"init": init}
    )
    batch = prepare(rollout, beta1, beta2)

    own, losses = [i for i in range(n) if bool(sampled[i])], []
    for i in own:
        kept = [float(scores[j]) for j in range(n) if not bool(sampled[j]) and int(groups[j]) == int(groups[i])]
        assert len(kept) == 3
        value = beta1 * math.log(sum(math.exp(score / beta1) for score in kept) / len(kept))
        ratio = sum(float(policy[i, s]) - float(init[i, s]) for s in range(int(lengths[i])))
        losses.append((beta2 * ratio - (float(scores[i]) - value)) ** 2)
    assert loss(batch, policy[own], beta2).tolist() == pytest.approx(losses, rel=1e-4, abs=1e-5)
