"""REBEL: rewards, regression target and loss of pairs, computed by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from apa_cli.algorithms.rebel import REBEL
from apa_cli.types import Batch, PolicyOutput, Rollout
from tests.builders import make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)

# Two pairs, of 2 and 1 tokens and of 1 and 3; Σ k1 = sampler − reference over the tokens:
# 0.5 + 0.25 = 0.75, −1, 0, 2 − 0.5 + 0.5 = 2.
MASK = make_mask([2, 1, 1, 3], width=4)
SAMPLER = torch.tensor([[-1.0, -1.0, 0, 0], [-2.0, 0, 0, 0], [-1.0, 0, 0, 0], [-1.0, -2.0, -0.5, 0]])
REFERENCE = torch.tensor([[-1.5, -1.25, 0, 0], [-1.0, 0, 0, 0], [-1.0, 0, 0, 0], [-3.0, -1.5, -1.0, 0]])
OLD = SAMPLER + 0.125 * MASK
SCORES = torch.tensor([3.0, 1.0, 2.0, 2.0])


def make_samples(junk: float = 0.0, **fields) -> Rollout:
    """Return the two pairs, with `junk` in the padding of all log-probs."""
    logprobs = {"sampler": SAMPLER, "reference": REFERENCE, "old": OLD}
    filled = {name: values.where(MASK, torch.tensor(junk)) for name, values in logprobs.items()}
    defaults = {"scores": SCORES, "groups": torch.tensor([0, 0, 1, 1]), "logprobs": filled}
    return make_rollout(MASK, **{**defaults, **fields})


def prepare(rollout: Rollout, algorithm: REBEL) -> Batch:
    """Return the batch of a rollout, folded into pairs."""
    pairs, state = algorithm.process_rollout(rollout, {}, np.random.default_rng(0), None)
    return algorithm.prepare(pairs, state)[0]


def make_output(batch: Batch, shift: float, second_shift: float, base: str = "old") -> PolicyOutput:
    """Return an output of the log-probs `base`, shifted by so much on every token of the first and second responses."""
    second = batch.related["second"]
    related = {"second": PolicyOutput((second.logprobs[base] + second_shift).requires_grad_(), {})}
    return PolicyOutput((batch.logprobs[base] + shift).requires_grad_(), {}, related=related)


def test_needs_are_pairs_and_log_probs_of_both():
    needs = REBEL(inverse_eta=1.0, kl_coef=0.05).needs()
    assert needs.passes == {"response": ("reference", "old"), "second": ("reference", "old")}
    assert (needs.samples_per_prompt, needs.least_samples, needs.samples_multiple) == (2, 2, 2)
    assert needs.critics == ()
    free = REBEL(inverse_eta=1.0, kl_coef=0.0).needs()  # KL without a price needs no reference
    assert free.passes == {"response": ("old",), "second": ("old",)}


def test_difference_in_reward_by_hand():
    # r = score − 0.5 Σ k1: 3 − 0.375 = 2.625, 1 + 0.5 = 1.5, 2, 2 − 1 = 1; differences 1.125 and 1
    batch = prepare(make_samples(), REBEL(inverse_eta=1.0, kl_coef=0.5))
    assert batch.extra["reward_difference"].tolist() == [1.125, 1.0]
    assert batch.mask.sum(-1).tolist() == [2, 1]  # the order of the samples, not of the scores
    assert batch.masks["pair"].tolist() == [True, True]


def test_kl_without_a_price_reads_no_reference():
    logprobs = {"sampler": SAMPLER, "old": OLD}
    batch = prepare(make_samples(logprobs=logprobs), REBEL(inverse_eta=1.0, kl_coef=0.0))
    assert batch.extra["reward_difference"].tolist() == [2.0, 0.0]


def test_kl_counts_on_policy_tokens_only():
    # without the first token of each response Σ k1 is 0.25, 0, 0, 0: r = 2.875 and 1; 2 and 2
    on_policy = MASK & (torch.arange(4) > 0)
    batch = prepare(make_samples(on_policy=on_policy), REBEL(inverse_eta=1.0, kl_coef=0.5))
    assert batch.extra["reward_difference"].tolist() == [1.875, 0.0]


def test_loss_by_hand():
    algorithm = REBEL(inverse_eta=2.0, kl_coef=0.5)
    batch = prepare(make_samples(), algorithm)
    (term,) = algorithm.loss(batch, make_output(batch, 0.25, -0.5)).terms
    assert (term.name, term.mask, term.weight) == ("policy", "pair", 1.0)
    # Σ(ℓ − ℓ_old) = 2 · 0.25 and 1 · −0.5: (2 · 1 − 1.125)²; 1 · 0.25 and 3 · −0.5: (2 · 1.75 − 1)²
    assert_close(term.values, torch.tensor([0.875**2, 2.5**2]))


def test_loss_on_policy_is_the_squared_difference_in_reward():
    algorithm = REBEL(inverse_eta=7.0, kl_coef=0.5)
    batch = prepare(make_samples(), algorithm)
    assert_close(algorithm.loss(batch, make_output(batch, 0.0, 0.0)).terms[0].values, torch.tensor([1.125**2, 1.0]))


def test_loss_and_gradient_vanish_at_the_target():
    # log-ratio differences equal to (r₁ − r₂) · η: the first token of each first response moves by 1.125/2 and 1/2
    algorithm = REBEL(inverse_eta=2.0, kl_coef=0.5)
    batch = prepare(make_samples(), algorithm)
    output = make_output(batch, 0.0, 0.0)
    with torch.no_grad():
        output.logprobs[:, 0] += torch.tensor([0.5625, 0.5])
    values = algorithm.loss(batch, output).terms[0].values
    assert values.tolist() == [0.0, 0.0]
    for leaf in (output.logprobs, output.related["second"].logprobs):
        assert not torch.autograd.grad(values.sum(), leaf, retain_graph=True)[0].any()


def test_gradient_on_policy_is_that_of_a_policy_gradient():
    # ∓2 η⁻¹ (r₁ − r₂) on every token of the first and second response, 0 in the padding
    algorithm = REBEL(inverse_eta=2.0, kl_coef=0.5)
    batch = prepare(make_samples(junk=math.nan), algorithm)
    output = make_output(batch, 0.0, 0.0)
    values = algorithm.loss(batch, output).terms[0].values
    first, second = torch.autograd.grad(values.sum(), (output.logprobs, output.related["second"].logprobs))
    assert_close(first, torch.tensor([[-4.5, -4.5, 0, 0], [-4.0, 0, 0, 0]]))
    assert_close(second, torch.tensor([[4.5, 0, 0, 0], [4.0, 4.0, 4.0, 0]]))


@pytest.mark.parametrize("junk", [77.0, math.inf, math.nan])
def test_junk_in_the_padding_changes_nothing(junk):
    algorithm = REBEL(inverse_eta=2.0, kl_coef=0.5)
    losses = []
    for padding in (0.0, junk):
        batch = prepare(make_samples(padding), algorithm)
        losses.append(algorithm.loss(batch, make_output(batch, 0.25, -0.5)).terms[0].values.tolist())
    assert losses[0] == losses[1]


def test_swapping_the_responses_leaves_the_loss():
    algorithm = REBEL(inverse_eta=2.0, kl_coef=0.5)
    rollout = make_samples()
    one, other = prepare(rollout, algorithm), prepare(rollout.select_rows(torch.tensor([1, 0, 3, 2])), algorithm)
    assert other.extra["reward_difference"].tolist() == [-1.125, -1.0]
    values = algorithm.loss(one, make_output(one, 0.25, -0.5)).terms[0].values
    assert_close(algorithm.loss(other, make_output(other, -0.5, 0.25)).terms[0].values, values)


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_plain_loops_in_float64(seed):
    generator = torch.Generator().manual_seed(seed)
    n, t, inverse_eta, kl_coef = 12, 6, 0.7, 0.2
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    mask = make_mask(lengths.tolist(), width=t)
    groups = torch.randint(0, 3, (n // 2,), generator=generator).repeat(2)  # even counts, rows of a prompt scattered
    scores = torch.randn(n, generator=generator)
    sampler, reference, old, policy = torch.randn(4, n, t, generator=generator)
    logprobs = {"sampler": sampler, "reference": reference, "old": old}
    algorithm = REBEL(inverse_eta, kl_coef)
    batch = prepare(make_rollout(mask, scores=scores, groups=groups, logprobs=logprobs), algorithm)

    firsts, seconds, losses = [], [], []
    for prompt in range(3):
        rows = [i for i in range(n) if int(groups[i]) == prompt]
        for i, j in zip(rows[::2], rows[1::2], strict=True):
            reward, ratio = {}, {}
            for k in (i, j):
                tokens = range(int(lengths[k]))
                kl = sum(float(sampler[k, s]) - float(reference[k, s]) for s in tokens)
                reward[k] = float(scores[k]) - kl_coef * kl
                ratio[k] = sum(float(policy[k, s]) - float(old[k, s]) for s in tokens)
            losses.append((inverse_eta * (ratio[i] - ratio[j]) - (reward[i] - reward[j])) ** 2)
            firsts.append(i)
            seconds.append(j)
    output = PolicyOutput(policy[firsts], {}, related={"second": PolicyOutput(policy[seconds], {})})
    values = algorithm.loss(batch, output).terms[0].values.tolist()
    assert values == pytest.approx(losses, rel=1e-4, abs=1e-5)  # a float32 difference may cancel
