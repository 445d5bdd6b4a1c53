"""The critic: a new one, its heads, the weights that its backbone starts from, and its Polyak copy."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from apa_cli.errors import ConfigError
from apa_cli.models.critic import CriticModule, CriticStart, build_critic, build_value_head
from apa_cli.models.forward import TrainingModel
from apa_cli.settings import CriticInit, CriticKind, CriticSettings, HeadKind
from apa_cli.types import Critic
from tests.builders import (
    add_random_adapter,
    build_tiny_policy,
    build_value_critic,
    make_lora_settings,
    make_sequences,
)

build_policy = partial(build_tiny_policy, num_hidden_layers=2)


@pytest.fixture(params=["gpt_neox", "gpt2"])
def policy(request) -> PreTrainedModel:
    return build_policy(request.param)


@pytest.mark.parametrize("kind", list(HeadKind))
@pytest.mark.parametrize("on_trunk", [False, True])
def test_a_new_critic_returns_0_and_gets_gradients(policy, kind, on_trunk):
    critic = build_value_critic(policy, CriticKind.head if on_trunk else CriticKind.separate, kind)
    model = TrainingModel(policy, {"value": critic}, 1.0)
    tokens = make_sequences([[3, 1, 4], [1], [5, 9, 2, 6], [5, 3]], [[2, 7], [8, 2, 8, 1], [8], [4, 5, 9]])
    values = model(tokens).values["value"]
    assert not values.any()
    ((values - 1) ** 2)[tokens.mask].sum().backward()
    last = critic.head if kind is HeadKind.linear else critic.head[-1]
    assert last.weight.grad.abs().max() > 0.1
    # V = 0 at 10 tokens, each with the slope −2
    torch.testing.assert_close(last.bias.grad, torch.tensor([-20.0]), rtol=1e-5, atol=1e-6)


def test_the_mlp_head_is_h_to_2h_to_1_with_relu():
    head = build_value_head(HeadKind.mlp, 2)
    with torch.no_grad():
        head[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]))
        head[0].bias.copy_(torch.tensor([0.0, -1.0, 0.5, 0.0]))
        head[-1].weight.copy_(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
        head[-1].bias.fill_(0.25)
    # hidden 2, 3: relu(2, 2, 5.5, −2) = 2, 2, 5.5, 0: 2 + 20 + 550 + 0.25
    assert head(torch.tensor([2.0, 3.0])).tolist() == [572.25]


def test_a_critics_backbone_is_a_trainable_copy_of_its_source():
    policy, start = build_policy(seed=0), build_policy(seed=1)
    for source, expected in ((None, policy), (CriticStart(start.base_model), start)):
        critic = build_value_critic(policy, start=source)
        for parameter, original in zip(critic.backbone.parameters(), expected.base_model.parameters(), strict=True):
            assert torch.equal(parameter, original)
            assert parameter is not original
            assert parameter.requires_grad


def test_a_critic_from_a_frozen_bfloat16_source_is_trainable_and_float32():
    start = build_policy(seed=1).bfloat16().requires_grad_(False)
    critic = build_value_critic(build_policy(seed=0), start=CriticStart(start.base_model))
    assert {parameter.dtype for parameter in critic.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in critic.parameters())


def test_a_head_depends_on_its_seed_and_not_on_the_global_generator(policy):
    torch.manual_seed(1)
    one = build_value_critic(policy, CriticKind.head, HeadKind.mlp, seed=3).head[0].weight
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    again = build_value_critic(policy, CriticKind.head, HeadKind.mlp, seed=3).head[0].weight
    other = build_value_critic(policy, CriticKind.head, HeadKind.mlp, seed=4).head[0].weight
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


SETTINGS = CriticSettings(kind=CriticKind.separate, init=CriticInit.policy, head=HeadKind.linear)


def build_from_spec(policy: PreTrainedModel, spec: Critic, settings: CriticSettings = SETTINGS) -> CriticModule:
    return build_critic(policy, spec, settings, make_lora_settings(rank=0), 0, None)


def test_a_critic_on_the_trunk_has_no_backbone_whatever_the_configuration(policy):
    assert build_from_spec(policy, Critic("v")).backbone is not None
    critic = build_from_spec(policy, Critic("v", on="trunk"))
    assert critic.is_on_trunk and set(critic.state_dict()) == {"head.weight", "head.bias"}


def test_the_shape_of_a_head_is_that_of_the_critic_or_else_of_the_configuration(policy):
    mlp = replace(SETTINGS, head=HeadKind.mlp)
    shapes = {
        (settings.head, head): [tuple(p.shape) for p in build_from_spec(policy, spec, settings).parameters()]
        for settings in (SETTINGS, mlp)
        for head in (None, "linear", "mlp")
        for spec in [Critic("v", on="trunk", head=head)]
    }
    linear_shapes, mlp_shapes = [(1, 16), (1,)], [(32, 16), (32,), (1, 32), (1,)]
    assert shapes == {
        (HeadKind.linear, None): linear_shapes,
        (HeadKind.linear, "linear"): linear_shapes,
        (HeadKind.linear, "mlp"): mlp_shapes,
        (HeadKind.mlp, None): mlp_shapes,
        (HeadKind.mlp, "linear"): linear_shapes,
        (HeadKind.mlp, "mlp"): mlp_shapes,
    }


@pytest.mark.parametrize("head", ["linear", "mlp"])
@pytest.mark.parametrize("on", ["configured", "trunk"])
def test_a_new_action_critic_has_the_value_0_for_every_token(policy, on, head):
    critic = build_from_spec(policy, Critic("q", kind="action", on=on, head=head))
    model, tokens = TrainingModel(policy, {"q": critic}, 1.0), make_sequences([[3, 1, 4]], [[2, 7]])
    output = model(tokens)
    assert not output.values["q"].any()
    # logsumexp of eleven zeros
    torch.testing.assert_close(output.logsumexp["q"], torch.full((1, 2), 11.0).log(), rtol=1e-6, atol=0)
    (output.logsumexp["q"] - output.values["q"]).sum().backward()
    last = critic.head if head == "linear" else critic.head[-1]
    # two tokens, each with the slopes 1/11, less 1 for its own
    expected = torch.full((11,), 2 / 11)
    expected[[2, 7]] -= 1
    torch.testing.assert_close(last.bias.grad, expected, rtol=1e-5, atol=1e-6)


def test_names_of_a_state_critics_tensors(policy):
    model = TrainingModel(policy, {"value": build_value_critic(policy, CriticKind.head, HeadKind.mlp)}, 1.0)
    names = [name for name in model.state_dict() if not name.startswith("policy.")]
    assert names == [f"critics.value.head.{layer}.{part}" for layer in (0, 2) for part in ("weight", "bias")]


# The Polyak copy


def test_the_polyak_copy_follows_every_other_step_at_its_rate():
    policy = build_policy()
    critic = build_from_spec(policy, Critic("v", on="trunk"))
    other = build_from_spec(policy, Critic("w", on="trunk"))
    specs = [Critic("v", polyak=0.25, polyak_every=2), Critic("w")]
    model = TrainingModel(policy, {"v": critic, "w": other}, 1.0, specs)
    assert list(model.targets) == ["v"]
    assert set(model.targets.state_dict()) == {"v.head.weight", "v.head.bias"}
    copies = []
    for step, value in enumerate((4.0, 8.0, 12.0, 16.0), start=1):
        torch.nn.init.constant_(critic.head.bias, value)
        model.update_targets(step)
        copies.append(model.targets["v"].head.bias.item())
    # from 0: unchanged; 3/4 · 0 + 1/4 · 8 = 2; unchanged; 3/4 · 2 + 1/4 · 16 = 5.5
    assert copies == [0.0, 2.0, 2.0, 5.5]


def test_the_polyak_copy_of_a_separate_critic_is_a_copy_of_its_whole_network(policy):
    critic = build_value_critic(policy)
    model = TrainingModel(policy, {"value": critic}, 1.0, [Critic("value", polyak=0.5)])
    old = [parameter.detach().clone() for parameter in critic.parameters()]
    with torch.no_grad():
        for parameter in critic.parameters():
            parameter.add_(2.0)
    for copied, original in zip(model.targets["value"].parameters(), old, strict=True):
        assert torch.equal(copied, original)
    model.update_targets(1)
    for copied, original in zip(model.targets["value"].parameters(), old, strict=True):
        torch.testing.assert_close(copied.detach(), original + 1.0)
    assert not any(parameter.requires_grad for parameter in model.targets.parameters())


def test_a_critic_that_is_an_adapter_cannot_have_a_polyak_copy(policy):
    lora = make_lora_settings()
    add_random_adapter(policy, lora)
    critic = build_value_critic(policy, CriticKind.adapter, lora=lora)
    with pytest.raises(ConfigError, match=r"^critic=adapter: the critic value needs a Polyak copy.*critic=separate"):
        TrainingModel(policy, {"value": critic}, 1.0, [Critic("value", polyak=0.5)])


@pytest.mark.parametrize("kind", CriticKind)
def test_a_critic_reads_states_of_the_width_that_the_trunk_projects_to(kind):
    policy = build_tiny_policy("opt", ffn_dim=16, word_embed_proj_dim=8, do_layer_norm_before=False)  # as OPT 350M
    critic = build_value_critic(policy, kind, lora=make_lora_settings(rank=2 if kind is CriticKind.adapter else 0))
    assert critic.head.weight.shape == (1, 8)  # the blocks have 16 features
    tokens = make_sequences([[3, 1, 4], [1]], [[2, 7], [8, 2, 8]])
    values = TrainingModel(policy, {"value": critic}, 1.0)(tokens).values["value"]
    values.sum().backward()
    # The bias is added to each of the 5 tokens.
    assert float(critic.head.bias.grad) == 5 and bool(critic.head.weight.grad.abs().sum() > 0)


def test_hidden_states_that_the_output_head_does_not_read_are_one_line():
    policy = build_tiny_policy("llama")
    trunk_forward = policy.model.forward

    def forward(**inputs):
        output = trunk_forward(**inputs)
        output.hidden_states = tuple(states.unsqueeze(0) for states in output.hidden_states or ())  # as Gemma 3n's
        return output

    policy.model.forward = forward
    with pytest.raises(ConfigError, match=r"^critic.kind: head cannot read the hidden states of this llama model"):
        build_value_critic(policy, CriticKind.head)
