"""Critics: a scalar head on a backbone, which is the critic's own or the policy's trunk."""

from __future__ import annotations

import copy
from collections.abc import Callable, ItemsView, ValuesView
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.models.lora import add_adapter
from apa_cli.models.structure import get_trunk
from apa_cli.settings import CriticKind, CriticSettings, HeadKind, LoraSettings


def build_value_head(kind: HeadKind, hidden_size: int) -> nn.Module:
    """Return a head that maps hidden states [..., h] to values [..., 1], all of which are 0 at the start.

    linear: one layer, initialized to zero. mlp: h → 2h → 1 with ReLU, as in APA's published code; the last layer is
    initialized to zero.
    """
    last = nn.Linear(hidden_size if kind is HeadKind.linear else 2 * hidden_size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if kind is HeadKind.linear:
        return last
    return nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), last)


class Critic(nn.Module):
    """V(s) at the positions before response tokens; the head is computed in float32.

    A critic without a backbone reads the policy's trunk: under the critic's own LoRA adapter `adapter`, or, if that is
    None, the hidden states of the policy itself.
    """

    backbone: PreTrainedModel | None
    head: nn.Module

    def __init__(self, backbone: PreTrainedModel | None, head: nn.Module, adapter: str | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.adapter = adapter

    @property
    def is_on_trunk(self) -> bool:
        """True if the critic reads the hidden states that the policy's own forward pass computes."""
        return self.backbone is None and self.adapter is None

    def forward(
        self, inputs: dict[str, Any], select: Callable[[Tensor], Tensor], trunk_states: Tensor | None = None
    ) -> Tensor:
        """Return the values [n] at the n positions that `select` takes from hidden states [B, S, h].

        The hidden states are the backbone's for `inputs`, or `trunk_states` if the critic has no backbone.
        """
        if self.backbone is not None:
            trunk_states = self.backbone(**inputs, use_cache=False).last_hidden_state
        assert trunk_states is not None, "a critic without a backbone needs the trunk's hidden states"
        with torch.autocast(trunk_states.device.type, enabled=False):
            return self.head(select(trunk_states).float()).squeeze(-1)


class CriticDict(nn.ModuleDict):
    """Critics by name: a ModuleDict whose values have the type Critic."""

    def __getitem__(self, name: str) -> Critic:
        return cast(Critic, super().__getitem__(name))

    def items(self) -> ItemsView[str, Critic]:
        return cast("ItemsView[str, Critic]", super().items())

    def values(self) -> ValuesView[Critic]:
        return cast("ValuesView[Critic]", super().values())


def build_critic(
    policy: PreTrainedModel,
    settings: CriticSettings,
    lora: LoraSettings,
    name: str,
    seed: int,
    source: PreTrainedModel | None,
) -> Critic:
    """Build a critic of `settings.kind`: on a copy of `source`'s trunk (None: the policy's) or on the policy's own.

    With LoRA the copy keeps its dtype and only adapters on it are trained; the policy must not have its own adapter
    yet if its trunk is copied. A critic of kind `adapter` adds its adapter to the policy. The head depends on `seed`
    alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = build_value_head(settings.head, policy.config.hidden_size)
    if settings.kind is CriticKind.head:
        return Critic(None, head)
    if settings.kind is CriticKind.adapter:
        adapter = f"critic_{name}"
        add_adapter(policy, lora, adapter, seed)
        return Critic(None, head, adapter)
    backbone = copy.deepcopy(get_trunk(source or policy))
    if lora.rank:
        add_adapter(backbone, lora, "critic", seed)
    else:
        backbone = backbone.float().requires_grad_(True)
    return Critic(backbone, head)
