"""Distribution of a model over ranks by DDP or FSDP2 (PyTorch FSDP, 2304.11277), and gathering of sharded tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from apa_cli.errors import UserError
from apa_cli.models.forward import TrainingModel
from apa_cli.models.structure import find_blocks, get_trunk
from apa_cli.settings import FrozenPlacement

M = TypeVar("M", bound=nn.Module)


def replicate_model(model: TrainingModel, device: torch.device) -> nn.Module:
    """Wrap the model in DistributedDataParallel, which averages gradients over the ranks."""
    from torch.nn.parallel import DistributedDataParallel

    # Buffers are constant, so they need no broadcast; torch 2.13 renamed the option.
    parameters = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in parameters else "broadcast_buffers"
    options: dict[str, Any] = {option: False, "device_ids": [device.index] if device.type == "cuda" else None}
    return DistributedDataParallel(model, **options)


def shard_model(model: M, blocks: Iterable[nn.Module], is_offloaded: bool = False, keep_gathered: bool = True) -> M:
    """Shard each of the blocks, then the rest of the model, over all ranks, in place.

    With `keep_gathered` the rest stays gathered after a forward pass, for the backward pass or the output head.
    `is_offloaded` keeps the shards in CPU memory. Raise UserError if the weights have several dtypes, which FSDP2 does
    not support in one group.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    if len({parameter.dtype for parameter in model.parameters()}) > 1:
        raise UserError("launch.strategy: fsdp needs all weights in one dtype; with lora give model.dtype=float32")
    options: dict[str, Any] = {}
    if is_offloaded:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=torch.cuda.is_available())
    for block in blocks:
        fully_shard(block, **options)
    fully_shard(model, reshard_after_forward=not keep_gathered, **options)
    return model


def find_trained_blocks(model: TrainingModel) -> Iterator[nn.Module]:
    """Yield the blocks of the policy's trunk and of the critics' backbones."""
    yield from find_blocks(get_trunk(model.policy))
    for backbone in model.critic_backbones():
        yield from find_blocks(backbone)


def shard_reference(reference: PreTrainedModel, frozen: FrozenPlacement) -> PreTrainedModel:
    """Return the reference placed as `launch.frozen_placement` says: whole, sharded, or sharded in CPU memory."""
    if frozen is FrozenPlacement.replicated:
        return reference
    return shard_model(reference, find_blocks(get_trunk(reference)), frozen is FrozenPlacement.offloaded)


def shard_reward_model(model: nn.Module, frozen: FrozenPlacement, ready: Callable[[], None]) -> Callable[..., Any]:
    """Shard a reward model over the ranks and return its forward pass, which all ranks must call equally often.

    `ready` is called before each pass; it raises on every rank if a rank has failed. The model may be any classifier:
    if no stack of blocks is found, each pass gathers the whole model.
    """
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    stacks = [part for part in model.modules() if isinstance(part, nn.ModuleList) and len(part) == depth]
    is_offloaded = frozen is FrozenPlacement.offloaded
    shard_model(model, stacks[0] if stacks else [], is_offloaded, keep_gathered=False)

    def forward(**inputs: Any) -> Any:
        ready()
        return model(**inputs)

    return forward


def gather_full_tensor(tensor: Tensor) -> Tensor:
    """Return a sharded tensor gathered, which every rank must call, and any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def distribute_like(value: Tensor, like: Tensor) -> Tensor:
    """Return a full tensor sharded like `like`; unchanged if `like` is not sharded."""
    if not isinstance(like, DTensor):
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def get_storage_key(tensor: Tensor) -> int:
    """Return a number that is equal for tied tensors: the address of their data, or of their object if sharded."""
    return id(tensor) if isinstance(tensor, DTensor) else tensor.data_ptr()


@torch.no_grad()
def copy_gathered_weights(target: nn.Module, source: nn.Module) -> None:
    """Copy the sharded weights of `source` into the full weights of `target`; every rank must call this."""
    for parameter, sharded in zip(target.parameters(), source.parameters(), strict=True):
        parameter.copy_(gather_full_tensor(sharded))
