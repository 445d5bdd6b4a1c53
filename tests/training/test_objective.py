"""The objective of a step: masks of rows and of related sequences, idle outputs, on-policy tokens, empty metrics."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel, compute_response_logprobs
from apa_cli.training.objective import average_over_steps, find_outputs
from apa_cli.types import Batch, Loss, LossTerm, Metric, PolicyOutput
from tests.builders import make_batch, make_sequences
from tests.training.builders import (
    OPTIMIZER,
    Probe,
    build_model,
    compute_gradients,
    flatten,
    make_objective,
    make_response_batch,
    make_updater,
)

# Masks of rows and of related sequences


def make_paired_batch(model: TrainingModel) -> Batch:
    """Return three rows of 2, 3 and 1 tokens with related responses of 1, 4 and 2 tokens to other prompts."""
    batch = make_batch(make_sequences([[3, 1], [4], [1, 5]], [[2, 7], [8, 2, 8], [1]]))
    other = make_sequences([[9], [2, 6], [5]], [[3], [5, 8, 9, 7], [9, 3]])
    masks = {"row": torch.tensor([True, False, True]), "other": other.mask & (other.response_ids != 8)}
    with torch.no_grad():
        logprobs = {"sampler": compute_response_logprobs(model.policy, other, 1.0)}
        own = {"sampler": compute_response_logprobs(model.policy, batch, 1.0)}
    related = {"other": other.replace(logprobs=logprobs)}
    return batch.replace(masks={**batch.masks, **masks}, related=related, logprobs=own)


def make_row_and_related_terms(batch: Batch, output: PolicyOutput) -> Loss:
    """Return a term per row and a term per token of the related sequence, and a metric of each."""
    rows = (output.logprobs * batch.mask).sum(-1)
    related = output.related["other"].logprobs
    metrics = {
        "probe/row": Metric(rows.detach(), "row"),
        "probe/other": Metric(related.detach(), "other", reduction="max"),
    }
    return Loss([LossTerm("row", rows, "row", 2.0), LossTerm("other", related, "other", -0.5)], metrics)


@pytest.mark.parametrize("microbatch", [6, 2])
def test_terms_per_row_and_of_related_sequences_are_divided_by_the_counts_of_their_masks(microbatch):
    model = build_model()
    batch = make_paired_batch(model)
    own = compute_response_logprobs(model.policy, batch, 1.0)
    other = compute_response_logprobs(model.policy, batch.related["other"], 1.0)
    rows = own.sum(-1)
    # Rows 0 and 2 count, and 6 of the related tokens 3; 5 8 9 7; 9 3: all but the 8.
    row_term = (rows[0] + rows[2]) / 2
    others = torch.stack([other[0, 0], other[1, 0], other[1, 2], other[1, 3], other[2, 0], other[2, 1]])
    expected = torch.autograd.grad(2 * row_term - 0.5 * others.sum() / 6, list(model.policy.parameters()))
    gradients, metrics = compute_gradients(Probe(make_row_and_related_terms), batch, microbatch)
    for (name, _), gradient in zip(model.policy.named_parameters(), expected, strict=True):
        torch.testing.assert_close(gradients[f"policy.{name}"], gradient, rtol=1e-4, atol=1e-6)
    assert metrics["loss/row"] == pytest.approx(float(row_term.detach()), rel=1e-5) == metrics["probe/row"]
    assert metrics["loss/other"] == pytest.approx(float(others.detach().mean()), rel=1e-5)
    assert metrics["probe/other"] == pytest.approx(float(others.detach().max()), rel=1e-5)


@pytest.mark.parametrize(
    ("values", "mask", "message"),
    [
        (lambda x: x.mean(-1), "policy", "values of shape [3], but its mask 'policy' has shape [3, 3]"),
        (lambda x: x.mean(), "policy", "values of shape [], but its mask 'policy' has shape [3, 3]"),
        (lambda x: x, "row", "values of shape [3, 3], but its mask 'row' has shape [3]"),
        (lambda x: x, "other", "values of shape [3, 3], but its mask 'other' has shape [3, 4]"),
        (lambda x: x, "tokens", "the mask 'tokens'; there are critic/value, other, policy, row"),
    ],
    ids=["row", "scalar", "tokens-of-rows", "related", "unknown"],
)
@pytest.mark.parametrize("kind", ["term", "metric"])
def test_a_wrong_shape_or_mask_is_one_line(kind, values, mask, message):
    def make_loss(batch: Batch, output: PolicyOutput) -> Loss:
        if kind == "term":
            return Loss([LossTerm("mine", values(output.logprobs), mask, 1.0)])
        terms = [LossTerm("policy", output.logprobs, "policy", 1.0)]
        return Loss(terms, {"mine": Metric(values(output.logprobs).detach(), mask)})

    model = build_model()
    with pytest.raises(UserError) as error:
        make_updater(Probe(make_loss), model).update(make_paired_batch(model), 1)
    expected = f"algo: Probe.loss gives the {kind} 'mine' {message}"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)


# Idle outputs

BUSY = replace(OPTIMIZER, lr=1e-2, critic_lr=1e-2, weight_decay=0.1)


def make_terms(*names: str) -> Probe:
    """Return an algorithm with a term of the policy and of each named critic, each with a mask of its own."""

    def make_loss(batch: Batch, output: PolicyOutput) -> Loss:
        terms = [LossTerm("policy", output.logprobs, "policy", 1.0)]
        terms += [LossTerm(name, (output.values[name] - 1) ** 2, f"critic/{name}", 1.0) for name in names]
        return Loss(terms)

    return Probe(make_loss)


def make_masked_batch(model: TrainingModel, *empty: str) -> Batch:
    """Return the eight responses with the masks of the policy and of the critics "a" and "b", some of them empty."""
    batch = make_batch(make_response_batch(build_model()))
    masks = {"policy": batch.mask, "critic/a": batch.mask, "critic/b": batch.mask}
    none = torch.zeros_like(batch.mask)
    return batch.replace(masks={name: none if name in empty else mask for name, mask in masks.items()}, returns={})


def list_weights(model: TrainingModel) -> dict[str, Tensor]:
    """Return the weights of the policy and of each critic, each as one vector."""
    parts = {"policy": model.policy, **model.critics}
    return {name: flatten(part.parameters()) for name, part in parts.items()}


@pytest.mark.parametrize("empty", [["critic/b"], ["critic/a"], ["policy"], ["policy", "critic/a"]], ids="+".join)
@pytest.mark.parametrize("microbatch", [8, 3])
def test_parameters_of_an_output_without_a_counted_element_do_not_move(empty, microbatch):
    """AdamW has momentum from a first step of all outputs, and weight decay."""
    model = build_model(critics=("a", "b"))
    updater = make_updater(make_terms("a", "b"), model, settings=BUSY, microbatch_size=microbatch)
    updater.update(make_masked_batch(model), 1)
    before = list_weights(model)
    metrics = updater.update(make_masked_batch(model, *empty), 1)
    idle = {name.removeprefix("critic/") for name in empty}
    for name, weights in list_weights(model).items():
        assert torch.equal(weights, before[name]) is (name in idle), name
    assert {name for name in metrics if name.startswith("loss/")} == {f"loss/{name}" for name in before.keys() - idle}
    assert ("optimizer/grad_norm" in metrics) is ("policy" not in idle)
    assert "optimizer/critic_grad_norm" in metrics


def test_a_term_of_weight_0_is_logged_and_moves_nothing():
    def make_loss(batch: Batch, output: PolicyOutput) -> Loss:
        terms = [LossTerm("policy", output.logprobs, "policy", 1.0)]
        return Loss([*terms, *(LossTerm(name, output.values[name] ** 2, "policy", weights[name]) for name in "ab")])

    model, weights = build_model(critics=("a", "b")), {"a": 1.0, "b": 1.0}
    updater = make_updater(Probe(make_loss), model, settings=BUSY)
    updater.update(make_masked_batch(model), 1)
    before, weights["b"] = list_weights(model), 0.0
    metrics = updater.update(make_masked_batch(model), 1)
    moved = {name for name, weight in list_weights(model).items() if not torch.equal(weight, before[name])}
    assert moved == {"policy", "a"} and metrics["loss/b"] > 0


def test_an_idle_output_would_move_with_a_gradient_of_zero():
    """The other way round: momentum and weight decay move a parameter whose gradient is 0."""
    model = build_model(critics=("a", "b"))
    updater = make_updater(make_terms("a", "b"), model, settings=BUSY)
    updater.update(make_masked_batch(model), 1)
    before = list_weights(model)["b"]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    updater.optimizer.step()
    assert not torch.equal(list_weights(model)["b"], before)


def test_on_the_policys_trunk_an_active_critic_keeps_the_policy_active():
    model = build_model(on_trunk=True, critics=("a", "b"))
    updater = make_updater(make_terms("a", "b"), model, settings=BUSY)
    updater.update(make_masked_batch(model), 1)
    before, trunk = list_weights(model), flatten(model.policy.base_model.parameters())
    updater.update(make_masked_batch(model, "policy", "critic/b"), 1)
    after = list_weights(model)
    assert not torch.equal(flatten(model.policy.base_model.parameters()), trunk)
    assert not torch.equal(after["a"], before["a"]) and torch.equal(after["b"], before["b"])


def test_a_critic_that_no_term_uses_gets_no_gradient():
    model = build_model(critics=("a", "b"))
    updater = make_updater(make_terms("a"), model, settings=BUSY)
    updater.accumulate_gradients(make_masked_batch(model), is_first=True)
    assert all(parameter.grad is None for parameter in model.critics["b"].parameters())
    assert all(parameter.grad is not None for parameter in model.critics["a"].parameters())


def test_every_trained_output_enters_the_graph():
    """With several processes each waits for the gradients of all parameters, so an unused output has zeros at first."""
    model = build_model(critics=("a", "b"))
    batch = make_masked_batch(model)
    terms = [LossTerm("none", torch.zeros(batch.mask.shape), "policy", 1.0)]
    updater = make_updater(Probe(lambda batch, output: Loss(terms)), model)
    make_objective(updater, {name: 29 for name in batch.masks}).compute(batch, torch.arange(8)).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


def test_an_output_that_counts_on_another_rank_only_is_active_on_all(run_on_ranks):
    """Row 1 alone has a token of critic "a"; the rank of row 0 has a gradient of zero for it, not none."""

    def accumulate(world):
        model = build_model(critics=("a", "b"))
        batch = make_masked_batch(model, "critic/a", "critic/b").select_rows(torch.arange(2))
        mask = torch.zeros_like(batch.mask)
        mask[1, 0] = True
        batch = batch.replace(masks={**batch.masks, "critic/a": mask})
        make_updater(make_terms("a", "b"), model, world=world).accumulate_gradients(batch, is_first=True)
        heads = [model.critics[name].head.bias.grad for name in ("a", "b")]
        return [None if gradient is None else float(gradient) for gradient in heads]

    # The shorter row, 0, is rank 0's. The gradient is divided by the count, 1, and averaged over the ranks later.
    (first, idle), (second, other_idle) = run_on_ranks(2, accumulate)
    assert first == 0 and second != 0 and idle is None and other_idle is None


def test_outputs_are_found_by_the_graph():
    hidden, weight = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    trunk = hidden.exp()
    policy, entropy, critic = trunk * 2, trunk.sin(), trunk * weight
    outputs = {"policy": [policy, entropy], "a": [critic], "copy": []}
    found = {
        "policy": policy**2,
        "entropy": 1 - entropy.exp(),
        "critic": critic.square() * 0.0,
        "both": policy.detach() * critic + policy,
        "detached": (policy * critic).detach() + weight,
        "trunk": trunk + 1,  # not through an output
        "constant": torch.ones(3),
        "itself": critic,
        "deep": sum((policy * i for i in range(2000)), torch.zeros(3)),
    }
    expected = {
        "policy": {"policy"}, "entropy": {"policy"}, "critic": {"a"}, "both": {"policy", "a"}, "detached": set(),
        "trunk": set(), "constant": set(), "itself": {"a"}, "deep": {"policy"},
    }  # fmt: skip
    assert {name: find_outputs(values, outputs) for name, values in found.items()} == expected


# Metrics


def test_over_nothing_there_is_no_metric():
    model = build_model()
    batch = make_batch(make_response_batch(model))
    none = torch.zeros_like(batch.mask)

    def make_loss(batch: Batch, output: PolicyOutput) -> Loss:
        metrics = {f"probe/{kind}": Metric(output.logprobs.detach(), "none", kind) for kind in ("mean", "max")}
        return Loss([LossTerm("idle", output.logprobs, "none", 1.0)], metrics)

    batch = batch.replace(masks={"none": none}, on_policy=none)
    for microbatch in (8, 3):
        metrics = make_updater(Probe(make_loss), model, microbatch_size=microbatch).update(batch, 1)
        assert metrics == {"optimizer/lr": 1e-3}


def test_a_metric_over_nothing_in_one_step_is_that_of_the_other_step():
    """Row 3 alone has a token that counts: its minibatch alone has the metrics."""
    model = build_model()
    batch = make_batch(make_response_batch(model))
    mask, numbers = torch.zeros_like(batch.mask), torch.arange(48.0).view(8, 6)
    mask[3, :2] = True  # numbers 18 and 19

    def make_loss(batch: Batch, output: PolicyOutput) -> Loss:
        metrics = {f"probe/{kind}": Metric(batch.extra["number"], "few", kind) for kind in ("mean", "max")}
        return Loss([LossTerm("few", output.logprobs * 0 + batch.extra["number"], "few", 1.0)], metrics)

    batch = batch.replace(masks={"few": mask}, extra={"number": numbers})
    metrics = make_updater(Probe(make_loss), model, minibatch_size=4, microbatch_size=1).update(batch, 1)
    assert (metrics["loss/few"], metrics["probe/mean"], metrics["probe/max"]) == (18.5, 18.5, 19)


def make_policy_term(batch: Batch, output: PolicyOutput) -> Loss:
    return Loss([LossTerm("policy", output.logprobs, "policy", 1.0)])


@pytest.mark.parametrize("microbatch", [6, 2])
def test_ratio_and_gap_count_tokens_of_the_present_policy_only_and_related_ones_too(microbatch):
    model = build_model()
    batch = make_paired_batch(model)
    own, other = batch.logprobs["sampler"].clone(), batch.related["other"].logprobs["sampler"].clone()
    # log π_θ − log π_sampler, on-policy: ⅛ at own token 0 of row 0 and ¼ at related token 2 of row 1; off-policy: 1, 2.
    own[0, 0] -= 0.125
    own[0, 1] -= 1
    other[1, 2] -= 0.25
    other[0, 0] -= 2
    on_policy = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]]).bool()
    related_on_policy = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 0, 0, 0]]).bool()
    related = batch.related["other"].replace(logprobs={"sampler": other}, on_policy=related_on_policy)
    batch = batch.replace(logprobs={"sampler": own}, on_policy=on_policy, related={"other": related})
    metrics = average_over_steps(
        [make_updater(Probe(make_policy_term), model, microbatch_size=microbatch).accumulate_gradients(batch, True)]
    )
    assert metrics["policy/ratio_max"] == pytest.approx(math.exp(0.25), rel=1e-5)
    # 4 own tokens and 3 related ones are on-policy.
    assert metrics["policy/sampler_gap"] == pytest.approx(0.375 / 7, rel=1e-4)


def test_a_sequence_without_log_probs_of_its_sampler_has_no_ratio():
    model = build_model()
    batch = make_paired_batch(model)
    batch = batch.replace(related={"other": batch.related["other"].replace(logprobs={})})
    metrics = make_updater(Probe(make_policy_term), model).update(batch, 1)
    assert metrics["policy/ratio_max"] == pytest.approx(1, abs=1e-5)
