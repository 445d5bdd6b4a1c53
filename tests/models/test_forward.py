"""Forward passes: the position that predicts each token, padding, temperature, critics."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.kl import exact_kl
from apa_cli.models.critic import Critic, build_value_head
from apa_cli.models.forward import (
    TrainingModel,
    autocast_to,
    compute_response_logits,
    compute_response_logprobs,
    pad_to_mask,
)
from apa_cli.settings import DType, HeadKind
from apa_cli.types import Sequences
from tests.builders import build_tiny_policy, build_value_critic, make_padded_inputs, make_sequences

# a forward pass in another shape adds its float32 terms in another order
close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-6)

build_policy = partial(build_tiny_policy, num_hidden_layers=2)

PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6], [5, 3]]
RESPONSES = [[2, 7], [8, 2, 8, 1], [8], [4, 5, 9]]


@pytest.fixture(params=["gpt_neox", "gpt2"])
def policy(request) -> PreTrainedModel:
    """GPT-NeoX with relative positions, and GPT-2 with absolute ones."""
    return build_policy(request.param)


def make_tokens(left: int = 0, right: int = 0, junk: int = 0) -> Sequences:
    """Return PROMPTS and RESPONSES with `left` and `right` further columns of padding, filled with `junk`."""
    return make_sequences(PROMPTS, RESPONSES, left, right, junk)


@torch.no_grad()
def compute_unpadded(policy: PreTrainedModel, prompt: list[int], response: list[int]) -> tuple[Tensor, Tensor]:
    """Return log-probs [T] and last hidden states [T, h] of one response, without padding, index by index."""
    ids = torch.tensor([prompt + response])
    distribution = policy(input_ids=ids).logits[0].log_softmax(-1)
    hidden = policy.base_model(input_ids=ids).last_hidden_state[0]
    before = [len(prompt) - 1 + t for t in range(len(response))]
    logprobs = torch.stack([distribution[i, token] for i, token in zip(before, response, strict=True)])
    return logprobs, hidden[before]


def stack_rows(rows: list[Tensor], width: int) -> Tensor:
    return torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in rows])


def build_random_head(kind: HeadKind) -> torch.nn.Module:
    """Return a head whose values are not 0."""
    torch.manual_seed(5)
    head = build_value_head(kind, 16)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def build_random_critic(kind: HeadKind = HeadKind.linear) -> Critic:
    """Return a critic with a backbone of its own, whose values are not 0."""
    return Critic(build_policy(seed=1).base_model, build_random_head(kind))


# Model inputs


def test_inputs_omit_the_last_response_token_and_positions_skip_padding():
    batch = make_sequences([[3, 1], [5]], [[2, 7, 8], [4]])
    rows = make_padded_inputs(batch)
    assert rows.input_ids.tolist() == [[3, 1, 2, 7], [0, 5, 4, 0]]
    # padding on the right is behind every token that counts, so it may be attended to
    assert rows.attention_mask.tolist() == [[1, 1, 1, 1], [0, 1, 1, 1]]
    assert rows.position_ids.tolist() == [[0, 1, 2, 3], [0, 0, 1, 2]]
    assert rows.response_ids.tolist() == [[2, 7, 8], [4, 0, 0]]


def test_columns_that_are_padding_in_every_row_are_removed():
    batch = make_sequences([[3, 1], [5]], [[2, 7], [4]], left=3, right=2, junk=6)
    rows = make_padded_inputs(batch)
    assert rows.input_ids.tolist() == [[3, 1, 2], [6, 5, 4]]
    assert rows.attention_mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert rows.position_ids.tolist() == [[0, 1, 2], [0, 0, 1]]
    assert rows.response_ids.tolist() == [[2, 7], [4, 6]]


def test_log_probs_of_a_batch_without_response_tokens_are_0(policy):
    batch = make_sequences([[3, 1]], [[2, 7]])
    batch = replace(batch, mask=torch.zeros_like(batch.mask))
    assert not compute_response_logprobs(policy, batch, 1.0).any()


def test_pad_to_mask_appends_columns_and_zeroes_what_is_outside_the_mask():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.tensor([[1.0, 2.0], [3.0, float("nan")]], dtype=torch.float64)
    wide = pad_to_mask(x, mask)
    assert wide.dtype == torch.float32
    assert wide.tolist() == [[1.0, 2.0, 0.0], [3.0, 0.0, 0.0]]


# Log-probs


def test_each_response_token_is_predicted_from_the_position_before_it(policy):
    expected = stack_rows([compute_unpadded(policy, p, r)[0] for p, r in zip(PROMPTS, RESPONSES, strict=True)], 4)
    close(compute_response_logprobs(policy, make_tokens(), 1.0), expected)
    close(TrainingModel(policy, {}, 1.0)(make_tokens()).logprobs, expected)


def test_the_first_token_is_predicted_from_the_last_prompt_token(policy):
    distribution = policy(input_ids=torch.tensor([[3, 1, 4]])).logits[0, -1].log_softmax(-1)
    for token in range(11):
        logprobs = compute_response_logprobs(policy, make_sequences([[3, 1, 4]], [[token]]), 1.0)
        close(logprobs, distribution[token].reshape(1, 1))


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 2), (4, 5)])
@pytest.mark.parametrize("junk", [0, 7])
def test_padding_and_its_content_change_nothing(policy, left, right, junk):
    model = TrainingModel(policy, {"value": build_random_critic()}, 1.0)
    plain, padded = model(make_tokens()), model(make_tokens(left=left, right=right, junk=junk))
    close(padded.logprobs[:, :4], plain.logprobs)
    close(padded.values["value"][:, :4], plain.values["value"])
    assert not padded.logprobs[:, 4:].any()
    assert not padded.values["value"][:, 4:].any()


def test_outside_the_mask_log_probs_and_values_are_0(policy):
    model = TrainingModel(policy, {"value": build_random_critic()}, 1.0)
    output, mask = model(make_tokens()), make_tokens().mask
    assert not output.logprobs[~mask].any()
    assert not output.values["value"][~mask].any()
    assert (output.logprobs[mask] < 0).all()
    assert output.values["value"][mask].all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits_before_normalisation(policy, temperature):
    logits = policy(input_ids=torch.tensor([[3, 1, 4, 2]])).logits[0, 2:4]
    expected = (logits / temperature).log_softmax(-1)[[0, 1], [2, 7]].unsqueeze(0)
    batch = make_sequences([[3, 1, 4]], [[2, 7]])
    close(compute_response_logprobs(policy, batch, temperature), expected)
    close(TrainingModel(policy, {}, temperature)(batch).logprobs, expected)
    rows = make_padded_inputs(batch)
    close(compute_response_logits(policy, rows, temperature), (logits / temperature).unsqueeze(0))


@torch.no_grad()
def test_low_precision_logits_are_divided_in_float32():
    policy, batch = build_policy().bfloat16(), make_sequences([[3, 1, 4]], [[2, 7]])
    policy.set_attn_implementation("eager")  # sdpa is computed in float32 if that is faster
    low = policy(input_ids=torch.tensor([[3, 1, 4, 2]])).logits[:, 2:4]
    assert low.dtype == torch.bfloat16
    rows = make_padded_inputs(batch)
    torch.testing.assert_close(compute_response_logits(policy, rows, 0.7), low.float() / 0.7, rtol=0, atol=0)
    assert compute_response_logits(policy, rows, 1.0).dtype == torch.float32
    logprobs = (low.float() / 0.7).log_softmax(-1)[0, [0, 1], [2, 7]].unsqueeze(0)
    close(TrainingModel(policy, {}, 0.7)(batch).logprobs, logprobs, rtol=1e-6)


@torch.no_grad()
def test_kl_is_0_to_the_same_policy_and_positive_to_another(policy):
    batch = make_tokens()
    rows = make_padded_inputs(batch)
    logits = compute_response_logits(policy, rows, 1.0)
    assert float(exact_kl(logits, compute_response_logits(policy, rows, 1.0)).abs().max()) < 1e-6
    assert float(exact_kl(logits, compute_response_logits(build_policy(seed=1), rows, 1.0))[batch.mask].min()) > 0.01


def test_bfloat16_outputs_and_gradients_are_float32_and_near_the_exact_ones(policy):
    batch, cpu = make_tokens(), torch.device("cpu")
    model = TrainingModel(policy, {"value": build_random_critic(HeadKind.mlp)}, 1.0)
    exact = model(batch)
    with autocast_to(cpu, DType.bfloat16):
        rough = model(batch)
    (rough.logprobs.sum() + rough.values["value"].sum()).backward()
    assert {parameter.grad.dtype for parameter in model.parameters() if parameter.grad is not None} == {torch.float32}
    for low, high in ((rough.logprobs, exact.logprobs), (rough.values["value"], exact.values["value"])):
        assert low.dtype == torch.float32
        gap = float((low - high).detach().abs().max())
        assert 1e-5 < gap < 0.2  # eight bits of mantissa in a layer's sums
    with autocast_to(cpu, DType.float32):
        close(model(batch).logprobs, exact.logprobs)


# The critic


@pytest.mark.parametrize("kind", list(HeadKind))
def test_the_value_of_a_state_is_read_at_the_position_that_predicts_its_token(policy, kind):
    backbone, head = build_policy(seed=1), build_random_head(kind)
    model = TrainingModel(policy, {"value": Critic(backbone.base_model, head)}, 1.0)
    rows = [head(compute_unpadded(backbone, p, r)[1]).squeeze(-1) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    close(model(make_tokens()).values["value"], stack_rows(rows, 4))
    close(model(make_tokens(left=2, right=3), with_policy=False).values["value"][:, :4], stack_rows(rows, 4))


@pytest.mark.parametrize("kind", list(HeadKind))
def test_a_head_on_the_trunk_reads_the_policys_last_hidden_state(policy, kind):
    head = build_random_head(kind)
    model = TrainingModel(policy, {"value": Critic(None, head)}, 1.0)
    rows = [head(compute_unpadded(policy, p, r)[1]).squeeze(-1) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    close(model(make_tokens()).values["value"], stack_rows(rows, 4))
    close(model(make_tokens(left=2, right=3), with_policy=False).values["value"][:, :4], stack_rows(rows, 4))


def test_the_first_value_depends_on_the_prompt_alone(policy):
    model = TrainingModel(policy, {"value": Critic(None, build_random_head(HeadKind.linear))}, 1.0)
    one, other = make_sequences([[3, 1, 4]], [[2]]), make_sequences([[3, 1, 4]], [[7, 5, 9]])
    close(model(one).values["value"][0, 0], model(other).values["value"][0, 0])
    assert abs(float((model(other).values["value"][0, 1] - model(other).values["value"][0, 0]).detach())) > 1e-3


def test_values_of_several_critics_are_returned_by_name(policy):
    heads = {name: build_random_head(HeadKind.linear) for name in ("learner", "guide")}
    torch.nn.init.constant_(heads["guide"].bias, 3.0)
    torch.nn.init.constant_(heads["learner"].bias, 1.0)
    model = TrainingModel(policy, {name: Critic(None, head) for name, head in heads.items()}, 1.0)
    values, mask = model(make_tokens()).values, make_tokens().mask
    close((values["guide"] - values["learner"])[mask], torch.full((10,), 2.0))


def test_critics_with_and_without_a_backbone_can_be_combined(policy):
    separate = build_random_critic()
    trunk = Critic(None, build_random_head(HeadKind.linear))
    both = TrainingModel(policy, {"separate": separate, "trunk": trunk}, 1.0)
    expected = {
        "separate": TrainingModel(policy, {"separate": separate}, 1.0)(make_tokens()).values["separate"],
        "trunk": TrainingModel(policy, {"trunk": trunk}, 1.0)(make_tokens()).values["trunk"],
    }
    for values in (both(make_tokens()).values, both(make_tokens(), with_policy=False).values):
        close(dict(values), expected)


@torch.no_grad()
def test_a_head_computes_in_float32_on_a_bfloat16_trunk():
    policy, head = build_policy().bfloat16(), build_random_head(HeadKind.linear)
    policy.set_attn_implementation("eager")  # sdpa is computed in float32 if that is faster
    hidden = policy.base_model(input_ids=torch.tensor([[3, 1, 4]])).last_hidden_state[:, -1:]
    assert hidden.dtype == torch.bfloat16
    model = TrainingModel(policy, {"value": Critic(None, head)}, 1.0)
    values = model(make_sequences([[3, 1, 4]], [[2]])).values["value"]
    close(values, head(hidden.float()).squeeze(-1), rtol=1e-6)


def test_only_a_head_on_the_trunk_sends_gradients_into_the_policy(policy):
    separate = TrainingModel(policy, {"value": build_random_critic()}, 1.0)
    separate(make_tokens()).values["value"].sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in separate.policy_parameters())
    assert any(
        parameter.grad.any()
        for parameter in separate.critics["value"].backbone.parameters()
        if parameter.grad is not None
    )
    on_trunk = TrainingModel(policy, {"value": Critic(None, build_random_head(HeadKind.linear))}, 1.0)
    on_trunk(make_tokens()).values["value"].sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in policy.base_model.parameters())


def test_each_trained_parameter_belongs_to_either_policy_or_critics(policy):
    model = TrainingModel(policy, {"value": build_value_critic(policy)}, 1.0)
    of_policy = {id(parameter) for parameter in model.policy_parameters()}
    of_critic = {id(parameter) for parameter in model.critic_parameters()}
    assert of_policy == {id(parameter) for parameter in policy.parameters()}
    assert of_critic == {id(parameter) for parameter in model.critics.parameters()}
    assert not of_policy & of_critic
    policy.get_input_embeddings().requires_grad_(False)
    assert len(model.policy_parameters()) == len(of_policy) - 1
