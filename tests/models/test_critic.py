"""The critic: a new one, its heads, and the weights that its backbone starts from."""

from functools import partial

import pytest
import torch
from transformers import PreTrainedModel

from apa_cli.models.critic import build_value_head
from apa_cli.models.forward import TrainingModel
from apa_cli.settings import CriticKind, HeadKind
from tests.builders import build_tiny_policy, build_value_critic, make_sequences

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
    for source, expected in ((None, policy), (start, start)):
        critic = build_value_critic(policy, source=source)
        for parameter, original in zip(critic.backbone.parameters(), expected.base_model.parameters(), strict=True):
            assert torch.equal(parameter, original)
            assert parameter is not original
            assert parameter.requires_grad


def test_a_critic_from_a_frozen_bfloat16_source_is_trainable_and_float32():
    start = build_policy(seed=1).bfloat16().requires_grad_(False)
    critic = build_value_critic(build_policy(seed=0), source=start)
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
