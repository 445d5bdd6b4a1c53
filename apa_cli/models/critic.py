"""The critic: a backbone of its own, or the policy's trunk, and a scalar head."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.settings import HeadKind


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
    """V(s): [B, T] from the positions before each response token, computed in float32 after the backbone."""

    def __init__(self, backbone: nn.Module | None, head: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, inputs: dict[str, Tensor], length: int, trunk: Tensor | None = None) -> Tensor:
        """Values [B, length] at the last `length` positions; `trunk` [B, S, h] is used where there is no backbone."""
        hidden = trunk if self.backbone is None else self.backbone(**inputs, use_cache=False).last_hidden_state
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(hidden[:, -length:].float()).squeeze(-1)


def build_critic(
    policy: PreTrainedModel, head: HeadKind, seed: int, start: PreTrainedModel | None, on_trunk: bool
) -> Critic:
    """A critic whose backbone is a copy of `start`'s (default: the policy's), or none where it sits on the trunk."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        built = value_head(head, policy.config.hidden_size)
    if on_trunk:
        return Critic(None, built)
    backbone = copy.deepcopy((start or policy).base_model).float()
    return Critic(backbone.requires_grad_(True), built)
