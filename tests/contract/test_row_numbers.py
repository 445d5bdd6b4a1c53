"""Iterations that train on no row, fewer rows, and more rows than were sampled."""

import pytest
import torch


@pytest.fixture
def trainer(make_contract_trainer):
    """A trainer of APA on 0, 3, 1 and 20 rows of the eight that are sampled; the learning rate falls linearly to 0."""
    return make_contract_trainer("algo=resized", "iterations=4", "optimizer.lr_scheduler=linear", "optimizer.lr=3e-4")


def copy_parameters(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.models.model.parameters()]


def count_forwarded_rows(trainer) -> list[int]:
    """Return a list to which every forward pass of the update adds its number of rows."""
    counts = []

    def record(module, arguments, options):
        if torch.is_grad_enabled():
            counts.append(len(arguments[0].mask))

    trainer.models.model.register_forward_pre_hook(record, with_kwargs=True)
    return counts


def test_no_row_is_no_step_and_metrics_are_still_logged(trainer):
    before = copy_parameters(trainer)
    result = trainer.run_phases(1)
    assert result.batch is None and len(result.rollout) == 0 and len(result.sampled) == 8
    assert all(map(torch.equal, before, copy_parameters(trainer))) and trainer.updater.steps == 0
    assert result.metrics["reward/mean"] == pytest.approx(float(result.sampled.scores.mean()))
    assert {"reward/std", "policy/entropy", "response/length", "response/eos_rate"} <= result.metrics.keys()
    prefixes = ("loss/", "kl/", "apa/", "value/", "optimizer/", "policy/ratio", "policy/sampler_gap", "score/")
    assert not [name for name in result.metrics if name.startswith(prefixes)]
    assert trainer.progress.algorithm["rounds"] == 1
    assert trainer.progress.samples == 8


def test_every_row_is_trained_on_once_per_epoch_and_the_schedule_goes_by_the_share_of_the_run(trainer):
    """Two epochs; minibatches of about 4 rows: 1 step for 3 rows, 1 for 1 row, round(20/4) = 5 for 20 rows.

    A full iteration has 2 · 8/4 = 4 steps, the run 16. The last of s steps of iteration i stands at
    4 (i − 1) + 4 (s − 1)/s: at 6 in iteration 2, 10 in iteration 3, 15.6 in iteration 4, of 16.
    """
    forwarded = count_forwarded_rows(trainer)
    for iteration, rows, steps, lr in ((1, 0, 0, None), (2, 3, 2, 10 / 16), (3, 1, 2, 6 / 16), (4, 20, 10, 0.4 / 16)):
        before, parameters = trainer.updater.steps, copy_parameters(trainer)
        forwarded.clear()
        result = trainer.run_phases(iteration)
        assert len(result.rollout) == rows and sum(forwarded) == 2 * rows
        assert trainer.updater.steps - before == steps
        if rows:
            assert result.metrics["optimizer/lr"] == pytest.approx(3e-4 * lr)
            assert not all(map(torch.equal, parameters, copy_parameters(trainer)))
    repeated = result.rollout
    # of 20 rows 8 are those that were sampled; the others are repeated ones, which kl/* and apa/log_z leave out
    assert repeated.on_policy.any(-1).tolist() == [True] * 8 + [False] * 12
    k1 = (repeated.logprobs["sampler"] - repeated.logprobs["init"])[:8]
    expected = float((k1 * repeated.mask[:8]).sum(-1).mean())
    assert abs(expected) > 1e-4 and result.metrics["kl/sequence"] == pytest.approx(expected, abs=1e-5)
    exponent = (result.batch.advantages[:8] / 0.1 - k1)[repeated.mask[:8]]
    assert result.metrics["apa/log_z_lower"] == pytest.approx(float(exponent.mean()), rel=1e-4)
