"""The critic: a backbone of its own, or the policy's trunk, and a scalar head."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.models.lora import add_adapter
from apa_cli.settings import CriticKind, CriticSettings, HeadKind, LoraSettings


def value_head(kind: HeadKind, hidden_size: int) -> nn.Module:
    """Hidden state [..., h] → value [..., 1], 0 at the start.

    linear: one layer, zero. mlp: h → 2h → 1 with ReLU as published; its last layer starts at zero too.
    """
    last = nn.Linear(hidden_size if kind is HeadKind.linear else 2 * hidden_size, 1)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    if kind is HeadKind.linear:
        return last
    return nn.Sequential(nn.Linear(hidden_size, 2 * hidden_size), nn.ReLU(), last)


class Critic(nn.Module):
    """V(s) at the positions before response tokens, computed in float32 after the backbone.

    Without a backbone of its own it reads the policy's trunk: as the policy has it, or under `adapter`.
    """

    def __init__(self, backbone: nn.Module | None, head: nn.Module, adapter: str | None = None):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.adapter = adapter

    @property
    def on_trunk(self) -> bool:
        """Whether it reads the hidden states that the policy's own forward pass computes."""
        return self.backbone is None and self.adapter is None

    def forward(self, inputs: dict[str, Any], read: Callable[[Tensor], Tensor], trunk: Tensor | None = None) -> Tensor:
        """Values [n] of those n positions that `read` picks out of hidden states [B, S, h].

        The states are those of its backbone for the inputs, or where it has none `trunk`.
        """
        hidden = trunk if self.backbone is None else self.backbone(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(read(hidden).float()).squeeze(-1)


def build_critic(
    policy: PreTrainedModel,
    settings: CriticSettings,
    lora: LoraSettings,
    name: str,
    seed: int,
    start: PreTrainedModel | None,
) -> Critic:
    """A critic as `critic.kind` says: on a copy of `start`'s trunk (default: the policy's), or on the policy's own.

    With LoRA the copy keeps its dtype and only adapters on it are trained; the policy may not have its own adapter
    yet where its trunk is copied. An adapter on the policy's base is added to the policy.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = value_head(settings.head, policy.config.hidden_size)
    if settings.kind is CriticKind.head:
        return Critic(None, head)
    if settings.kind is CriticKind.adapter:
        adapter = f"critic_{name}"
        add_adapter(policy, lora, adapter, seed)
        return Critic(None, head, adapter)
    backbone = copy.deepcopy((start or policy).base_model)
    if lora.rank:
        add_adapter(backbone, lora, "critic", seed)
    else:
        backbone = backbone.float().requires_grad_(True)
    return Critic(backbone, head)
