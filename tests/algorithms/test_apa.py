"""APA: loss, diagnostics of log Z and normalizer, computed by hand."""

import math
from functools import partial

import pytest
import torch

from apa_cli.algorithms.apa import APA, Normalizer, log_z
from apa_cli.algorithms.base import Whitening
from apa_cli.types import Critic, Needs, PolicyOutput, Rollout
from tests.builders import make_algorithm, make_mask, make_rollout

assert_close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)
make_apa = partial(make_algorithm, APA)


SAMPLER = torch.tensor([[-1.0, 0.0], [-1.25, 0.0], [-0.75, 0.0]])
REFERENCE = torch.tensor([[-1.5, 0.0], [-1.0, 0.0], [-1.0, 0.0]])
# k1 = 0.5, −0.25, 0.25; with values 0 the advantage is the score, and these scores make
# e = Â/λ − k1 = ln 1, ln 2, ln 5 at λ = 0.5
SCORES = torch.tensor([0.5 * 0.5, 0.5 * (math.log(2) - 0.25), 0.5 * (math.log(5) + 0.25)])


def make_responses(**fields) -> Rollout:
    """Return three responses of one token in two columns."""
    defaults = {
        "scores": SCORES,
        "logprobs": {
            "sampler": SAMPLER,
            "reference": REFERENCE,
            "init": torch.full((3, 2), 99.0),  # kl/* are measured against it; the loss is not
        },
        "values": {"value": torch.zeros(3, 2)},
    }
    return make_rollout(make_mask([1, 1, 1], width=2), **{**defaults, **fields})


def output(logprobs: torch.Tensor) -> PolicyOutput:
    return PolicyOutput(logprobs, {"value": torch.zeros_like(logprobs)})


def policy_loss(algorithm: APA, batch, logprobs: torch.Tensor) -> torch.Tensor:
    return algorithm.loss(batch, output(logprobs)).terms[0].values


def test_needs_are_a_reference_and_a_critic():
    needs = make_apa().needs()
    assert needs == Needs(critics=(Critic("value"),), passes={"response": ("reference", "value")})


def test_loss_by_hand():
    algorithm = make_apa()
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    # on-policy the residual is k1 − Â/λ = −e: squares 0, (ln 2)², (ln 5)²
    loss = policy_loss(algorithm, batch, SAMPLER)
    assert_close(loss[:, 0], torch.tensor([0.0, math.log(2) ** 2, math.log(5) ** 2]), atol=1e-6)
    # and one nat above: (1 − e)²
    loss = policy_loss(algorithm, batch, SAMPLER + 1)
    assert_close(loss[:, 0], torch.tensor([1.0, (1 - math.log(2)) ** 2, (1 - math.log(5)) ** 2]))


def test_loss_and_gradient_vanish_at_log_ratio_advantage_over_lambda():
    # powers of two: exact in float32
    algorithm = make_apa(lambda_=0.25)
    batch, _ = algorithm.prepare(make_responses(scores=torch.tensor([0.5, -0.25, 0.0])), algorithm.initial_state())
    target = (REFERENCE + torch.tensor([[2.0], [-1.0], [0.0]])).requires_grad_()
    loss = policy_loss(algorithm, batch, target)[:, 0]
    assert not loss.any()
    (gradient,) = torch.autograd.grad(loss.sum(), target)
    assert not gradient.any()


def test_loss_does_not_depend_on_the_old_policy():
    algorithm = make_apa()
    one, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    elsewhere = make_responses(logprobs={"sampler": SAMPLER - 3, "reference": REFERENCE})
    other, _ = algorithm.prepare(elsewhere, algorithm.initial_state())
    logprobs = torch.tensor([[-0.5, 0.0], [-2.0, 0.0], [-1.0, 0.0]])
    assert_close(policy_loss(algorithm, one, logprobs), policy_loss(algorithm, other, logprobs))


def test_log_z_by_hand():
    # e = ln 1, ln 2, ln 5: weights 1, 2, 5; log Z = ln(8/3); its bound (ln 1 + ln 2 + ln 5)/3 = ln(10)/3;
    # the effective sample size is 8² / (1 + 4 + 25) = 64/30
    algorithm = make_apa()
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    metrics = {name: value for name, value in batch.metrics.items() if name.startswith("apa/")}
    expected = {
        "apa/log_z": math.log(8 / 3),
        "apa/log_z_lower": math.log(10) / 3,
        "apa/log_z_ess": 64 / 30,
    }
    assert metrics == pytest.approx(expected, rel=1e-6)
    assert batch.extra == {}


def test_log_z_counts_true_tokens_only():
    exponent = torch.tensor([[0.0, math.log(2), math.nan], [math.log(5), math.inf, 50.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    expected = {
        "apa/log_z": math.log(8 / 3),
        "apa/log_z_lower": math.log(10) / 3,
        "apa/log_z_ess": 64 / 30,
    }
    assert log_z(exponent, mask) == pytest.approx(expected, rel=1e-6)


def test_log_z_of_exponents_that_overflow_is_finite():
    # 1000 and 1000 + ln 3: Z = e^1000 · (1 + 3)/2; ess = 16 / (1 + 9)
    exponent = torch.tensor([[1000.0, 1000 + math.log(3)]], dtype=torch.float64)
    diagnostics = log_z(exponent, torch.tensor([[True, True]]))
    assert diagnostics["apa/log_z"] == pytest.approx(1000 + math.log(2), rel=1e-9)
    assert diagnostics["apa/log_z_ess"] == pytest.approx(1.6, rel=1e-9)


def test_log_z_of_float32_exponents_is_computed_in_float64():
    # 1000, 1001, 1001: e^1000 · (1 + 2e)/3; mean 1000 + 2/3; ess (1 + 2e)² / (1 + 2e²)
    diagnostics = log_z(torch.tensor([[1000.0, 1001.0, 1001.0]]), torch.tensor([[True, True, True]]))
    expected = {
        "apa/log_z": 1000 + math.log((1 + 2 * math.e) / 3),
        "apa/log_z_lower": 1000 + 2 / 3,
        "apa/log_z_ess": (1 + 2 * math.e) ** 2 / (1 + 2 * math.e**2),
    }
    assert diagnostics == pytest.approx(expected, rel=1e-9)


def test_equal_exponents_have_full_effective_sample_size_and_tight_bounds():
    diagnostics = log_z(torch.full((4, 5), 0.75), torch.ones(4, 5, dtype=torch.bool))
    assert diagnostics == pytest.approx({"apa/log_z": 0.75, "apa/log_z_lower": 0.75, "apa/log_z_ess": 20})


def test_log_z_of_a_policy_at_its_target_is_zero():
    # π_old = π_init · exp(A/λ) on the sampled tokens: every exponent is 0
    algorithm = make_apa()
    advantages = 0.5 * (SAMPLER - REFERENCE)[:, 0]
    batch, _ = algorithm.prepare(make_responses(scores=advantages), algorithm.initial_state())
    assert batch.metrics["apa/log_z"] == pytest.approx(0, abs=1e-6)
    assert batch.metrics["apa/log_z_lower"] == pytest.approx(0, abs=1e-6)
    assert batch.metrics["apa/log_z_ess"] == pytest.approx(3, rel=1e-6)


def test_batch_normalizer_is_the_lower_bound_added_to_the_residual():
    algorithm = make_apa(normalizer=Normalizer.batch)
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    constant = math.log(10) / 3
    assert_close(batch.extra["log_normalizer"], torch.full((3, 2), constant))
    # on-policy: (−e + ln(10)/3)²
    expected = [(constant - e) ** 2 for e in (0.0, math.log(2), math.log(5))]
    assert_close(policy_loss(algorithm, batch, SAMPLER)[:, 0], torch.tensor(expected), atol=1e-6)


def test_batch_normalizer_minimises_the_on_policy_loss():
    algorithm = make_apa(normalizer=Normalizer.batch)
    batch, _ = algorithm.prepare(make_responses(), algorithm.initial_state())

    def loss(constant: torch.Tensor) -> float:
        return float(policy_loss(algorithm, batch.replace(extra={"log_normalizer": constant}), SAMPLER)[:, 0].mean())

    constant = batch.extra["log_normalizer"]
    least = loss(constant)
    assert loss(constant + 0.01) == pytest.approx(least + 1e-4, rel=1e-4)  # a difference: 1e-4
    assert loss(constant - 0.01) == pytest.approx(least + 1e-4, rel=1e-4)


@pytest.mark.parametrize("normalizer", list(Normalizer))
def test_with_minibatch_whitening_log_z_is_that_of_the_minibatch(normalizer):
    algorithm = make_apa(whitening=Whitening.minibatch, normalizer=normalizer)
    batch, _ = algorithm.prepare(make_responses(scores=torch.tensor([1.0, 7.0, 5.0])), algorithm.initial_state())
    assert not any(name.startswith("apa/") for name in batch.metrics)
    assert batch.extra == {}
    minibatch = algorithm.prepare_minibatch(batch.select_rows(torch.tensor([2, 0])))
    # scores 5, 1 whiten to 1, −1; e = 1/0.5 − 0.25 = 1.75 and −1/0.5 − 0.5 = −2.5
    lower = (1.75 - 2.5) / 2
    expected = {
        "apa/log_z": math.log((math.exp(1.75) + math.exp(-2.5)) / 2),
        "apa/log_z_lower": lower,
        "apa/log_z_ess": (math.exp(1.75) + math.exp(-2.5)) ** 2 / (math.exp(3.5) + math.exp(-5)),
    }
    assert minibatch.metrics == pytest.approx(expected, rel=1e-6)
    if normalizer is Normalizer.batch:
        assert_close(minibatch.extra["log_normalizer"], torch.full((2, 2), lower))
    else:
        assert minibatch.extra == {}


@pytest.mark.parametrize("whitening", [Whitening.none, Whitening.rollout])
def test_with_other_whitening_log_z_is_that_of_the_rollout_and_minibatches_keep_its_constant(whitening):
    algorithm = make_apa(whitening=whitening, normalizer=Normalizer.batch)
    batch, _ = algorithm.prepare(make_responses(scores=torch.tensor([1.0, 7.0, 4.0])), algorithm.initial_state())
    # Â/λ − k1: the mean of Â/λ is 4/0.5 = 8 raw and 0 whitened; that of k1 is (0.5 − 0.25 + 0.25)/3 = 1/6
    lower = (8 if whitening is Whitening.none else 0) - 1 / 6
    assert batch.metrics["apa/log_z_lower"] == pytest.approx(lower, rel=1e-6)
    minibatch = algorithm.prepare_minibatch(batch.select_rows(torch.tensor([1])))
    assert_close(minibatch.extra["log_normalizer"], torch.full((1, 2), lower), rtol=2e-6)
    assert minibatch.metrics == {}


def test_values_outside_the_mask_change_neither_diagnostics_nor_constant():
    algorithm = make_apa(normalizer=Normalizer.batch)
    clean, _ = algorithm.prepare(make_responses(), algorithm.initial_state())
    mask = make_responses().mask
    dirty, _ = algorithm.prepare(
        make_responses(
            logprobs={
                "sampler": SAMPLER.masked_fill(~mask, math.nan),
                "reference": REFERENCE.masked_fill(~mask, -math.inf),
            }
        ),
        algorithm.initial_state(),
    )
    assert dirty.metrics == clean.metrics
    torch.testing.assert_close(dirty.extra["log_normalizer"], clean.extra["log_normalizer"], rtol=0, atol=0)


def test_log_z_counts_the_policys_tokens_that_the_present_policy_sampled():
    # the third response was sampled by another, the second does not train the policy: e = ln 1 alone
    algorithm = make_apa(normalizer=Normalizer.batch)
    responses = make_responses()
    only = [torch.tensor([[row != left_out, False] for row in range(3)]) for left_out in (1, 2)]
    responses = responses.replace(masks={"policy": only[0]}, on_policy=only[1])
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    diagnostics = {name: value for name, value in batch.metrics.items() if name.startswith("apa/")}
    assert diagnostics == pytest.approx({"apa/log_z": 0, "apa/log_z_lower": 0, "apa/log_z_ess": 1}, abs=1e-6)
    assert_close(batch.extra["log_normalizer"], torch.zeros(3, 2), atol=1e-6)


@pytest.mark.parametrize("normalizer", list(Normalizer))
def test_without_an_on_policy_token_there_is_neither_diagnostic_nor_constant(normalizer):
    algorithm = make_apa(normalizer=normalizer)
    responses = make_responses(on_policy=torch.zeros(3, 2, dtype=torch.bool))
    batch, _ = algorithm.prepare(responses, algorithm.initial_state())
    assert not any(name.startswith("apa/") for name in batch.metrics)
    assert batch.extra == {}
    # the loss is that of log Z = 0: squares of e = ln 1, ln 2, ln 5
    loss = policy_loss(algorithm, batch, SAMPLER)
    assert_close(loss[:, 0], torch.tensor([0.0, math.log(2) ** 2, math.log(5) ** 2]), atol=1e-6)
