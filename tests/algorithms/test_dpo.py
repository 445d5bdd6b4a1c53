"""DPO: margin, loss and metrics of ranked pairs, computed by hand."""

import math
from functools import partial

import numpy as np
import pytest
import torch

from apa_cli.algorithms.dpo import DPO
from apa_cli.types import Batch, PolicyOutput, Rollout
from tests.builders import make_mask, make_rollout, make_sequences

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


def make_samples(scores: list[float], junk: float = 0.0) -> Rollout:
    """Return two responses to each prompt, of 1 and 2 tokens, with reference log-probs −1 and padding of `junk`."""
    mask = make_mask([1, 2] * (len(scores) // 2), width=3)
    reference = torch.full(mask.shape, -1.0).where(mask, torch.tensor(junk))
    groups = torch.arange(len(scores)) // 2
    return make_rollout(mask, scores=torch.tensor(scores), groups=groups, logprobs={"reference": reference})


def prepare(rollout: Rollout, algorithm: DPO | None = None) -> Batch:
    """Return the batch of a rollout, folded into pairs."""
    algorithm = algorithm or DPO(beta=0.5)
    pairs, state = algorithm.process_rollout(rollout, {}, np.random.default_rng(0), None)
    return algorithm.prepare(pairs, state)[0]


def make_output(batch: Batch, ratios: list[float], rejected_ratios: list[float]) -> PolicyOutput:
    """Return an output whose first token of each response has this log-ratio to the reference, the others 0."""

    def shift(sequences, first):
        start = torch.zeros(sequences.mask.shape)
        start[:, 0] = torch.tensor(first)
        return (sequences.logprobs["reference"] + start).requires_grad_()

    rejected = batch.related["rejected"]
    related = {"rejected": PolicyOutput(shift(rejected, rejected_ratios), {})}
    return PolicyOutput(shift(batch, ratios), {}, related=related)


def test_needs_are_pairs_and_a_reference_for_both():
    needs = DPO(beta=0.1).needs()
    assert needs.passes == {"response": ("reference",), "rejected": ("reference",)}
    assert (needs.samples_per_prompt, needs.least_samples, needs.samples_multiple) == (2, 2, 2)
    assert needs.critics == () and needs.texts == () and needs.samplers == ()


def test_loss_and_metrics_by_hand():
    # scores rank the second, the first, the second response as better
    batch = prepare(make_samples([0.0, 1.0, 3.0, -3.0, 0.25, 0.5]))
    assert batch.mask.sum(-1).tolist() == [2, 1, 2] and batch.related["rejected"].mask.sum(-1).tolist() == [1, 2, 1]
    # margins 0.5 · (2 − (−1)) = 1.5, 0.5 · (1 − 1) = 0, 0.5 · (−1 − 3) = −2; −log σ(z) = log(1 + e^−z)
    output = make_output(batch, [2.0, 1.0, -1.0], [-1.0, 1.0, 3.0])
    loss = DPO(beta=0.5).loss(batch, output)
    (term,) = loss.terms
    assert (term.name, term.mask, term.weight) == ("policy", "pair", 1.0)
    expected = [math.log(1 + math.exp(-1.5)), math.log(2), math.log(1 + math.exp(2))]
    assert_close(term.values, torch.tensor(expected))
    assert batch.masks["pair"].tolist() == [True] * 3
    assert_close(loss.metrics["dpo/margin"].values, torch.tensor([1.5, 0.0, -2.0]))
    assert loss.metrics["dpo/accuracy"].values.tolist() == [1.0, 0.5, 0.0]
    assert {(metric.mask, metric.reduction) for metric in loss.metrics.values()} == {("pair", "mean")}
    assert not any(metric.values.requires_grad for metric in loss.metrics.values())


def test_loss_is_log_2_at_the_reference_whatever_beta():
    batch = prepare(make_samples([1.0, 0.0, 0.0, 1.0]))
    for beta in (0.01, 10.0):
        loss = DPO(beta).loss(batch, make_output(batch, [0.0, 0.0], [0.0, 0.0]))
        assert_close(loss.terms[0].values, torch.full((2,), math.log(2)))
        assert loss.metrics["dpo/accuracy"].values.tolist() == [0.5, 0.5]


def test_equal_scores_give_no_term():
    batch = prepare(make_samples([1.0, 1.0, 0.0, 2.0, 5.0, 5.0]))
    assert batch.masks["pair"].tolist() == [False, True, False]


def test_gradient_is_beta_times_the_probability_of_the_wrong_order():
    # margin 1.5: −β σ(−1.5) on each token of the better response, +β σ(−1.5) on each of the worse one, 0 in padding
    batch = prepare(make_samples([0.0, 1.0], junk=math.nan))
    output = make_output(batch, [2.0], [-1.0])
    leaves = (output.logprobs, output.related["rejected"].logprobs)
    better, worse = torch.autograd.grad(DPO(beta=0.5).loss(batch, output).terms[0].values.sum(), leaves)
    size = 0.5 / (1 + math.exp(1.5))
    assert_close(better, torch.tensor([[-size, -size, 0.0]]))
    assert_close(worse, torch.tensor([[size, 0.0, 0.0]]))


def test_large_margins_neither_overflow_nor_lose_their_gradient():
    batch = prepare(make_samples([1.0, 0.0, 1.0, 0.0]))
    output = make_output(batch, [-400.0, 400.0], [400.0, -400.0])  # margins ∓400 at β = 0.5
    values = DPO(beta=0.5).loss(batch, output).terms[0].values
    assert_close(values, torch.tensor([400.0, 0.0]))
    (gradient,) = torch.autograd.grad(values.sum(), output.logprobs)
    assert_close(gradient, torch.tensor([[-0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]))


def test_junk_in_the_padding_changes_nothing():
    losses = []
    for junk in (0.0, 123.0, -math.inf):
        batch = prepare(make_samples([0.0, 1.0, 1.0, 0.0], junk))
        losses.append(DPO(beta=0.5).loss(batch, make_output(batch, [0.3, -0.7], [0.1, 0.9])).terms[0].values)
    assert losses[0].tolist() == losses[1].tolist() == losses[2].tolist()


def test_logged_pairs_are_taken_as_they_are():
    tokens = make_sequences([[1], [2]], [[3], [4, 5]])
    rejected = make_sequences([[1], [2]], [[6, 7, 8], [9]]).replace(logprobs={"reference": torch.zeros(2, 3)})
    rollout = make_rollout(
        tokens.mask, logprobs={"reference": torch.zeros(2, 2)}, related={"rejected": rejected}, groups=torch.arange(2)
    )
    batch = prepare(rollout)
    assert batch.masks["pair"].tolist() == [True, True]  # no scores are needed: the data ranks them
    assert batch.related["rejected"] is rejected
    values = DPO(beta=0.5).loss(batch, make_output(batch, [1.0, 0.0], [0.0, 2.0])).terms[0].values
    assert_close(values, torch.tensor([math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(1.0))]))


@pytest.mark.parametrize("seed", range(3))
def test_agrees_with_plain_loops_in_float64(seed):
    generator = torch.Generator().manual_seed(seed)
    n, t, beta = 12, 6, 0.3
    lengths = torch.randint(1, t + 1, (n,), generator=generator)
    mask = make_mask(lengths.tolist(), width=t)
    groups = torch.randint(0, 3, (n // 2,), generator=generator).repeat(2)  # even counts, rows of a prompt scattered
    scores = torch.randint(0, 3, (n,), generator=generator).float()
    reference, policy = torch.randn(2, n, t, generator=generator)
    rollout = make_rollout(
        mask, scores=scores, groups=groups, logprobs={"reference": reference}, extra={"policy": policy}
    )
    batch = prepare(rollout, DPO(beta))

    expected = []
    for prompt in range(3):
        rows = [i for i in range(n) if int(groups[i]) == prompt]
        for i, j in zip(rows[::2], rows[1::2], strict=True):
            better, worse = (j, i) if float(scores[j]) > float(scores[i]) else (i, j)
            ratio = {
                k: sum(float(policy[k, s]) - float(reference[k, s]) for s in range(int(lengths[k]))) for k in (i, j)
            }
            loss = math.log1p(math.exp(-beta * (ratio[better] - ratio[worse])))
            expected.append((better, worse, loss, float(scores[i]) != float(scores[j])))
    better, worse, losses, counted = (list(column) for column in zip(*expected, strict=True))
    output = PolicyOutput(policy[better], {}, related={"rejected": PolicyOutput(policy[worse], {})})
    assert batch.extra["policy"].tolist() == policy[better].tolist()
    assert batch.masks["pair"].tolist() == counted
    assert DPO(beta).loss(batch, output).terms[0].values.tolist() == pytest.approx(losses, rel=1e-5)


def test_margins_of_rounding_count_as_half_an_accurate_pair():
    # 2⁻¹⁸ · 3 tokens = 1.1e-5: ±1e-5 is rounding, 2e-5 is not
    batch = prepare(make_samples([0.0, 1.0] * 4))
    loss = DPO(beta=0.5).loss(batch, make_output(batch, [1e-5, -1e-5, 2e-5, -2e-5], [0.0] * 4))
    assert loss.metrics["dpo/accuracy"].values.tolist() == [0.5, 0.5, 1, 0]


def test_scores_that_differ_by_rounding_give_no_term():
    # float32 steps near 3 are 2.4e-7; 2⁻¹⁸ · 3 = 1.1e-5
    batch = prepare(make_samples([3.0, 3 + 2.4e-7, 3.0, 3 + 2e-5]))
    assert batch.masks["pair"].tolist() == [False, True]
