"""Weights spread over the processes: DDP, or FSDP2 (2304.11277), and back to whole tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel
from apa_cli.models.loading import blocks
from apa_cli.settings import Frozen


def replicated(model: TrainingModel, device: torch.device) -> nn.Module:
    """The model under DistributedDataParallel, which averages gradients over the processes."""
    from torch.nn.parallel import DistributedDataParallel

    # Buffers are constants here. torch 2.13 renamed the option.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=devices, **{option: False})


def sharded(
    model: nn.Module, blocks: Iterable[nn.Module], offloaded: bool = False, head_stays: bool = True
) -> nn.Module:
    """Spreads each of the blocks, then what is left of the model, over all processes; in place.

    `head_stays`: what is left stays whole after a forward pass, for the backward pass or for use of the output head.

    UserError for weights of two precisions in one block, which FSDP2 does not take.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    options = {"offload_policy": CPUOffloadPolicy(pin_memory=torch.cuda.is_available())} if offloaded else {}
    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        raise UserError("launch.strategy: fsdp needs all weights in one precision; with lora give model.dtype=float32")
    for block in blocks:
        fully_shard(block, **options)
    return fully_shard(model, reshard_after_forward=not head_stays, **options)


def trained_blocks(model: TrainingModel) -> Iterator[nn.Module]:
    """The blocks of the policy's trunk and of those critics that have one of their own."""
    yield from blocks(model.policy.base_model)
    for backbone in model.backbones():
        yield from blocks(backbone)


def sharded_reference(reference: PreTrainedModel, frozen: Frozen) -> PreTrainedModel:
    """The reference as `launch.frozen_placement` says."""
    if frozen is Frozen.replicated:
        return reference
    return sharded(reference, blocks(reference.base_model), frozen is Frozen.offloaded)


def sharded_reward(model: nn.Module, frozen: Frozen, ready: Callable[[], None]) -> Callable[..., Any]:
    """A reward model spread over the processes, which all call it as often; `ready` raises where one cannot.

    It may be any classifier: where no stack of blocks is found, the whole of it is gathered in each pass.
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    spread = sharded(model, stacks[0] if stacks else [], frozen is Frozen.offloaded, head_stays=False)

    def forward(**inputs: Any) -> Any:
        ready()
        return spread(**inputs)

    return forward


def whole(tensor: Tensor) -> Tensor:
    """A tensor that all processes hold a shard of, whole on each; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def placed_like(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor sharded as `like` is, or as it is where `like` is not."""
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def storage(tensor: Tensor) -> int:
    """What two names of one tensor have in common."""
    return id(tensor) if hasattr(tensor, "device_mesh") else tensor.data_ptr()


@torch.no_grad()
def refresh(copied: nn.Module, policy: nn.Module) -> None:
    """Brings every weight of the copy up to the sharded policy's."""
    for to, current in zip(copied.parameters(), policy.parameters(), strict=True):
        to.copy_(whole(current))
