"""Checkpoints: safetensors and JSON with checksums, written beside their place and then moved there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apa_cli.models.sharding import placed_like, storage, whole
from apa_cli.types import UserError

NAME = "iteration_{:06d}"
PATTERN = re.compile(r"iteration_(\d{6})$")


def own_tensors(module: nn.Module, trained_only: bool) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, sharded ones as they are; of tied ones only the first name.

    With `trained_only` without the parameters that are frozen: they are as they were loaded.
    """
    frozen = {storage(p) for p in module.parameters() if not p.requires_grad} if trained_only else set()
    seen: set[int] = set()
    kept = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if storage(tensor) in frozen:
            continue
        if storage(tensor) not in seen or tensor.numel() == 0:
            seen.add(storage(tensor))
            kept[name] = tensor.detach()
    return kept


def module_tensors(module: nn.Module, trained_only: bool = False) -> dict[str, Tensor]:
    """The same, each whole: where they are sharded, all processes must call this."""
    return {name: whole(tensor).contiguous() for name, tensor in own_tensors(module, trained_only).items()}


def load_module(module: nn.Module, tensors: dict[str, Tensor], trained_only: bool = False) -> None:
    """Copies saved tensors into a module of the same shape. UserError where the names differ."""
    own = own_tensors(module, trained_only)
    if own.keys() != tensors.keys():
        raise UserError(
            f"resume: the checkpoint's tensors differ from the model's: {sorted(own.keys() ^ tensors.keys())[:3]}"
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(placed_like(tensors[name], tensor))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state as `index.name`, whole."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}.{name}": whole(value).contiguous() for index, entry in state.items() for name, value in entry.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        index, name = key.split(".", 1)
        like = parameters[int(index)]
        state.setdefault(int(index), {})[name] = placed_like(value, like) if value.shape == like.shape else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(folder: Path, iteration: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> Path:
    """Writes `folder`/iteration_NNNNNN with one safetensors file per entry of `tensors`, and state.json.

    Everything is on disk, with a manifest of checksums, before the checkpoint gets its name.
    """
    target = folder / NAME.format(iteration)
    half = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    for name, group in tensors.items():
        save_file(group, half / f"{name}.safetensors")
    (half / "state.json").write_text(json.dumps(state))
    files = sorted(half.iterdir())
    manifest = {file.name: digest(file) for file in files}
    (half / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for file in [*files, half / "manifest.json"]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    shutil.rmtree(target, ignore_errors=True)
    half.rename(target)
    return target


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` was given. UserError for one that is damaged, naming the file."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"resume: {checkpoint} is not a checkpoint (no readable manifest.json)") from error
    for name, expected in manifest.items():
        file = checkpoint / name
        if not file.is_file() or digest(file) != expected:
            raise UserError(f"resume: {file} is missing or damaged")
    names = [name for name in manifest if name.endswith(".safetensors")]
    tensors = {name.removesuffix(".safetensors"): load_file(checkpoint / name) for name in names}
    return tensors, json.loads((checkpoint / "state.json").read_text())


def digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def all_in(folder: Path) -> list[Path]:
    """The checkpoints in a folder, oldest first."""
    return sorted(p for p in folder.glob("iteration_*") if PATTERN.match(p.name)) if folder.is_dir() else []


def prune(folder: Path, keep_last: int, best: int | None) -> None:
    """Deletes all but the last `keep_last` checkpoints and the one of iteration `best`."""
    for path in all_in(folder)[:-keep_last]:
        if best is None or path.name != NAME.format(best):
            shutil.rmtree(path)


def located(resume: str) -> tuple[Path, Path]:
    """The run directory and the checkpoint that `resume=PATH` names: a run's latest, or one of its checkpoints."""
    path = Path(resume).expanduser()
    if PATTERN.match(path.name) and path.is_dir():
        return path.parent.parent, path
    found = all_in(path / "checkpoints")
    if not found:
        raise UserError(f"resume: no checkpoint in {path}")
    return path, found[-1]
