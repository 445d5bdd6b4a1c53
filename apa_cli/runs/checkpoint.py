"""Checkpoints: safetensors and JSON with checksums, written beside their place and then moved there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from apa_cli.errors import UserError
from apa_cli.models.sharding import placed_like, storage, whole

NAME = "iteration_{:06d}"
WRITE_ERRORS = (OSError, SafetensorError)
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

    Everything is on disk, with a manifest of checksums, before the checkpoint gets its name. UserError where it
    cannot be written; the checkpoints that are there stay as they are.
    """
    target = folder / NAME.format(iteration)
    half = folder / f".{target.name}.{os.getpid()}"
    remove_half_written(folder)
    try:
        half.mkdir(parents=True)
        write(half, tensors, state)
        shutil.rmtree(target, ignore_errors=True)
        half.rename(target)
        sync(folder)
    except WRITE_ERRORS as error:
        shutil.rmtree(half, ignore_errors=True)
        raise UserError(
            f"checkpoint: {target} cannot be written ({reason(error)}); what was saved before is intact"
        ) from error
    return target


def write(half: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """All files of a checkpoint, each on disk when this returns."""
    for name, group in tensors.items():
        save_file(group, half / f"{name}.safetensors")
    (half / "state.json").write_text(json.dumps(state))
    files = sorted(half.iterdir())
    manifest = {file.name: digest(file) for file in files}
    (half / "manifest.json").write_text(json.dumps(manifest, indent=2))
    for file in [*files, half / "manifest.json", half]:
        sync(file)


def remove_half_written(folder: Path) -> None:
    """Deletes what saves that were killed have left; nobody else may be saving there."""
    for path in folder.glob(".iteration_*"):
        shutil.rmtree(path, ignore_errors=True)


def sync(path: Path) -> None:
    """Returns when a file, or what a folder lists, is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def reason(error: Exception) -> str:
    """The operating system's words, or the first line of another error."""
    return getattr(error, "strerror", None) or str(error).splitlines()[0]


def load(checkpoint: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` was given. UserError for one that is damaged, naming the file."""
    names = [name for name in verified(checkpoint) if name.endswith(".safetensors")]
    tensors = {name.removesuffix(".safetensors"): load_file(checkpoint / name) for name in names}
    return tensors, json.loads((checkpoint / "state.json").read_text())


def verified(checkpoint: Path) -> list[str]:
    """The names of a checkpoint's files. UserError if one is missing or differs from its checksum."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        files = {checkpoint / name: expected for name, expected in manifest.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"resume: {checkpoint} is not a checkpoint (no readable manifest.json)") from error
    for file, expected in files.items():
        if not file.is_file() or digest(file) != expected:
            raise UserError(f"resume: {file} is missing or damaged")
    return list(manifest)


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


def iteration_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("_")[2])


def drop_after(folder: Path, iteration: int) -> None:
    """Deletes the checkpoints of later iterations: the run goes on from `iteration` and will not have had them."""
    for path in all_in(folder):
        if path.name > NAME.format(iteration):
            shutil.rmtree(path)
    remove_half_written(folder)


def located(resume: str) -> tuple[Path, list[Path]]:
    """The run directory that `resume=PATH` names, and its checkpoints, oldest first; or the one that PATH names.

    UserError where there is none.
    """
    path = Path(resume).expanduser()
    if PATTERN.match(path.name) and path.is_dir():
        return path.parent.parent, [path]
    found = all_in(path / "checkpoints")
    if not found:
        raise UserError(f"resume: no checkpoint in {path}")
    return path, found


def latest_good(found: list[Path], say: Callable[[str], None]) -> Path:
    """The last of these checkpoints that is whole; each later one is named. UserError where none is."""
    for number, path in enumerate(reversed(found), 1):
        try:
            verified(path)
        except UserError as error:
            if number == len(found):
                raise
            say(f"{error}; the checkpoint before it is used")
        else:
            return path
    raise UserError("resume: no checkpoint")
