"""Forward passes: the position that predicts each token, padding, temperature, critics, related sequences."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from apa_cli.kl import exact_kl
from apa_cli.models.critic import CriticModule, build_value_head
from apa_cli.models.forward import (
    TrainingModel,
    autocast_to,
    compute_head_inputs,
    compute_response_logits,
    compute_response_logprobs,
    pad_to_mask,
)
from apa_cli.settings import CriticKind, DType, HeadKind
from apa_cli.types import Critic, Sequences
from tests.builders import (
    add_random_adapter,
    build_tiny_policy,
    build_value_critic,
    make_batch,
    make_lora_settings,
    make_padded_inputs,
    make_rollout,
    make_sequences,
)

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


def build_random_head(kind: HeadKind, outputs: int = 1, seed: int = 5) -> torch.nn.Module:
    """Return a head whose values are not 0."""
    torch.manual_seed(seed)
    head = build_value_head(kind, 16, outputs)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return head


def build_random_critic(kind: HeadKind = HeadKind.linear) -> CriticModule:
    """Return a critic with a backbone of its own, whose values are not 0."""
    return CriticModule(build_policy(seed=1).base_model, build_random_head(kind))


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
    model = TrainingModel(policy, {"value": CriticModule(backbone.base_model, head)}, 1.0)
    rows = [head(compute_unpadded(backbone, p, r)[1]).squeeze(-1) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    close(model(make_tokens()).values["value"], stack_rows(rows, 4))
    close(model(make_tokens(left=2, right=3), with_policy=False).values["value"][:, :4], stack_rows(rows, 4))


@pytest.mark.parametrize("kind", list(HeadKind))
def test_a_head_on_the_trunk_reads_the_policys_last_hidden_state(policy, kind):
    head = build_random_head(kind)
    model = TrainingModel(policy, {"value": CriticModule(None, head)}, 1.0)
    rows = [head(compute_unpadded(policy, p, r)[1]).squeeze(-1) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    close(model(make_tokens()).values["value"], stack_rows(rows, 4))
    close(model(make_tokens(left=2, right=3), with_policy=False).values["value"][:, :4], stack_rows(rows, 4))


def test_the_first_value_depends_on_the_prompt_alone(policy):
    model = TrainingModel(policy, {"value": CriticModule(None, build_random_head(HeadKind.linear))}, 1.0)
    one, other = make_sequences([[3, 1, 4]], [[2]]), make_sequences([[3, 1, 4]], [[7, 5, 9]])
    close(model(one).values["value"][0, 0], model(other).values["value"][0, 0])
    assert abs(float((model(other).values["value"][0, 1] - model(other).values["value"][0, 0]).detach())) > 1e-3


def test_values_of_several_critics_are_returned_by_name(policy):
    heads = {name: build_random_head(HeadKind.linear) for name in ("learner", "guide")}
    torch.nn.init.constant_(heads["guide"].bias, 3.0)
    torch.nn.init.constant_(heads["learner"].bias, 1.0)
    model = TrainingModel(policy, {name: CriticModule(None, head) for name, head in heads.items()}, 1.0)
    values, mask = model(make_tokens()).values, make_tokens().mask
    close((values["guide"] - values["learner"])[mask], torch.full((10,), 2.0))


def test_critics_with_and_without_a_backbone_can_be_combined(policy):
    separate = build_random_critic()
    trunk = CriticModule(None, build_random_head(HeadKind.linear))
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
    model = TrainingModel(policy, {"value": CriticModule(None, head)}, 1.0)
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
    on_trunk = TrainingModel(policy, {"value": CriticModule(None, build_random_head(HeadKind.linear))}, 1.0)
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


# Critics of actions and Polyak copies


@pytest.mark.parametrize("on_trunk", [False, True])
@pytest.mark.parametrize("kind", list(HeadKind))
def test_the_value_of_an_action_is_its_tokens_output_of_the_head(policy, kind, on_trunk):
    backbone, head = policy if on_trunk else build_policy(seed=1), build_random_head(kind, 11)
    critic = CriticModule(None if on_trunk else backbone.base_model, head, is_action=True)
    model = TrainingModel(policy, {"q": critic}, 0.5)
    rows = [head(compute_unpadded(backbone, p, r)[1]) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    chosen = [row[range(len(r)), r] for row, r in zip(rows, RESPONSES, strict=True)]
    for output in (model(make_tokens()), model(make_tokens(left=2, right=3), with_policy=False)):
        close(output.values["q"][:, :4], stack_rows(chosen, 4))
        close(output.logsumexp["q"][:, :4], stack_rows([row.exp().sum(-1).log() for row in rows], 4))
        assert not output.values["q"][:, 4:].any() and not output.logsumexp["q"][:, 4:].any()


def test_the_gradient_of_an_action_critics_cross_entropy_is_that_of_its_logits(policy):
    head = build_random_head(HeadKind.mlp, 11)
    model, tokens = TrainingModel(policy, {"q": CriticModule(None, head, is_action=True)}, 1.0), make_tokens()
    output = model(tokens)
    (output.logsumexp["q"] - output.values["q"]).sum().backward()
    gradients = [parameter.grad.clone() for parameter in head.parameters()]
    model.zero_grad()
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = head(compute_unpadded(policy, prompt, response)[1])
        torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum").backward()
    close(gradients, [parameter.grad for parameter in head.parameters()], rtol=1e-4)
    assert policy.get_input_embeddings().weight.grad is None or not policy.get_input_embeddings().weight.grad.any()


def test_only_the_critics_and_copies_that_are_named_are_computed(policy):
    critics = {
        "v": CriticModule(None, build_random_head(HeadKind.linear)),
        "q": CriticModule(None, build_random_head(HeadKind.linear, 11), is_action=True),
    }
    model = TrainingModel(policy, critics, 1.0, [Critic("v", polyak=0.1), Critic("q", kind="action", polyak=0.1)])
    everything = model(make_tokens())
    assert list(everything.values) == ["v", "q", "v/target", "q/target"]
    assert list(everything.logsumexp) == ["q", "q/target"]
    output = model(make_tokens(), critics=("q/target", "v"))
    assert list(output.values) == ["v", "q/target"] and list(output.logsumexp) == ["q/target"]
    assert list(model(make_tokens(), critics=()).values) == []


def test_a_polyak_copy_has_the_critics_first_values_and_no_gradient(policy):
    critics = {
        "v": build_random_critic(),
        "q": CriticModule(None, build_random_head(HeadKind.mlp, 11), is_action=True),
    }
    specs = [Critic("v", polyak=0.1), Critic("q", kind="action", polyak=0.1)]
    model, tokens = TrainingModel(policy, critics, 1.0, specs), make_tokens()
    before = model(tokens)
    for name in critics:
        assert torch.equal(before.values[f"{name}/target"], before.values[name])
        assert before.values[name].requires_grad and not before.values[f"{name}/target"].requires_grad
    assert not before.logsumexp["q/target"].requires_grad
    with torch.no_grad():
        for parameter in model.critics.parameters():
            parameter.add_(0.1)
    after = model(tokens)
    for name in critics:
        assert torch.equal(after.values[f"{name}/target"], before.values[f"{name}/target"])
        assert not torch.equal(after.values[name], before.values[name])
    trained = {id(p) for p in (*model.policy_parameters(), *model.critic_parameters())}
    assert not trained & {id(p) for p in model.targets.parameters()}
    assert all(not p.requires_grad for p in model.targets.parameters())
    assert len(model.critic_backbones()) == 2


def test_the_parameters_of_each_output(policy):
    lora = make_lora_settings()
    add_random_adapter(policy, lora)
    critics = {
        "value": build_value_critic(policy, CriticKind.adapter, lora=lora),
        "own": build_random_critic(),
        "q": CriticModule(None, build_random_head(HeadKind.mlp, 11), is_action=True),
    }
    model = TrainingModel(policy, critics, 1.0, [Critic("own", polyak=0.5)])
    parts = {name: model.list_output_parameters(name) for name in ("policy", *critics)}
    ids = [id(parameter) for part in parts.values() for parameter in part]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(p) for p in (*model.policy_parameters(), *model.critic_parameters())}
    adapter = [p for name, p in policy.named_parameters() if ".critic_value." in name]
    assert [id(p) for p in parts["value"]] == [id(p) for p in (*adapter, *critics["value"].head.parameters())]
    assert [id(p) for p in parts["own"]] == [id(p) for p in critics["own"].parameters()]
    assert [id(p) for p in parts["q"]] == [id(p) for p in critics["q"].head.parameters()]
    assert [id(p) for p in parts["policy"]] == [id(p) for p in model.policy_parameters()]


# Related sequences


@pytest.mark.parametrize("make", [make_batch, lambda tokens, **fields: make_rollout(**vars(tokens), **fields)])
def test_the_outputs_for_related_sequences_are_those_of_passes_of_their_own(make, policy):
    related = {
        "rejected": make_sequences([[4], [2, 3, 9, 8, 7], [5, 9], [6]], [[9], [1, 1, 4], [8, 3], [2]]),
        "longer": make_sequences([[1], [2], [3], [4]], [[5, 6, 7, 8, 9], [5], [6], [7]], left=2),
    }
    critics = {
        "value": build_random_critic(),
        "q": CriticModule(None, build_random_head(HeadKind.linear, 11), is_action=True),
    }
    model, tokens = TrainingModel(policy, critics, 0.7), make_tokens()
    both = dict.fromkeys(related, ("reference", "value", "q"))
    output = model(make(tokens, related=related), entropy=True, mean_logprob=True, related_critics=both)
    assert list(output.related) == ["rejected", "longer"]
    for part, sequences in ((output, tokens), *((output.related[name], related[name]) for name in related)):
        alone = model(sequences, entropy=True, mean_logprob=True)
        for field in ("logprobs", "values", "logsumexp", "entropy", "mean_logprob"):
            close(getattr(part, field), getattr(alone, field))
        assert alone.related == {} and part.logprobs.shape == sequences.mask.shape
    q_only = model(make(tokens, related=related), critics=["q"], related_critics=both).related["longer"]
    assert list(q_only.values) == ["q"]
    some = model(make(tokens, related=related), related_critics={"longer": ("value",)})
    assert list(some.values) == ["value", "q"]
    assert {name: list(part.values) for name, part in some.related.items()} == {"rejected": [], "longer": ["value"]}
    (gradient,) = torch.autograd.grad(output.related["longer"].logprobs.sum(), policy.get_input_embeddings().weight)
    assert gradient[4].any()  # a prompt token of that sequence


# Responses without a token


def make_empty(width: int) -> Sequences:
    """Return two prompts with responses of `width` columns, none of which counts."""
    tokens, none = make_sequences([[3, 1, 4], [5]], [[2, 7], [8]]), torch.zeros(2, width, dtype=torch.bool)
    return replace(tokens, response_ids=torch.full((2, width), 6), mask=none, on_policy=none)


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "llama", "granite"])
@pytest.mark.parametrize("width", [0, 1, 3])
def test_rows_without_a_response_token_give_zeros_and_gradients_of_0(width, kind):
    policy, tokens = build_policy(kind), make_empty(width)
    critics = {
        "own": build_random_critic(),
        "v": CriticModule(None, build_random_head(HeadKind.mlp)),
        "q": CriticModule(None, build_random_head(HeadKind.mlp, 11), is_action=True),
    }
    model = TrainingModel(policy, critics, 0.7, [Critic("v", polyak=0.1)])
    output = model(make_batch(tokens, related={"other": tokens}), entropy=True, mean_logprob=True)
    total = torch.zeros(())
    for part in (output, output.related["other"]):
        tensors = [part.logprobs, part.entropy, part.mean_logprob, *part.values.values(), *part.logsumexp.values()]
        assert all(x.shape == (2, width) and not x.any() for x in tensors)
        total = total + sum(x.sum() for x in tensors)
    total.backward()
    trained = [*model.policy_parameters(), *model.critic_parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in trained)
    assert not compute_response_logprobs(policy, tokens, 1.0).any()
    assert len(compute_head_inputs(policy, make_padded_inputs(tokens))[0]) == 0


def test_a_row_without_a_response_token_changes_no_other_row(policy):
    model = TrainingModel(policy, {"value": build_random_critic()}, 1.0)
    full, more = make_tokens(), make_sequences([*PROMPTS, [7, 7, 7]], [*RESPONSES, []])
    output, expected = model(more, entropy=True), model(full, entropy=True)
    for one, other in (
        (output.logprobs, expected.logprobs),
        (output.values["value"], expected.values["value"]),
        (output.entropy, expected.entropy),
    ):
        close(one[:4], other)
        assert not one[4].any()
    output.logprobs.sum().backward()
    gradients = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    expected.logprobs.sum().backward()
    close(gradients, [parameter.grad for parameter in policy.parameters()], rtol=1e-4, atol=1e-5)
