"""Critics: a head on a backbone, which is the critic's own or the policy's trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, ItemsView, ValuesView
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.errors import ConfigError
from apa_cli.models.lm_head import compute_head_statistics
from apa_cli.models.lora import add_adapter
from apa_cli.models.structure import get_state_width, get_trunk
from apa_cli.settings import CriticKind, CriticSettings, HeadKind, LoraSettings
from apa_cli.types import Critic


def build_value_head(kind: HeadKind, hidden_size: int, outputs: int = 1, is_zero: bool = True) -> nn.Module:
    """Return a head that maps hidden states [..., h] to values [..., outputs]; with `is_zero` all are 0 at the start.

    linear: one layer. mlp: h → 2h → outputs with ReLU, as in APA's published code. `is_zero`: the last layer is
    initialized to zero.
    """
    last = nn.Linear(hidden_size if kind is HeadKind.linear else 2 * hidden_size, outputs)
    if is_zero:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    if kind is HeadKind.linear:
        return last
    return nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), last)


class CriticStart(NamedTuple):
    """The reward model from which a critic with a network of its own starts."""

    trunk: PreTrainedModel
    weight: Tensor | None = None
    """Weight [h] of a linear value head, the score head's; None: the head starts as without a reward model."""
    bias: float = 0.0
    """Bias of that head."""


class CriticModule(nn.Module):
    """V(s) at the positions before response tokens, or Q(s, ·) for every token; the head is computed in float32.

    A critic without a backbone reads the policy's trunk: under the critic's own LoRA adapter `adapter`, or, if that is
    None, the hidden states of the policy itself. `is_action` says that the head has an output for each token of the
    vocabulary, Q, instead of one.
    """

    backbone: PreTrainedModel | None
    head: nn.Module

    def __init__(
        self, backbone: PreTrainedModel | None, head: nn.Module, adapter: str | None = None, is_action: bool = False
    ):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.adapter = adapter
        self.is_action = is_action

    @property
    def is_on_trunk(self) -> bool:
        """True if the critic reads the hidden states that the policy's own forward pass computes."""
        return self.backbone is None and self.adapter is None

    def forward(
        self,
        inputs: dict[str, Any],
        select: Callable[[Tensor], Tensor],
        token_ids: Tensor,
        trunk_states: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return V [n], or Q at token_ids [n] and the logsumexp of Q over the vocabulary [n].

        The n positions are those that `select` takes from hidden states [B, S, h]: the backbone's for `inputs`, or
        `trunk_states` if the critic has no backbone.
        """
        if self.backbone is not None:
            trunk_states = self.backbone(**inputs, use_cache=False).last_hidden_state
        assert trunk_states is not None, "a critic without a backbone needs the trunk's hidden states"
        states = select(trunk_states)
        if not self.is_action:
            return self.evaluate_states(states), None
        *body, last = self.head if isinstance(self.head, nn.Sequential) else [self.head]
        with torch.autocast(states.device.type, enabled=False):
            states = states.float()
            for layer in body:
                states = layer(states)
            last = cast(nn.Linear, last)
            statistics = compute_head_statistics(states, last.weight, last.bias, token_ids, temperature=1.0)
        return statistics.chosen, statistics.logsumexp

    def evaluate_states(self, states: Tensor) -> Tensor:
        """Return V [n], or Q for every token of the vocabulary [n, V], from hidden states [n, h]."""
        with torch.autocast(states.device.type, enabled=False):
            outputs = self.head(states.float())
        return outputs if self.is_action else outputs.squeeze(-1)


class CriticDict(nn.ModuleDict):
    """Critics by name: a ModuleDict whose values have the type CriticModule."""

    def __getitem__(self, name: str) -> CriticModule:
        return cast(CriticModule, super().__getitem__(name))

    def items(self) -> ItemsView[str, CriticModule]:
        return cast("ItemsView[str, CriticModule]", super().items())

    def values(self) -> ValuesView[CriticModule]:
        return cast("ValuesView[CriticModule]", super().values())


def build_critic(
    policy: PreTrainedModel,
    spec: Critic,
    settings: CriticSettings,
    lora: LoraSettings,
    seed: int,
    start: CriticStart | None,
) -> CriticModule:
    """Build the critic `spec` on a copy of `start`'s trunk (None: the policy's) or on the policy's own.

    `settings.kind` says which, unless the critic must be on the policy's trunk. With LoRA the copy keeps its dtype and
    only adapters on it are trained; the policy must not have its own adapter yet if its trunk is copied. A critic of
    kind `adapter` adds its adapter to the policy. The head depends on `seed` alone, but a linear head of a state critic
    starts as `start`'s score head, so that V is the reward model's score of the text so far.
    """
    kind = CriticKind.head if spec.on == "trunk" else settings.kind
    head_kind = settings.head if spec.head is None else HeadKind(spec.head)
    is_action = spec.kind == "action"
    outputs = cast(nn.Linear, policy.get_output_embeddings()).out_features if is_action else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_value_head(head_kind, get_state_width(policy), outputs, is_zero=spec.init == "zero")
    if kind is CriticKind.head:
        check_hidden_states(policy)
        return CriticModule(None, head, is_action=is_action)
    if kind is CriticKind.adapter:
        adapter = f"critic_{spec.name}"
        add_adapter(policy, lora, adapter, seed, with_head=False)
        return CriticModule(None, head, adapter, is_action)
    backbone = copy.deepcopy(start.trunk if start is not None else get_trunk(policy))
    if start is not None and start.weight is not None and isinstance(head, nn.Linear) and not is_action:
        with torch.no_grad():
            head.weight.copy_(start.weight)
            head.bias.fill_(start.bias)
    if lora.rank:
        add_adapter(backbone, lora, "critic", seed, with_head=False)
    else:
        backbone = backbone.float().requires_grad_(True)
    return CriticModule(backbone, head, is_action=is_action)


@torch.no_grad()
def check_hidden_states(policy: PreTrainedModel) -> None:
    """Raise ConfigError unless the policy's last hidden states, [B, S, h], are what its output head reads.

    Gemma 3n's have a further dimension. A model without weights, of which only the size is asked, is not checked.
    """
    if policy.device.type == "meta":
        return
    ids = torch.zeros(1, 1, dtype=torch.int64, device=policy.device)
    states = policy(input_ids=ids, use_cache=False, output_hidden_states=True, logits_to_keep=1).hidden_states[-1]
    if states.shape != (1, 1, get_state_width(policy)):
        raise ConfigError(
            f"critic.kind: head cannot read the hidden states of this {policy.config.get_text_config().model_type} "
            "model; give critic=separate"
        )
